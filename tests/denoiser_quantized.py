"""Writes the tiny denoiser as other programs write quantised ones, and tells what its numbers are then.

Independent of the loaders: comfy-kitchen quantises ComfyUI's formats and says what they stand for; of SDNQ's
uint4 there is the formula here. GGUFs are ``denoiser_gguf``'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lens_core.config import DenoiserConfig
from lens_core.tiny import models
from tests.denoiser_gguf import tiny_weights


@dataclass(frozen=True)
class Comfy:
    """A format of ComfyUI's: what ``comfy_quant`` says, comfy-kitchen's layout and arguments for it, and what
    must divide a weight's outputs and inputs."""

    entry: dict[str, Any]
    layout: str
    divides: tuple[int, int] = (1, 1)
    arguments: dict[str, Any] = field(default_factory=dict)


_TURNED = {"convrot": True, "convrot_groupsize": 64}
COMFY = {
    "float8_e4m3fn": Comfy({"format": "float8_e4m3fn"}, "TensorCoreFP8Layout"),
    "float8_e5m2": Comfy(
        {"format": "float8_e5m2"}, "TensorCoreFP8Layout", arguments={"dtype": torch.float8_e5m2}
    ),
    "int8_tensorwise": Comfy({"format": "int8_tensorwise"}, "TensorWiseINT8Layout"),
    "int8 by row": Comfy(
        {"format": "int8_tensorwise"}, "TensorWiseINT8Layout", arguments={"per_channel": True}
    ),
    "int8 turned": Comfy(
        {"format": "int8_tensorwise", **_TURNED},
        "TensorWiseINT8Layout",
        (1, 64),
        {"per_channel": True, **_TURNED},
    ),
    "int8 turned, as params": Comfy(
        {"format": "int8_tensorwise", "params": _TURNED},
        "TensorWiseINT8Layout",
        (1, 64),
        {"per_channel": True, **_TURNED},
    ),
    "convrot_w4a4": Comfy(
        {"format": "convrot_w4a4", "convrot_groupsize": 64},
        "TensorCoreConvRotW4A4Layout",
        (1, 64),
        {"convrot_groupsize": 64},
    ),
    "mxfp8": Comfy({"format": "mxfp8"}, "TensorCoreMXFP8Layout", (32, 32)),
    "nvfp4": Comfy({"format": "nvfp4"}, "TensorCoreNVFP4Layout", (16, 16)),
}


@dataclass(frozen=True)
class Written:
    """fp32 values by name, without prefix, and the layers that are quantised."""

    values: dict[str, Tensor]
    layers: list[str]


@dataclass
class _File:
    """What will be in a file; plain tensors are bf16, as published ones are."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)

    def plain(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor.bfloat16()
        self.values[name] = self.tensors[name].float()

    def quantized(self, layer: str, tensors: dict[str, Tensor], value: Tensor) -> None:
        self.tensors |= {f"{layer}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        self.values[f"{layer}.weight"] = value
        self.layers.append(layer)

    def save(self, path: Path, prefix: str = "", metadata: dict[str, str] | None = None) -> Written:
        save_file({prefix + name: tensor for name, tensor in self.tensors.items()}, path, metadata)
        return Written(self.values, self.layers)


def tiny_config() -> DenoiserConfig:
    """The sizes of all these files."""
    return models.DENOISER


def in_blocks(layer: str) -> bool:
    """The layers that published files quantise: the products of the blocks."""
    return layer.startswith("transformer_blocks.") and not is_modulation(layer)


def is_modulation(layer: str) -> bool:
    """Whether a layer sets shift, scale and gate."""
    return layer.endswith("_mod.1")


def _of(weights: dict[str, Tensor], wanted: Callable[[str, Tensor], bool]) -> tuple[_File, dict[str, Tensor]]:
    """A file with all tensors but the weights that are ``wanted`` quantised, and those."""
    file, left = _File(), {}
    for name, tensor in weights.items():
        layer = name.removesuffix(".weight")
        if tensor.ndim == 2 and layer != name and wanted(layer, tensor):
            left[layer] = tensor
        else:
            file.plain(name, tensor)
    return file, left


def write_comfy(
    path: Path,
    kind: str,
    *,
    which: Callable[[str], bool] = in_blocks,
    prefix: str = "",
    in_metadata: bool = False,
    input_scale: bool = False,
    entry: dict[str, Any] | None = None,
    change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
) -> Written:
    """The tiny denoiser with the layers of ``which`` in a format of ``COMFY``.

    ``in_metadata``: the formats are told there and not beside the weights; ``entry`` is said of each besides;
    ``change`` edits the tensors, without prefix, before they are written.
    """
    form = COMFY[kind]
    outputs, inputs = form.divides

    def wanted(layer: str, weight: Tensor) -> bool:
        return which(layer) and weight.shape[0] % outputs == 0 and weight.shape[1] % inputs == 0

    file, weights = _of(tiny_weights(), wanted)
    said = json.dumps({**form.entry, **(entry or {})})
    for layer, weight in weights.items():
        tensors, value = quantize_comfy(weight, form)
        if not in_metadata:
            tensors["comfy_quant"] = torch.tensor(list(said.encode()), dtype=torch.uint8)
        if input_scale:
            tensors["input_scale"] = torch.tensor(0.25)
        file.quantized(layer, tensors, value)
    change(file.tensors)
    layers = {prefix + layer: json.loads(said) for layer in file.layers}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return file.save(path, prefix, metadata if in_metadata else None)


def quantize_comfy(weight: Tensor, form: Comfy) -> tuple[dict[str, Tensor], Tensor]:
    """comfy-kitchen's tensors under the names that a layer gives them, and the fp32 weight they stand for."""
    import comfy_kitchen.tensor

    layout = getattr(comfy_kitchen.tensor, form.layout)  # and not what ComfyUI has put in its place
    arguments = dict(form.arguments)
    if form.layout == "TensorCoreFP8Layout":
        # From the largest weight, as scripts that make such files have it.
        dtype = arguments.setdefault("dtype", torch.float8_e4m3fn)
        arguments["scale"] = weight.abs().max() / torch.finfo(dtype).max
    values, params = layout.quantize(weight.contiguous(), **arguments)
    tensors = layout.state_dict_tensors(values, params)
    return {f"weight{name}": tensor for name, tensor in tensors.items()}, layout.dequantize(values, params)


