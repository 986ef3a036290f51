"""One layer's tensors as ComfyUI's weight adapters count on them, whatever trainer wrote them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..weights.tensor_info import DTYPES, TensorInfo
from .delta import constrained
from .kinds import Kind
from .metadata import TERMS, Scaling

Layer = dict[str, Tensor]


def check(layer: str, infos: Mapping[str, TensorInfo], size: tuple[int, int], file: str) -> None:
    """Raise CheckpointError where a tensor is no number of the right kind, or a vector has another length
    than the layer's ``size`` (rows, columns) asks for. The matrices' sizes are their kind's."""
    rows, columns = size
    lengths = {"alpha": {1}, "diff_b": {rows}, "rescale": {rows}, "dora_scale": {rows, columns}}
    for name, info in infos.items():
        count = math.prod(info.shape)
        if (not info.floating and name != "alpha") or info.dtype not in DTYPES:
            raise CheckpointError(
                f"{file} has {name} of {layer} as {info.dtype}; expected floating-point numbers. It is "
                "quantised or damaged: choose another file."
            )
        if count not in lengths.get(name, {count}):
            raise CheckpointError(
                f"{file} has {name} of {layer} with {count} numbers; expected {sorted(lengths[name])}. It is "
                "damaged or made for another model: download it again, or choose another file."
            )


def check_numbers(layer: str, tensors: Layer, file: str) -> None:
    """Raise CheckpointError where one is infinite or none, which would make every picture black."""
    for name, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            raise CheckpointError(
                f"{file} has infinite numbers, or none (NaN), in {name} of {layer}. Its training failed, or "
                "it is damaged: download it again, or choose another file."
            )


def canonical(
    tensors: Layer, layer: str, kind: Kind, size: tuple[int, int], scaling: Scaling, sd_scripts: bool
) -> Layer:
    """The tensors with alpha such that the scale is alpha / rank, and none where that changes nothing.

    What a constraint of OFT does is done here, since ComfyUI takes its alpha for something else. ``size`` is
    (rows, columns) of the weight, ``layer`` its name in the file.
    """
    result = {name: _flat(name, tensor) for name, tensor in tensors.items()}
    if "dora_scale" in result:
        # PEFT's has one dimension. A square weight's could be of rows or columns: rows, as all write by now.
        magnitude = result["dora_scale"]
        of_rows = magnitude.ndim == 1 or magnitude.shape[0] == size[0]
        result["dora_scale"] = magnitude.reshape((-1, 1) if of_rows else (1, -1))
    if "alpha" in result:
        result["alpha"] = result["alpha"].float().reshape(())
    if "oft_blocks" in result:
        return _without_constraint(result, size[0])
    if "oft_R.weight" in result:
        result.pop("alpha", None)
        return (
            result if scaling.oft_terms == TERMS else {**result, "oft_terms": torch.tensor(scaling.oft_terms)}
        )
    if "alpha" not in result:
        scale = scaling.scale(layer, kind.rank, sd_scripts)
        if scale is not None and kind.rank is not None:
            result["alpha"] = torch.tensor(scale * kind.rank)
        elif scale is not None and scaling.peft_lokr and "lokr_w1" in result:
            result["lokr_w1"] = result["lokr_w1"].float() * scale
    return result


def _flat(name: str, tensor: Tensor) -> Tensor:
    """A 1 x 1 convolution's matrix as a linear's; ComfyUI wants Tucker cores as they are."""
    core = name in ("lora_mid.weight", "hada_t1", "hada_t2", "lokr_t2")
    return tensor.flatten(1) if tensor.ndim == 4 and not core else tensor


def _without_constraint(layer: Layer, rows: int) -> Layer:
    blocks = layer["oft_blocks"].float()
    skew = constrained(blocks, layer, rows)
    rest = {name: tensor for name, tensor in layer.items() if name != "alpha"}
    plain = torch.equal(skew, blocks - blocks.transpose(1, 2))
    return rest if plain else {**rest, "oft_blocks": skew / 2}
