"""How a quantised linear's weight is held, under the names that ComfyUI's files give the formats.

Each quantised layer of a file has a tensor ``comfy_quant``: a JSON object with the format's name and what
else must be known to read the other tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

# Kinds of numbers that a layer's inputs can be quantised to, a row (a token) at a time.
FLOAT8, INT8 = "float8", "int8"


@dataclass(frozen=True)
class LayerFormat:
    """A weight [N, K]: ``bits`` a number, a scale for each ``group`` of its K inputs (0: for all of a row),
    inputs turned by a Hadamard matrix of size ``rotation`` first (0: not).

    ``inputs``: the kind that the layer's inputs are quantised to as well; None: the weight alone is.
    ``full_precision``: the same wish for a format of which a GPU and not this pack quantises the inputs.
    """

    name: str
    bits: int
    group: int = 0
    rotation: int = 0
    inputs: str | None = None
    full_precision: bool = False

    @property
    def kind(self) -> str | None:
        """What its inputs can be quantised to, if they are."""
        return _KINDS.get(self.name)

    def dynamic(self, on: bool) -> LayerFormat:
        """The same with or without quantised inputs; unchanged where the format knows none."""
        return replace(self, inputs=self.kind if on else None)


_KINDS = {"float8_e4m3fn": FLOAT8, "int8_tensorwise": INT8}
AFFINE = "lens_affine"

float8 = LayerFormat("float8_e4m3fn", 8)
int8 = LayerFormat("int8_tensorwise", 8)
# An int4 or uint4 with a scale and a zero point for each group; no format of ComfyUI's, but of this pack.
affine4 = LayerFormat(AFFINE, 4, group=64)
mxfp8 = LayerFormat("mxfp8", 8, group=32)
nvfp4 = LayerFormat("nvfp4", 4, group=16)

# What a layer has beside ``weight`` and ``comfy_quant``, as ComfyUI's files name it.
SCALES: dict[str, tuple[str, ...]] = {
    "float8_e4m3fn": ("weight_scale",),
    "float8_e5m2": ("weight_scale",),
    "int8_tensorwise": ("weight_scale",),
    "convrot_w4a4": ("weight_scale",),
    "mxfp8": ("weight_scale",),
    "nvfp4": ("weight_scale", "weight_scale_2"),
    AFFINE: ("weight_scale", "weight_zero"),
}
_BITS = {"convrot_w4a4": 4, "nvfp4": 4}
_GROUPS = {"mxfp8": 32, "nvfp4": 16}
_ROTATION = 256  # of both ConvRot formats, unless the file says otherwise
_ROTATIONS = frozenset(4**power for power in range(1, 9))
_LONGEST_ENTRY = 2**16


def to_json(form: LayerFormat) -> Tensor:
    """The ``comfy_quant`` tensor, u8."""
    entry: dict[str, Any] = {"format": form.name}
    if form.name == AFFINE:
        entry |= {"bits": form.bits, "group_size": form.group}
    if form.rotation:
        entry |= {"convrot": True, "convrot_groupsize": form.rotation}
    if form.full_precision or (form.kind is not None and form.inputs is None):
        entry["full_precision_matrix_mult"] = True
    return torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)


def from_json(raw: Tensor, layer: str) -> LayerFormat:
    """The format that a ``comfy_quant`` tensor tells of; raises CheckpointError where none is known."""
    try:
        if raw.numel() > _LONGEST_ENTRY:
            raise ValueError(f"it has {raw.numel():,} bytes")
        return from_entry(json.loads(bytes(raw.tolist())), layer)
    except (ValueError, TypeError, RecursionError) as error:
        raise _unclear(layer, error) from error


def from_entry(entry: Any, layer: str) -> LayerFormat:
    """The format that the JSON object of a layer tells of; raises CheckpointError where none is known."""
    try:
        form, full_precision = _parse(entry)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _unclear(layer, error) from error
    if form.name not in SCALES:
        raise CheckpointError(
            f"The layer {layer} is quantised as {form.name!r}; this version reads {', '.join(SCALES)}. "
            "Choose another file."
        )
    if form.kind is None:
        return replace(form, full_precision=full_precision)
    return form.dynamic(not full_precision)


def _parse(entry: Any) -> tuple[LayerFormat, bool]:
    name = entry["format"]
    if not isinstance(name, str):
        raise TypeError(f"the format is {name!r}")
    params = entry.get("params")
    values = {**(params if isinstance(params, dict) else {}), **entry}
    bits, group, rotation = _BITS.get(name, 8), _GROUPS.get(name, 0), 0
    if name == AFFINE:
        bits, group = int(entry["bits"]), int(entry["group_size"])
        if bits not in (4, 8) or group < 1:
            raise ValueError(f"{bits} bits in groups of {group}")
    if name == "convrot_w4a4" or (name == "int8_tensorwise" and values.get("convrot", False)):
        rotation = int(values.get("convrot_groupsize", _ROTATION))
        if rotation not in _ROTATIONS:
            raise ValueError(f"a convrot_groupsize of {rotation}, which is no power of 4")
    full_precision = bool(entry.get("full_precision_matrix_mult", False))
    return LayerFormat(name, bits, group, rotation), full_precision


def _unclear(layer: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The layer {layer} says by its comfy_quant that it is quantised, but not how "
        f"({type(error).__name__}: {error}). Download the file again."
    )
