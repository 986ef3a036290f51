"""A GPT-OSS encoder on disk, in any of the layouts it is published in: what it is, and filling a module.

Opening reads headers alone and compares them with what the module needs; the tokenizer, the identity
and (for nvfp4) the final config are worked out when asked for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from .config import EncoderConfig
from .encoder import GptOssEncoder
from .errors import CheckpointError
from .prompt import PromptTokenizer
from .prompt.tokenizer import library_errors
from .sources import with_head
from .weights.banks import ExpertQuantizer
from .weights.encoder_layouts import encoder_config, encoder_layout, encoder_parts, settled
from .weights.gguf import GgufCheckpoint
from .weights.gguf_tokenizer import tokenizer_of
from .weights.identity import identity
from .weights.keymap import ENCODER_UNUSED, HEAD_UNUSED, PREFIXES, rename
from .weights.kind import open_part
from .weights.loader import AnyCheckpoint, OnTensor, load_into, plan_load
from .weights.user_file import opened

log = logging.getLogger(__name__)
_TOKENIZER = "tokenizer.json"
_LARGEST_TOKENIZER = 64 * 2**20


class EncoderFile:
    """An opened file or folder; made by ``loading.open_encoder``.

    Raises CheckpointError where it is no GPT-OSS encoder or one in a format that is not read, and
    CheckpointMismatch where tensors are missing, unexpected or of another shape.
    """

    def __init__(self, path: Path, tokenizer_places: Sequence[Path] = ()) -> None:
        self.path = path
        self.tokenizer_places = tuple(tokenizer_places)
        self.checkpoint: AnyCheckpoint = open_part(path, "encoder")
        self._opened = _stamps(self.checkpoint)
        self.layout = encoder_layout(self.checkpoint)
        # What the header tells: all but the format that the banks are loaded as, for nvfp4 (see ``config``).
        self.sizes = encoder_config(self.checkpoint, self.layout)
        plan_load(
            GptOssEncoder(self.sizes, device="meta"),
            self.checkpoint,
            self.layout.table,
            unused=ENCODER_UNUSED,
            parts=encoder_parts(self.layout, self.sizes),
        )

    @property
    def name(self) -> str:
        """How to speak of it to a user."""
        return self.checkpoint.name

    @cached_property
    def config(self) -> EncoderConfig:
        """Sizes, and the format that the banks are loaded as. Of an nvfp4 file this reads every scale
        (1.2 GB of GPT-OSS-20B): banks that are MXFP4 in another dress are loaded as that."""
        return settled(self.checkpoint, self.layout, self.sizes)

    @cached_property
    def identity(self) -> str:
        """A hex digest that names the weights, wherever they lie."""
        return identity(self.checkpoint.paths)

    @cached_property
    def tokenizer(self) -> PromptTokenizer:
        """Embedded in the file, beside it, in ``tokenizer_places``, or rebuilt from a GGUF's metadata.

        Other models' are passed over: folders of encoders may hold one each.
        """
        embedded = rename(self.checkpoint.header, PREFIXES["encoder"], file=self.name).get("tokenizer_json")
        if embedded is not None:
            source, inside = f"the tokenizer in {self.name}", self.checkpoint.header[embedded]
            _check_size(inside.nbytes, source)
            return PromptTokenizer.from_json(_text(inside.bytes().numpy().tobytes()), source)
        places, unfit = self._places(), None
        for place in places:
            file = place / _TOKENIZER if os.path.isdir(place) else place
            try:
                if os.path.isfile(file):
                    _check_size(file.stat().st_size, str(file))
                    with opened(file) as content:
                        return PromptTokenizer.from_json(_text(content.read()), str(file))
            except CheckpointError as error:
                unfit = unfit or str(error)
        if isinstance(self.checkpoint, GgufCheckpoint):
            source = f"the tokenizer in {self.name}"
            with library_errors(source):
                tokenizer = tokenizer_of(self.checkpoint)
            if tokenizer is not None:
                return PromptTokenizer(tokenizer, source)
        if unfit is not None:
            raise CheckpointError(unfit)
        raise CheckpointError(
            f"{self.name} holds no tokenizer and there is no {_TOKENIZER} in {', '.join(map(str, places))}. "
            f"Copy gpt-oss-20b's {_TOKENIZER} (12 MB, beside its weights or in a Lens folder's tokenizer/) "
            f"into {places[0]}."
        )

    def load(
        self,
        encoder: nn.Module,
        dtype: torch.dtype | None,
        on_tensor: OnTensor | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        """Fill a GptOssEncoder of this ``config``, built on the meta device: experts packed, the rest
        in ``dtype`` (None: as stored; what a GGUF has quantised becomes bf16).

        Raises CheckpointError where a file is no longer the one that was opened. The tensors end on the
        CPU. ``on_tensor(done, total)`` may raise to cancel. Dense experts are
        quantised on ``device``.
        """
        self._check_unchanged()
        quantize = ExpertQuantizer(device)
        load_into(
            encoder,
            self.checkpoint,
            self.layout.table,
            dtype,
            structure=GptOssEncoder(self.config, device="meta"),
            unused=ENCODER_UNUSED,
            parts=encoder_parts(self.layout, self.config, quantize),
            on_tensor=on_tensor,
        )
        if quantize.largest_error:
            log.warning(
                "%s holds experts that are not MXFP4: quantising them changed values by up to %.1f %% of "
                "the largest in their block of 32. Prefer a file with GPT-OSS-20B's own MXFP4 experts.",
                self.name,
                100 * quantize.largest_error,
            )

    def check_head(self) -> None:
        """Raise CheckpointError where the file has no lm_head, naming files that have it."""
        names = rename(self.checkpoint.header, self.layout.table, file=self.name)
        if "lm_head.weight" not in names:
            raise CheckpointError(
                f"{self.name} has no lm_head, the 1.2 GB of GPT-OSS-20B that turn its last layer into words: "
                f"it encodes prompts, but cannot write any. Files with it: {with_head()}."
            )

    def load_head(self, head: nn.Module, dtype: torch.dtype) -> None:
        """Fill a module with ``norm`` and ``lm_head``, built on the meta device, in ``dtype``; in the stored
        one the weights stay mapped. Raises as ``check_head`` does."""
        self.check_head()
        self._check_unchanged()
        load_into(head, self.checkpoint, self.layout.table, dtype, unused=HEAD_UNUSED)

    def _check_unchanged(self) -> None:
        if _stamps(self.checkpoint) != self._opened:
            raise CheckpointError(
                f"{self.name} has been changed or removed since it was chosen. Refresh the list (R) and run "
                "again."
            )

    def _places(self) -> list[Path]:
        """Folders, or files, to look for a tokenizer.json in, in this order."""
        folder = self.path if os.path.isdir(self.path) else self.path.parent
        beside = (folder, folder / "tokenizer", folder.parent / "tokenizer", folder.parent)
        return list(dict.fromkeys((*beside, *self.tokenizer_places)))


def _stamps(checkpoint: AnyCheckpoint) -> list[tuple[int, int] | None]:
    """Size and time of change of every file; None where it is gone."""
    stats = [path.stat() if os.path.isfile(path) else None for path in checkpoint.paths]
    return [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]


def _check_size(size: int, source: str) -> None:
    if size > _LARGEST_TOKENIZER:
        raise CheckpointError(
            f"{source} has {size:,} bytes; expected GPT-OSS's tokenizer.json, which has 28 million. Download "
            "the file again."
        )


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")
