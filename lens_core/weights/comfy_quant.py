"""Quantised layers of ComfyUI's files: as each says beside its weight or in the metadata, as older files have
them with a scale beside 8-bit floats, and 8-bit floats without any scale.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quant import kitchen, policy
from ..quant.layer_format import AFFINE, SCALES, LayerFormat, float8, from_entry, from_json
from ..quant.linear import Packed
from .keymap import DENOISER, owner, rename
from .loader import Shape, Source, Stored
from .quantized_part import NUMBERS, Linears, QuantizedPart
from .tensor_info import DTYPES

_FLOAT8 = {"F8_E4M3": float8, "F8_E5M2": LayerFormat("float8_e5m2", 8)}
# Of the weight's tensors, and of scales where they are bytes.
_WEIGHTS = {
    "float8_e4m3fn": (torch.float8_e4m3fn, ("F8_E4M3",)),
    "float8_e5m2": (torch.float8_e5m2, ("F8_E5M2",)),
    "int8_tensorwise": (torch.int8, ("I8",)),
    "convrot_w4a4": (torch.int8, ("I8", "U8")),
    "mxfp8": (torch.float8_e4m3fn, ("F8_E4M3",)),
    "nvfp4": (torch.uint8, ("U8",)),
    AFFINE: (torch.uint8, ("U8",)),
}
_SCALE_BYTES = {"mxfp8": ("F8_E8M0", "U8"), "nvfp4": ("F8_E4M3", "U8")}


@dataclass(frozen=True)
class _Kept:
    """A tensor of a layer: how the module holds it, and as what a file may have it."""

    shape: Shape
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]

    def empty(self) -> Tensor:
        """Without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def read(self, source: Source) -> Tensor:
        """Bytes stay those bytes, whatever they are called; scales become what they are held in."""
        tensor = source.read(None)
        same_bytes = tensor.element_size() == self.dtype.itemsize == 1
        return (tensor.view(self.dtype) if same_bytes else tensor.to(self.dtype)).view(self.shape)


def comfy_layers(linears: Linears) -> dict[str, QuantizedPart]:
    """Those that tell their format in ``comfy_quant``, or of which the metadata do."""
    checkpoint, source = linears.checkpoint, linears.source
    named = {layer: f"{layer} of {checkpoint.name}" for layer in linears.having("comfy_quant")}
    forms = {
        layer: from_json(checkpoint.read(source[f"{layer}.comfy_quant"]), name)
        for layer, name in named.items()
    }
    for layer in linears.having("pre_quant_scale"):
        raise CheckpointError(
            f"{checkpoint.name} wants the inputs of {layer} multiplied by a pre_quant_scale, which this "
            "version does not do. Choose another file."
        )
    told = _from_metadata(checkpoint)
    return {
        layer: _part(linears, layer, form, ("weight", *SCALES[form.name]), layer in named)
        for layer, form in {**forms, **told}.items()
    }


def _from_metadata(checkpoint: Any) -> dict[str, LayerFormat]:
    text = checkpoint.metadata.get("_quantization_metadata")
    if text is None:
        return {}
    try:
        layers = json.loads(text)["layers"]
        if not isinstance(layers, dict):
            raise TypeError("its layers are no JSON object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{checkpoint.name} says in its metadata that it is quantised, but not how ({error}). Download "
            "it again."
        ) from error
    own = [name for name in layers if owner(name) in ("", "denoiser")]
    return {
        layer: from_entry(layers[name], f"{layer} of {checkpoint.name}")
        for layer, name in rename(own, DENOISER, file=checkpoint.name).items()
    }


def scaled_layers(linears: Linears) -> dict[str, QuantizedPart]:
    """Of older files: ``scale_weight`` beside 8-bit floats, whose kind the weight itself tells; two numbers
    in ``scaled_fp8`` mean that inputs stay as they are."""
    mark = linears.info("scaled_fp8")
    dynamic = mark is None or mark.shape != (2,)
    layers = {}
    for layer in linears.having("scale_weight"):
        weight = linears.needed(layer, "weight", "8-bit floats")
        form = _FLOAT8.get(weight.dtype, float8).dynamic(dynamic)
        layers[layer] = _part(linears, layer, form, ("weight", "scale_weight"), False)
    return layers


