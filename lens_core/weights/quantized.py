"""Quantised layers of a denoiser's file: which there are, in which format, and their way into a module.

ComfyUI's files (``comfy_quant`` beside a weight, or in the file's metadata), its older ones with a scale
beside 8-bit floats, SDNQ's folders, and GGUF. Read from the header and the few bytes that name the formats.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quant.layer_format import AFFINE, SCALES, LayerFormat, affine4, float8, from_json, to_json
from ..quant.linear import Packed
from ..quantized import tensors_of
from .gguf import GgufCheckpoint
from .gguf_linear import TYPES, gguf_layers, repack
from .loader import AnyCheckpoint, Part, Shape, Source, Stored
from .tensor_info import DTYPES

log = logging.getLogger(__name__)
_DTYPES = {
    "float8_e4m3fn": ("F8_E4M3",),
    "float8_e5m2": ("F8_E5M2",),
    "int8_tensorwise": ("I8",),
    "convrot_w4a4": ("I8", "U8"),
    "mxfp8": ("F8_E4M3",),
    "nvfp4": ("U8",),
    AFFINE: ("U8",),
}
# What other programs' files have beside a quantised weight; scales of inputs are found from these anew.
UNUSED = (r"\.input_scale$", r"\.scale_input$", r"^scaled_fp8$")
_MODULATION = re.compile(r"\.(?:img|txt)_mod\.1$")


@dataclass(frozen=True)
class QuantizedPart:
    """One linear: its packed tensors, without memory yet, and how they are made from the file's."""

    packed: Packed
    stored: tuple[Stored, ...]
    make: Callable[[Sequence[Source]], Packed]

    def part(self, layer: str) -> Part:
        """As ``load_into`` wants it; the format that is written beside the weight is this one's."""

        def make(sources: Sequence[Source], dtype: torch.dtype | None) -> Sequence[Tensor]:
            packed = self.make(sources)._replace(form=self.packed.form)
            return [*tensors_of(packed).values(), to_json(packed.form)]

        names = (*tensors_of(self.packed), "comfy_quant")
        return Part(self.stored, tuple(f"{layer}.{name}" for name in names), make)

    def dynamic(self, on: bool) -> QuantizedPart:
        """The same with inputs quantised or not."""
        return replace(self, packed=self.packed._replace(form=self.packed.form.dynamic(on)))


def stored_layers(
    checkpoint: AnyCheckpoint, source: Mapping[str, str], sizes: Mapping[str, Shape]
) -> dict[str, QuantizedPart]:
    """The quantised linears of a file by name; none in one that is not quantised.

    ``source`` gives each tensor's name in the file, ``sizes`` the linears' [N, K].
    """
    if isinstance(checkpoint, GgufCheckpoint):
        return _gguf(checkpoint, source, sizes)
    layers = _comfy(checkpoint, source, sizes) or _scaled(checkpoint, source, sizes)
    layers = layers or _sdnq(checkpoint, source, sizes)
    forms = {name: part.packed.form for name, part in layers.items()}
    warn_coarse(checkpoint, {name: (form.bits, form.name) for name, form in forms.items()})
    return layers


def _comfy(
    checkpoint: Any, source: Mapping[str, str], sizes: Mapping[str, Shape]
) -> dict[str, QuantizedPart]:
    forms = {
        name.removesuffix(".comfy_quant"): from_json(checkpoint.read(stored), name)
        for name, stored in source.items()
        if name.endswith(".comfy_quant")
    }
    beside = set(forms)
    for name, form in _from_metadata(checkpoint).items():
        forms.setdefault(name, form)
    return {
        name: _as_they_are(checkpoint, source, sizes, name, form, name in beside)
        for name, form in forms.items()
    }


def _from_metadata(checkpoint: Any) -> dict[str, LayerFormat]:
    """Formats of layers that the file's metadata tell of."""
    text = checkpoint.metadata.get("_quantization_metadata")
    if text is None:
        return {}
    try:
        layers = dict(json.loads(text)["layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.name} says in its metadata that it is quantised, but not how ({error}). Download "
            "it again."
        ) from error
    return {
        re.sub(r"^(?:model\.diffusion_model|diffusion_model)\.", "", name): from_json(_bytes(entry), name)
        for name, entry in layers.items()
    }


def _bytes(entry: Any) -> Tensor:
    return torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)


