"""A LoRA's file, and which layers of a denoiser its tensors belong to.

Opening reads the header; ``match`` finds the layers, compares sizes, and only then reads tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, first_of
from ..weights import Checkpoint, open_checkpoint
from ..weights.kind import describe
from ..weights.reader import read_json
from .canonical import Layer, canonical, check, check_numbers
from .kinds import Kind, kind_of
from .metadata import Scaling, read_scaling
from .names import Place, find_place, places, split_key
from .split import join

Sizes = Mapping[str, tuple[int, int]]
# What PEFT's save_pretrained writes.
_CONFIG, _ADAPTER = "adapter_config.json", "adapter_model.safetensors"
_MOST_TENSORS = 20_000
_WITHOUT_BIAS = ("_mlp.w1", "_mlp.w2", "_mlp.w3")
# (whose LoRA it is, a pattern that one of its keys matches); the first row that matches wins.
_FOREIGN: tuple[tuple[str, str], ...] = (
    ("FLUX", r"(?:^|[._])(?:double_blocks|single_blocks|single_transformer_blocks)[._]\d"),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._](?:attn[._]add_q_proj|(?:img|txt)_mlp[._]net)"),
    ("Stable Diffusion 3", r"(?:^|[._])joint_blocks[._]\d"),
    ("Stable Diffusion", r"(?:^|[._])(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks)[._]"),
    ("Wan", r"(?:^|[._])blocks[._]\d+[._](?:self_attn|cross_attn)[._]"),
    ("Z-Image", r"(?:^|[._])layers[._]\d+[._]attention[._]"),
    ("a text encoder", r"^(?:lora_te\d?_|text_encoder|text_model)"),
)
_EXPECTED = (
    "expected one for Lens, whose keys name layers such as transformer_blocks.0.attn.img_qkv and "
    "transformer_blocks.0.img_mlp.w1."
)


@dataclass(frozen=True)
class Matched:
    """What of a LoRA's file has its place in a denoiser.

    ``layers``: module name -> the tensors for its weight, named as ComfyUI's weight adapters know them
    (``lora_up.weight``, ``alpha``, ...); ``unmatched``: keys of the file that fit no layer; ``ranks`` of all
    layers; ``kinds`` of adapters; ``found`` of ``total`` targets that the file names have a layer.
    """

    layers: dict[str, dict[str, Tensor]]
    unmatched: list[str]
    ranks: frozenset[int]
    kinds: list[str]
    found: int
    total: int

    @property
    def rank(self) -> int | None:
        """Of the layers, the largest if they differ; None for kinds without one."""
        return max(self.ranks, default=None)

    def summary(self, strength: float) -> str:
        """Such as "matched 480 of 480, strength 0.8, rank 16"; then what did not match."""
        parts = [f"matched {self.found} of {self.total}", f"strength {strength:g}"]
        if self.kinds != ["LoRA"]:
            parts.append(" and ".join(self.kinds))
        if self.ranks:
            low, high = min(self.ranks), max(self.ranks)
            parts.append(f"rank {high}" if low == high else f"ranks {low} to {high}")
        if self.unmatched:
            first = first_of([_short(key) for key in self.unmatched], 3)
            parts.append(f"not matched ({len(self.unmatched)} keys): {first}")
        return ", ".join(parts)


@dataclass
class _Target:
    """What the file has for a layer or a part of it: the key of each tensor by the adapters' name."""

    base: str
    keys: dict[str, str] = field(default_factory=dict)
    kind: Kind | None = None