def unscaled_layers(linears: Linears, others: Collection[str]) -> dict[str, QuantizedPart]:
    """8-bit floats that are the weights themselves, of layers that are quantised anyway and are not among the
    ``others``: held as they are, with 1 for a scale. Their inputs stay as they are: nobody asked for less."""
    layers = {}
    for layer, size in linears.sizes.items():
        weight = linears.info(f"{layer}.weight")
        if layer in others or not policy.is_quantized(layer) or weight is None or weight.shape != size:
            continue
        if weight.dtype in _FLOAT8:
            form = _FLOAT8[weight.dtype]
            kept = _weight(form, linears.size(layer))
            scale = torch.empty((), device="meta")
            stored = (Stored(f"{layer}.weight", kept.shapes, kept.dtypes),)
            make = partial(_with_scale_1, form=form, kept=kept)
            layers[layer] = QuantizedPart(Packed(form, kept.empty(), scale), stored, make, form.name)
    return layers


def _with_scale_1(sources: Sequence[Source], form: LayerFormat, kept: _Kept) -> Packed:
    return Packed(form, kept.read(sources[0]), torch.ones(()))


def _part(
    linears: Linears, layer: str, form: LayerFormat, names: Sequence[str], marked: bool
) -> QuantizedPart:
    """A layer in ``form`` whose tensors the file calls ``names``; ``marked``: it has ``comfy_quant`` too."""
    size = linears.size(layer)
    for group in filter(None, (form.group, form.rotation, 8 // form.bits)):
        if size[1] % group:
            raise CheckpointError(
                f"{linears.checkpoint.name} has {layer} in {form.name} with groups of {group}, which do not "
                f"divide its {size[1]} inputs. Choose another file."
            )
    infos = [linears.needed(layer, name, form.name) for name in names]
    kept = (_weight(form, size), *_scales(form, size, [(info.shape, info.dtype) for info in infos[1:]]))
    stored = [
        Stored(f"{layer}.{name}", tensor.shapes, tensor.dtypes)
        for name, tensor in zip(names, kept, strict=True)
    ]
    if marked:
        stored.append(Stored(f"{layer}.comfy_quant", (), ("U8",)))

    def make(sources: Sequence[Source]) -> Packed:
        return Packed(form, *(tensor.read(source) for tensor, source in zip(kept, sources, strict=False)))

    packed = Packed(form, *(tensor.empty() for tensor in kept))
    called = f"{form.bits} bits in groups of {form.group}" if form.name == AFFINE else form.name
    return QuantizedPart(packed, tuple(stored), make, called)


def _weight(form: LayerFormat, size: tuple[int, int]) -> _Kept:
    dtype, dtypes = _WEIGHTS[form.name]
    shape = (size[0], size[1] * form.bits // 8)
    return _Kept(shape, dtype, (shape,), dtypes)


def _scales(
    form: LayerFormat, size: tuple[int, int], found: Sequence[tuple[Shape, str]]
) -> tuple[_Kept, ...]:
    """What a format has beside the weight; ``found`` are the shapes and dtypes of the file."""
    rows, columns = size
    if kitchen.has(form):
        _, _, scale, *factor = kitchen.empty(size, form)
        shape = tuple(scale.shape)
        number = _Kept((), torch.float32, ((), (1,)), NUMBERS)
        of_groups = _Kept(shape, scale.dtype, (shape,), _SCALE_BYTES[form.name])
        return (of_groups,) if factor == [None] else (of_groups, number)
    if form.name == AFFINE:
        shape = (rows, columns // form.group)
        dtypes = [DTYPES[dtype] if dtype in NUMBERS else torch.float32 for _, dtype in found]
        return tuple(_Kept(shape, dtype, (shape,), NUMBERS) for dtype in dtypes)
    # One number for the weight, or one for each row, in the shape that comfy-kitchen gives them.
    shape = (rows,) if form.name == "convrot_w4a4" else (rows, 1)
    kept = () if found[0][0] in ((), (1,), (1, 1)) else shape
    return (_Kept(kept, torch.float32, ((), (1,), (1, 1), (rows,), (rows, 1)), NUMBERS),)
