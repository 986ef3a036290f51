"""Quantised layers of SDNQ's files: uint4 with a scale and a zero point for each group of a row.

SDNQ writes two numbers of 4 bits to a byte, the first in its low bits, and all bytes of a weight as one row.
What else it can do (other bits, a low-rank part, turned weights, tables of values) is refused by name: most
of it has tensors of its own, but that weights are turned only the folder's config.json tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..errors import CheckpointError
from ..quant.layer_format import affine4
from ..quant.linear import Packed
from .loader import Source, Stored
from .quantized_part import NUMBERS, Linears, QuantizedPart
from .reader import read_json
from .tensor_info import DTYPES

# Beside a weight that is more than a number, a scale and a zero point.
_MORE = ("svd_up", "svd_down", "scale_2", "scale_zero_point", "zero_point_scale", "zero_point_2")


def sdnq_layers(linears: Linears) -> dict[str, QuantizedPart]:
    """Those with a ``scale``, as SDNQ calls it; raises CheckpointError for what is not uint4 in groups."""
    layers = dict.fromkeys([*linears.having("scale"), *linears.having("zero_point")])
    if not layers:
        return {}
    config = _config(linears)
    special = config.get("modules_quant_config")
    for settings in (config, *(special.values() if isinstance(special, dict) else ())):
        if isinstance(settings, dict) and settings.get("use_hadamard"):
            raise _refused(linears, next(iter(layers)), "turned by a Hadamard matrix")
    return {layer: _layer(linears, layer, config) for layer in layers}


def _config(linears: Linears) -> dict[str, Any]:
    """How the folder of the file says that it was quantised; empty where nothing does."""
    folder = linears.checkpoint.paths[0].parent
    for name in ("config.json", "quantization_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name)
            found = found.get("quantization_config", found)
            if isinstance(found, dict) and str(found.get("quant_method", "")).startswith("sdnq"):
                return found
    return {}


def _layer(linears: Linears, layer: str, config: dict[str, Any]) -> QuantizedPart:
    rows, columns = linears.size(layer)
    for name in _MORE:
        if linears.info(f"{layer}.{name}") is not None:
            raise _refused(linears, layer, f"with a {name}")
    weight = linears.needed(layer, "weight", "SDNQ's uint4")
    scale = linears.needed(layer, "scale", "SDNQ's uint4")
    zero = linears.info(f"{layer}.zero_point")
    kind = config.get("weights_dtype", "numbers")
    if zero is None:
        raise _refused(linears, layer, f"as {kind} without zero points")
    numbers = 2 * torch.Size(weight.shape).numel()
    if weight.dtype != "U8" or numbers != rows * columns or columns % 2:
        raise _refused(linears, layer, f"as {kind} ({weight.dtype} {list(weight.shape)})")
    groups, rest = divmod(torch.Size(scale.shape).numel(), rows)
    shapes = ((rows, groups, 1), (rows, groups))
    if rest or not groups or columns % groups or scale.shape not in shapes or zero.shape != scale.shape:
        raise _refused(linears, layer, f"with scales {list(scale.shape)} and zero points {list(zero.shape)}")
    dtypes = [DTYPES[info.dtype] for info in (scale, zero) if info.dtype in NUMBERS]
    if len(dtypes) < 2:
        raise _refused(linears, layer, f"with scales in {scale.dtype} and zero points in {zero.dtype}")
    form = replace(affine4, group=columns // groups)
    values = torch.empty(rows, columns // 2, dtype=torch.uint8, device="meta")
    each = torch.empty(rows, groups, dtype=torch.promote_types(*dtypes), device="meta")
    packed = Packed(form, values, each, each)
    stored = (
        Stored(f"{layer}.weight", (weight.shape,), ("U8",)),
        Stored(f"{layer}.scale", (scale.shape,), NUMBERS),
        Stored(f"{layer}.zero_point", (zero.shape,), NUMBERS),
    )
    return QuantizedPart(packed, stored, partial(_make, packed=packed), "uint4")


def _make(sources: Sequence[Source], packed: Packed) -> Packed:
    _, *wanted = packed
    read = [
        source.read(None).to(tensor.dtype).view(tensor.shape)
        for source, tensor in zip(sources, wanted, strict=True)
        if tensor is not None
    ]
    return Packed(packed.form, *read)


def _refused(linears: Linears, layer: str, how: str) -> CheckpointError:
    return CheckpointError(
        f"{linears.checkpoint.name} has {layer} quantised by SDNQ {how}; this version reads SDNQ's uint4 "
        "with a scale and a zero point for each group, and nothing else. Choose another file."
    )