def _as_they_are(
    checkpoint: Any,
    source: Mapping[str, str],
    sizes: Mapping[str, Shape],
    layer: str,
    form: LayerFormat,
    beside: bool,
    names: Sequence[str] = (),
) -> QuantizedPart:
    """A layer whose tensors are the module's own; ``names`` where the file calls them otherwise."""
    names = names or ("weight", *SCALES[form.name])
    rows, columns = _size(checkpoint, sizes, layer)
    infos = []
    for name in names:
        if f"{layer}.{name}" not in source:
            raise CheckpointError(
                f"{checkpoint.name} has no {layer}.{name}, without which a weight in {form.name} cannot be "
                "read. Download it again."
            )
        infos.append(checkpoint.header[source[f"{layer}.{name}"]])
    shapes = ((rows, columns * form.bits // 8),)
    meta = [
        torch.empty(info.shape, dtype=DTYPES.get(info.dtype, torch.uint8), device="meta") for info in infos
    ]
    stored = [Stored(f"{layer}.{name}", (), (info.dtype,)) for name, info in zip(names, infos, strict=True)]
    stored[0] = Stored(f"{layer}.weight", shapes, _DTYPES[form.name])
    if beside:
        stored.append(Stored(f"{layer}.comfy_quant", (), ("U8",)))

    def make(sources: Sequence[Source]) -> Packed:
        tensors = [source.read(None) for source in sources[: len(names)]]
        return Packed(form, *(_known(tensor) for tensor in tensors))

    return QuantizedPart(Packed(form, *meta), tuple(stored), make)


def _known(tensor: Tensor) -> Tensor:
    """Scales of eight exponent bits as bytes, which is how they are kept."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor


def _scaled(
    checkpoint: Any, source: Mapping[str, str], sizes: Mapping[str, Shape]
) -> dict[str, QuantizedPart]:
    """ComfyUI's older files: ``scale_weight`` beside 8-bit floats; two numbers in ``scaled_fp8`` mean that
    inputs stay as they are."""
    layers = [name.removesuffix(".scale_weight") for name in source if name.endswith(".scale_weight")]
    mark = checkpoint.header.get(source.get("scaled_fp8", ""))
    form = float8.dynamic(mark is None or mark.shape != (2,))
    names = ("weight", "scale_weight")
    return {name: _as_they_are(checkpoint, source, sizes, name, form, False, names) for name in layers}


def _sdnq(checkpoint: Any, source: Mapping[str, str], sizes: Mapping[str, Shape]) -> dict[str, QuantizedPart]:
    """SDNQ's uint4: ``scale`` and ``zero_point`` of groups; ``weight`` may be a flat row of bytes."""
    layers = [name.removesuffix(".zero_point") for name in source if name.endswith(".zero_point")]
    return {name: _sdnq_layer(checkpoint, source, sizes, name) for name in layers}


def _sdnq_layer(
    checkpoint: Any, source: Mapping[str, str], sizes: Mapping[str, Shape], layer: str
) -> QuantizedPart:
    rows, columns = _size(checkpoint, sizes, layer)
    weight, scale = (checkpoint.header.get(source.get(f"{layer}.{name}", "")) for name in ("weight", "scale"))
    fits = weight is not None and scale is not None and scale.shape[0] == rows and weight.dtype == "U8"
    groups = 1 if not fits or len(scale.shape) < 2 else scale.shape[1]
    if not fits or columns % groups or torch.Size(weight.shape).numel() * 2 != rows * columns:
        raise CheckpointError(
            f"{layer} of {checkpoint.name} is quantised by SDNQ in a way that this version does not read; "
            "it reads uint4 with a scale and a zero point for each group. Choose another file."
        )
    form = replace(affine4, group=columns // groups)
    dtype = DTYPES[scale.dtype]
    shapes = ((rows * columns // 2,), (rows, columns // 2), (rows, groups, columns // groups // 2))
    stored = (
        Stored(f"{layer}.weight", shapes, ("U8",)),
        Stored(f"{layer}.scale", (scale.shape,)),
        Stored(f"{layer}.zero_point", (scale.shape,)),
    )
    meta = [
        torch.empty(rows, columns // 2, dtype=torch.uint8, device="meta"),
        *(torch.empty(rows, groups, dtype=dtype, device="meta") for _ in range(2)),
    ]

    def make(sources: Sequence[Source]) -> Packed:
        values, scale, zero = (source.read(None) for source in sources)
        return Packed(
            form, values.view(rows, columns // 2), scale.view(rows, groups), zero.view(rows, groups).to(dtype)
        )

    return QuantizedPart(Packed(form, *meta), stored, make)


def _gguf(
    checkpoint: GgufCheckpoint, source: Mapping[str, str], sizes: Mapping[str, Shape]
) -> dict[str, QuantizedPart]:
    found = gguf_layers(checkpoint, source)
    warn_coarse(checkpoint, {name: (TYPES[kind].bits, kind) for name, (_, kind) in found.items()})
    return {name: _gguf_layer(checkpoint, sizes, name, form, kind) for name, (form, kind) in found.items()}


def _gguf_layer(
    checkpoint: GgufCheckpoint, sizes: Mapping[str, Shape], layer: str, form: LayerFormat, kind: str
) -> QuantizedPart:
    rows, columns = _size(checkpoint, sizes, layer)
    scale = torch.empty(rows, columns // form.group, device="meta")
    values = torch.empty(rows, columns * form.bits // 8, dtype=torch.uint8, device="meta")
    stored = (Stored(f"{layer}.weight", ((rows, columns),), (kind,)),)
    return QuantizedPart(Packed(form, values, scale, scale), stored, lambda sources: repack(sources[0].info))


def _size(checkpoint: AnyCheckpoint, sizes: Mapping[str, Shape], layer: str) -> Shape:
    if layer not in sizes:
        raise CheckpointError(
            f"{checkpoint.name} has a quantised layer {layer}, which Lens has not. Choose a file for Lens."
        )
    return sizes[layer]


def warn_coarse(checkpoint: AnyCheckpoint, bits: Mapping[str, tuple[int, str]]) -> list[str]:
    """Modulation layers below 8 bits, of layers with their bits and what their format is called; warns of
    them."""
    coarse = [name for name, (count, _) in bits.items() if _MODULATION.search(name) and count < 8]
    if coarse:
        log.warning(
            "%s: %d modulation layers have fewer than 8 bits (the first is %s in %s). They set shift, scale "
            "and gate of every token, and so coarse they can put a grid on pictures; choose a file that has "
            "them in 8 bits or more, such as q8_0.",
            checkpoint.name,
            len(coarse),
            coarse[0],
            bits[coarse[0]][1],
        )
    return coarse