class LoraFile:
    """A LoRA's file, opened but not read."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None = None) -> None:
        self.checkpoint = checkpoint
        self.name = checkpoint.name
        self.scaling: Scaling = read_scaling({**checkpoint.metadata, **(config or {})})

    def match(self, sizes: Sizes) -> Matched:
        """Its tensors by the layers of a denoiser; ``sizes`` are (rows, columns) of all its linears by name.

        Raises CheckpointError where no key fits, or a tensor has the size of another model.
        """
        targets, strangers, unmatched = self._targets(sizes)
        layers: dict[str, Layer] = {}
        ranks: set[int] = set()
        kinds: dict[str, None] = {}
        found = 0
        for layer, parts in targets.items():
            tensors, used = self._layer(parts, sizes[layer])
            unmatched += [
                key for part, target in parts.items() if part not in used for key in target.keys.values()
            ]
            if tensors is None:
                continue
            layers[layer] = tensors
            found += len(used)
            for kind in [parts[part].kind for part in used]:
                assert kind is not None
                kinds[kind.name] = None
                ranks |= {kind.rank} if kind.rank is not None else set()
        total = sum(map(len, targets.values())) + len(strangers)
        if not layers:
            raise CheckpointError(self._why_none())
        return Matched(layers, unmatched, frozenset(ranks), list(kinds), found, total)

    def _targets(self, sizes: Sizes) -> tuple[dict[str, dict[int | None, _Target]], set[str], list[str]]:
        """Layer -> its parts (None: the whole) -> target; other names of layers; keys that fit none."""
        known = places(sizes)
        targets: dict[str, dict[int | None, _Target]] = {}
        strangers: set[str] = set()
        unmatched = []
        for key in self.checkpoint.header:
            split = split_key(key)
            place: Place | None = find_place(split[0], known) if split else None
            lacks_bias = place is not None and place.layer.endswith(_WITHOUT_BIAS)
            if split is None or place is None or (split[1] == "diff_b" and lacks_bias):
                unmatched.append(key)
                strangers |= {split[0]} if split else set()
                continue
            parts = targets.setdefault(place.layer, {})
            target = parts.setdefault(place.part, _Target(split[0]))
            if split[1] in target.keys:
                keys = f"{_short(target.keys[split[1]])} and as {_short(key)}"
                raise CheckpointError(
                    f"{self.name} holds {split[1]} of {place.layer} twice, as {keys}. Save one adapter "
                    "alone, or download it again."
                )
            target.keys[split[1]] = key
        for layer, parts in targets.items():
            for part, target in parts.items():
                self._find_kind(layer, part, target, sizes[layer])
        return targets, strangers, unmatched

    def _find_kind(self, layer: str, part: int | None, target: _Target, size: tuple[int, int]) -> None:
        header = self.checkpoint.header
        target.kind = kind_of({name: header[key].shape for name, key in target.keys.items()})
        if target.kind is None:
            return
        rows, columns = size if part is None else (size[0] // 3, size[1])
        got = target.kind.size
        if (got[0] or rows, got[1] or columns) != (rows, columns) or columns % target.kind.block:
            raise CheckpointError(
                f"{self.name} is a LoRA for {self._whose()}: what it has for {_short(target.base)} fits a "
                f"weight of {list(got)}, and {layer} of Lens {'is' if part is None else 'has a part of'} "
                f"{[rows, columns]}; {_EXPECTED}"
            )

    def _layer(
        self, parts: dict[int | None, _Target], size: tuple[int, int]
    ) -> tuple[Layer | None, list[int | None]]:
        """A layer's tensors, and the parts that went into it."""
        whole = parts.get(None)
        if whole is not None and whole.kind is not None:
            return self._read(whole, size), [None]
        split = {i: target for i, target in parts.items() if i is not None and target.kind is not None}
        rows, columns = size[0] // 3, size[1]
        read = {i: self._read(target, (rows, columns)) for i, target in split.items()}
        joined = join(read, rows, columns) if read else None
        return joined, list(split) if joined is not None else []

    def _read(self, target: _Target, size: tuple[int, int]) -> Layer:
        """A target's tensors, with alpha from the metadata where there is no tensor of it."""
        header, keys = self.checkpoint.header, target.keys
        check(target.base, {name: header[key] for name, key in keys.items()}, size, self.name)
        # Copied: a mapping each would take more open files than a process may have.
        tensors = {name: self.checkpoint.read(key).clone() for name, key in keys.items()}
        check_numbers(target.base, tensors, self.name)
        sd_scripts = not any("lora_A" in key for key in keys.values())
        assert target.kind is not None
        return canonical(tensors, target.base, target.kind, size, self.scaling, sd_scripts)

    def _why_none(self) -> str:
        if not any(split_key(key) for key in self.checkpoint.header):
            return f"{self.name} is {describe(self.checkpoint)}, no LoRA; {_EXPECTED}"
        first = next(key for key in self.checkpoint.header if split_key(key))
        return (
            f"{self.name} is a LoRA for {self._whose()} (its keys are such as {_short(first)}); {_EXPECTED}"
        )

    def _whose(self) -> str:
        for name, pattern in _FOREIGN:
            search = re.compile(pattern).search
            if any(search(key) for key in self.checkpoint.header):
                return name
        return "another model"


def open_lora(path: Path) -> LoraFile:
    """Open a LoRA's .safetensors file, or a folder with one, such as PEFT's. Raises CheckpointError."""
    path = Path(path)
    adapter = path / _ADAPTER
    checkpoint = open_checkpoint(adapter if os.path.isfile(adapter) else path)
    if len(checkpoint.header) > _MOST_TENSORS:
        raise CheckpointError(
            f"{checkpoint.name} has {len(checkpoint.header):,} tensors, more than any LoRA. Choose another."
        )
    beside = checkpoint.paths[0].parent / _CONFIG
    # Many files may share a folder; PEFT's own name says that the config is this one's.
    is_peft = os.path.isdir(path) or path.name == _ADAPTER
    return LoraFile(checkpoint, read_json(beside) if is_peft and os.path.isfile(beside) else None)


def _short(key: str) -> str:
    return key if len(key) <= 150 else f"{key[:147]}..."