def write_scaled(
    path: Path, *, mark: int = 0, dtype: torch.dtype = torch.float8_e4m3fn, prefix: str = ""
) -> Written:
    """The older layout: ``scale_weight`` and ``scale_input`` beside 8-bit floats, and a tensor ``scaled_fp8``
    of ``mark`` numbers, which are 8-bit floats too."""
    file, weights = _of(tiny_weights(), lambda layer, _: in_blocks(layer))
    for layer, weight in weights.items():
        scale = weight.abs().max() / torch.finfo(dtype).max
        numbers = (weight / scale).to(dtype)
        tensors = {"weight": numbers, "scale_weight": scale, "scale_input": torch.tensor(1.0)}
        file.quantized(layer, tensors, numbers.float() * scale)
    file.tensors["scaled_fp8"] = torch.zeros(mark, dtype=dtype)
    return file.save(path, prefix)


def write_unscaled(path: Path, dtype: torch.dtype = torch.float8_e4m3fn, *, prefix: str = "") -> Written:
    """All tensors, vectors too, as 8-bit floats that are the weights themselves."""
    file = _File()
    for name, tensor in tiny_weights().items():
        file.tensors[name] = tensor.to(dtype)
        file.values[name] = file.tensors[name].float()
    return file.save(path, prefix)


def write_sdnq(
    folder: Path,
    *,
    which: Callable[[str], bool] = in_blocks,
    scales: torch.dtype = torch.bfloat16,
    group: int = 64,
    flat: bool = True,
    config: dict[str, Any] | None = None,
    change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
) -> Written:
    """A folder as SDNQ saves a pipeline, of which only the denoiser is there: ``which`` layers in uint4, as
    far as their inputs are whole groups; ``config`` changes what config.json says of the quantisation."""
    file, weights = _of(tiny_weights(), lambda layer, weight: which(layer) and weight.shape[1] % group == 0)
    for layer, weight in weights.items():
        file.quantized(layer, *quantize_sdnq(weight, group, scales, flat))
    change(file.tensors)
    settings = {"quant_method": "sdnq", "weights_dtype": "uint4", "group_size": 0, "use_hadamard": False}
    below = folder / "transformer"
    below.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "LensPipeline"}), encoding="utf-8")
    about = {"_class_name": "LensTransformer2DModel", "quantization_config": {**settings, **(config or {})}}
    (below / "config.json").write_text(json.dumps(about), encoding="utf-8")
    return file.save(below / "diffusion_pytorch_model.safetensors")


def quantize_sdnq(
    weight: Tensor, group: int, scales: torch.dtype, flat: bool = True
) -> tuple[dict[str, Tensor], Tensor]:
    """uint4 from each group's smallest to its largest: what sdnq 0.2.8 writes, byte by byte, with ``scales``
    in bf16 (its dequantize_fp32 off) or fp32; and the fp32 weight."""
    groups = weight.float().unflatten(-1, (-1, group))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale, zero = ((high - low) / 15).to(scales), low.to(scales)
    numbers = ((groups - zero) / scale).round().clamp(0, 15)
    integers = numbers.to(torch.uint8).flatten()
    packed = integers[0::2] | integers[1::2] << 4
    tensors = {"weight": packed if flat else packed.view(len(weight), -1), "scale": scale, "zero_point": zero}
    return tensors, (numbers * scale.float() + zero.float()).flatten(-2)
