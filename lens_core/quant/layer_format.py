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
    """

    name: str
    bits: int
    group: int = 0
    rotation: int = 0
    inputs: str | None = None

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


def to_json(form: LayerFormat) -> Tensor:
    """The ``comfy_quant`` tensor, u8."""
    entry: dict[str, Any] = {"format": form.name}
    if form.name == AFFINE:
        entry |= {"bits": form.bits, "group_size": form.group}
    if form.rotation:
        entry |= {"convrot": True, "convrot_groupsize": form.rotation}
    if form.kind is not None and form.inputs is None:
        entry["full_precision_matrix_mult"] = True
    return torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)


def from_json(raw: Tensor, layer: str) -> LayerFormat:
    """The format that a ``comfy_quant`` tensor tells of; raises CheckpointError where none is known."""
    try:
        entry = json.loads(bytes(raw.tolist()))
        name = entry["format"]
        params = entry.get("params") or {}
        rotated = name == "convrot_w4a4" or entry.get("convrot", params.get("convrot", False))
        size = int(entry.get("convrot_groupsize", params.get("convrot_groupsize", _ROTATION)))
        bits = int(entry.get("bits", _BITS.get(name, 8)))
        group = int(entry.get("group_size", _GROUPS.get(name, 0))) if name in (AFFINE, *_GROUPS) else 0
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"The layer {layer} says by its comfy_quant that it is quantised, but not how ({error}). "
            "Download the file again."
        ) from error
    if name not in SCALES:
        raise CheckpointError(
            f"The layer {layer} is quantised as {name!r}; this version reads {', '.join(SCALES)}. Choose "
            "another file."
        )
    form = LayerFormat(name, bits, group, size if rotated else 0)
    return form.dynamic(not entry.get("full_precision_matrix_mult", False))
