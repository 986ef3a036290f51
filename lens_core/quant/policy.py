"""Which weights are quantised, into what, and what the published names of the modes mean.

Only the matrix products inside the blocks are: attention's and the MLPs' projections, two thirds of all
weights. Everything else stays as it is in every mode: the modulation sets shift, scale and gate of every
token at once (in 4 bits a picture shows a grid), and it is off the GPU while a picture is drawn anyway; the
input and output projections, the norms and the time embedding are one part in a hundred.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kitchen
from . import linear as definitions
from .layer_format import LayerFormat, affine4, float8, int8, mxfp8, nvfp4
from .linear import Packed

_QUANTIZED = re.compile(
    r"^transformer_blocks\.\d+\."
    r"(?:attn\.(?:img_qkv|txt_qkv|to_out\.0|to_add_out)|(?:img|txt)_mlp\.w[123])$"
)
AUTO, NONE = "auto", "none"
# What a forward at 1440 x 1440 and the host itself need beside the weights.
WORKING_BYTES = 2_500_000_000


@dataclass(frozen=True)
class Mode:
    """A published name: the format of the weights, and whether rounding is searched for the least error."""

    form: LayerFormat
    what: str
    search: bool = False


MODES: dict[str, Mode] = {
    "float8_weight_only": Mode(float8, "weights in 8-bit floats, multiplied in bf16"),
    "float8_dynamic": Mode(float8.dynamic(True), "weights and inputs in 8-bit floats (W8A8)"),
    "int8_weight_only": Mode(int8, "weights in 8-bit integers, multiplied in bf16"),
    "int8_dynamic": Mode(int8.dynamic(True), "weights and inputs in 8-bit integers (W8A8)"),
    "int4_weight_only": Mode(affine4, "weights in 4 bits, groups of 64, rounded for the least error", True),
    "uint4_sdnq": Mode(affine4, "weights in 4 bits, groups of 64, as SDNQ rounds them"),
    "mxfp8": Mode(mxfp8, "8-bit floats with a scale for each 32 (Blackwell)"),
    "nvfp4": Mode(nvfp4, "4-bit floats with a scale for each 16 (Blackwell)"),
}
CHOICES = (NONE, AUTO, *MODES)


def is_quantized(layer: str) -> bool:
    """Whether the linear of this name is quantised by the modes."""
    return _QUANTIZED.match(layer) is not None


def quantizes(layer: str, size: tuple[int, int], mode: Mode) -> bool:
    """Whether a mode quantises the linear of this name and size (N, K)."""
    return is_quantized(layer) and fits(size, mode.form)


def fits(size: tuple[int, int], form: LayerFormat) -> bool:
    """Whether a weight of ``size`` (N, K) can be held in ``form``: whole groups, full bytes, no padding."""
    if kitchen.has(form) and any(length % kitchen.MULTIPLE for length in size):
        return False
    return size[1] % (form.group or 8 // form.bits) == 0


def pack(weight: Tensor, mode: Mode, device: torch.device | str | None = None) -> Packed:
    """Weight [N, K] in a mode's format, quantised on ``device`` (None: where it is) and put where it is."""
    there = weight if device is None else weight.to(device)
    if kitchen.has(mode.form):
        packed = kitchen.quantize(there, mode.form)
    else:
        packed = definitions.quantize(there, mode.form, mode.search)
    tensors = [None if tensor is None else tensor.to(weight.device) for tensor in packed[1:]]
    return Packed(packed.form, *tensors)  # type: ignore[arg-type]


def empty(size: tuple[int, int], form: LayerFormat) -> Packed:
    """What ``pack`` makes of a weight of ``size`` (N, K), without memory."""
    if kitchen.has(form):
        return kitchen.empty(size, form)
    return definitions.quantize(torch.empty(size, device="meta"), form)


def weight_bytes(sizes: Mapping[str, int], mode: Mode | None) -> int:
    """Bytes that a step needs of linears with these numbers of weights; None: in bf16."""
    if mode is None:
        return 2 * sum(sizes.values())
    form = mode.form
    # A group's scale: bf16 with a zero point, or one byte.
    scales = 0.0 if not form.group else (4.0 if form == affine4 else 1.0) / form.group
    quantized = sum(count for layer, count in sizes.items() if is_quantized(layer))
    rest = sum(sizes.values()) - quantized
    return int(quantized * (form.bits / 8 + scales)) + 2 * rest


def choose(
    sizes: Mapping[str, int], free: int | None, capability: tuple[int, int] | None, gpu: str = "this GPU"
) -> tuple[str, str]:
    """What ``auto`` means: a mode, or none, and why.

    ``sizes`` are the linears' numbers of weights that a step needs, ``free`` bytes of GPU memory not taken by
    other programs, ``capability`` an NVIDIA GPU's (None: another's). Exact where there is room for it.
    """
    if free is None:
        return NONE, f"what {gpu} has free is not known, or it is no GPU"
    room, names = free - WORKING_BYTES, _for(capability)
    whole = weight_bytes(sizes, None)
    there = f"{free / 1e9:.1f} GB of {gpu} are free"
    if whole <= room:
        return NONE, f"{there}, and the steps need {(whole + WORKING_BYTES) / 1e9:.1f} GB in bf16"
    for name in names[:-1]:
        needed = weight_bytes(sizes, MODES[name])
        if needed <= room:
            return name, f"{there}: too few for bf16, and {MODES[name].what} are what it does best"
    return names[-1], f"{there}: too few for 8 bits"


def _for(capability: tuple[int, int] | None) -> tuple[str, str]:
    """The modes of 8 and of 4 bits for a GPU. Integers in 8 bits round three times as fine as floats and are
    as fast up to Hopper; from Blackwell on floats are faster."""
    if capability is None or capability < (8, 0):
        return "int8_weight_only", "int4_weight_only"
    return ("int8_dynamic", "int4_weight_only") if capability < (10, 0) else ("float8_dynamic", "nvfp4")
