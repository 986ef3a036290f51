"""Strengths of a LoRA by block and stream, as a person writes them: ``0-11: 0.5, 12-47: 1, txt: 0``.

Entries are separated by commas or lines. Each names blocks (``7``, ``0-11``), a stream (``img``, ``txt``),
both (``txt 0-11``) or every layer (``all``), and a number that the LoRA's strength is multiplied by. Where
two entries name a layer, the later one counts; a layer that none names keeps 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import SettingError

IMAGE, TEXT = "img", "txt"
_EXAMPLE = 'Write for example "0-11: 0.5, 12-47: 1" or "txt: 0".'
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")
# Layers of the text stream; the embedding of time belongs to neither, and all others to the image's.
_TEXT_LAYER = re.compile(r"(^|\.)(txt_|to_add_out)")
_NO_STREAM = re.compile(r"^time_text_embed\.")
_WHAT = re.compile(rf"all|(?=\S)(?P<stream>{IMAGE}|{TEXT})?\s*((?P<first>\d+)(\s*-\s*(?P<last>\d+))?)?")


@dataclass(frozen=True)
class BlockStrength:
    """One entry: ``stream`` None means both, ``blocks`` None those outside the blocks too."""

    stream: str | None
    blocks: range | None
    strength: float

    def names(self, layer: str) -> bool:
        """Whether the entry is about a layer, e.g. ``transformer_blocks.0.attn.img_qkv``."""
        block = _BLOCK.match(layer)
        inside = self.blocks is None or (block is not None and int(block[1]) in self.blocks)
        return inside and self.stream in (None, _stream_of(layer))


def parse_block_strengths(text: str, num_layers: int) -> tuple[BlockStrength, ...]:
    """The entries of a text, in their order; raises SettingError where one is not understood.

    ``num_layers``: how many blocks the denoiser has. An empty text has no entries.
    """
    entries = filter(None, (entry.strip() for entry in re.split(r"[,;\n]", text)))
    return tuple(_parse(entry, num_layers) for entry in entries)


def strength_of(layer: str, entries: Sequence[BlockStrength]) -> float:
    """What a layer's strength is multiplied by."""
    return next((entry.strength for entry in reversed(entries) if entry.names(layer)), 1.0)


def _stream_of(layer: str) -> str | None:
    if _NO_STREAM.match(layer):
        return None
    return TEXT if _TEXT_LAYER.search(layer) else IMAGE


def _parse(entry: str, num_layers: int) -> BlockStrength:
    what, _, number = entry.partition(":")
    found = _WHAT.fullmatch(what.strip().lower())
    if found is None or ":" not in entry:
        raise SettingError(
            f"block_strengths: {entry!r} is not understood. Expected blocks (0-11), img, txt, both (txt "
            f"0-11) or all, a colon and a number. {_EXAMPLE}"
        )
    blocks = _blocks(entry, found["first"], found["last"], num_layers)
    return BlockStrength(found["stream"], blocks, _number(entry, number))


def _blocks(entry: str, first: str | None, last: str | None, num_layers: int) -> range | None:
    if first is None:
        return None
    begin, end = int(first), int(last or first)
    if begin > end or end >= num_layers:
        raise SettingError(
            f"block_strengths: {entry!r} names blocks {begin} to {end}; this model has 0 to "
            f"{num_layers - 1}. Write the smaller number first."
        )
    return range(begin, end + 1)


def _number(entry: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SettingError(f"block_strengths: {entry!r} needs a number after the colon. {_EXAMPLE}")
    return value
