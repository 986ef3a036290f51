"""Formats that comfy-kitchen quantises and multiplies: mxfp8 and nvfp4, which Blackwell GPUs have.

Its tensors, in whose layouts ComfyUI keeps such weights too. Where the GPU has not the format, weights are
unpacked like those of other formats, without comfy-kitchen (``block_scales``).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MissingPackage
from .layer_format import LayerFormat
from .linear import Packed

_LAYOUTS = {"mxfp8": "TensorCoreMXFP8Layout", "nvfp4": "TensorCoreNVFP4Layout"}
# Of rows and columns; others are padded, which no layer of Lens needs.
MULTIPLE = 32
# Compute capability from which a GPU multiplies them.
NEEDS = {"mxfp8": (10, 0), "nvfp4": (10, 0)}


def has(form: LayerFormat) -> bool:
    """Whether ``form`` is one of them."""
    return form.name in _LAYOUTS


def quantize(weight: Tensor, form: LayerFormat) -> Packed:
    """Weight [N, K] as comfy-kitchen quantises it, its scales in cuBLAS' order."""
    return packed_of(_kitchen(form).QuantizedTensor.from_float(weight, _LAYOUTS[form.name]), form)


def packed_of(tensor: Any, form: LayerFormat) -> Packed:
    """The tensors of a comfy-kitchen QuantizedTensor."""
    values, params = tensor._qdata, tensor._params
    if form.name == "nvfp4":
        return Packed(form, values, params.block_scale, params.scale)
    # As bytes: safetensors before 0.6 has no name for scales of eight exponent bits.
    return Packed(form, values, params.scale.view(torch.uint8))


def empty(size: tuple[int, int], form: LayerFormat) -> Packed:
    """What ``quantize`` makes of a weight of ``size`` (N, K), multiples of ``MULTIPLE``, without memory."""
    rows, columns = size

    def meta(height: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(height, width, dtype=dtype, device="meta")

    # Scales in tiles of 128 rows and 4 groups, as cuBLAS reads them.
    scales = _up(rows, 128), _up(columns // form.group, 4)
    if form.name == "nvfp4":
        factor = torch.empty((), device="meta")
        values = meta(rows, columns // 2, torch.uint8)
        return Packed(form, values, meta(*scales, torch.float8_e4m3fn), factor)
    values = meta(rows, columns, torch.float8_e4m3fn)
    return Packed(form, values, meta(*scales, torch.uint8))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """[B, T, N] of x [B, T, K], both quantised, where ``multiplies`` says so."""
    weight = _tensor(packed, (packed.rows, x.shape[-1]), x.dtype)
    flat = type(weight).from_float(x.flatten(0, -2), _LAYOUTS[packed.form.name])
    return F.linear(flat, weight, bias).unflatten(0, x.shape[:-1])


def multiplies(form: LayerFormat, device: torch.device) -> bool:
    """Whether inputs are quantised too: the GPU has products of the format, and the file allows it."""
    return form.name in NEEDS and not form.full_precision and why_not_multiply(form.name, device) is None


def why_not_multiply(name: str, device: torch.device) -> str | None:
    """Why ``device`` has no products of the format of this name, in words; None where it has."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"products of {name} are on NVIDIA's GPUs alone"
    found, needs = _capability(device), NEEDS[name]
    if found < needs:
        return "this GPU has compute capability {}.{}, and {} needs {}.{}".format(*found, name, *needs)
    return None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; PyTorch's own takes some microseconds, and every layer asks."""
    return torch.cuda.get_device_capability(device)


def _tensor(packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    form, values, scale, factor = packed
    kitchen, name = _kitchen(form), _LAYOUTS[form.name]
    params: dict[str, Any] = {"orig_dtype": dtype, "orig_shape": shape}
    if form.name == "nvfp4":
        params |= {"scale": factor, "block_scale": scale.view(torch.float8_e4m3fn)}
    else:
        params |= {"scale": scale.view(torch.float8_e8m0fnu)}
    return kitchen.QuantizedTensor(values, name, kitchen.get_layout_class(name).Params(**params))


def _kitchen(form: LayerFormat) -> Any:
    try:
        import comfy_kitchen.tensor
    except ImportError as error:
        raise MissingPackage(
            f"Weights in {form.name} need the package comfy-kitchen: pip install comfy-kitchen"
        ) from error
    return comfy_kitchen.tensor
