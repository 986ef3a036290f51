"""A linear whose weight is quantised, and putting such ones in a denoiser's place for them.

The packed tensors are ordinary parameters under the names of ComfyUI's files, so they move, save and load as
any others do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from .kernels import Inputs, choose_linear
from .kernels.linear import linear
from .quant import linear as definitions
from .quant import policy
from .quant.layer_format import SCALES, LayerFormat, to_json
from .quant.linear import Packed


class QuantizedLinear(nn.Module):
    """torch.nn.Linear over a packed weight; inputs may come quantised already."""

    def __init__(
        self, packed: Packed, bias: nn.Parameter | None, in_features: int, out_features: int
    ) -> None:
        super().__init__()
        self.form = packed.form
        self._names = ("weight", *SCALES[packed.form.name])
        self.in_features, self.out_features = in_features, out_features
        for name, tensor in tensors_of(packed).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", bias)
        self.register_buffer("comfy_quant", to_json(packed.form))

    def packed(self) -> Packed:
        """The weight."""
        return Packed(self.form, *[cast(Tensor, self._parameters[name]) for name in self._names])

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in ``dtype``."""
        return definitions.dequantize(self.packed(), dtype)

    def forward(self, x: Inputs) -> Tensor:
        bias = self._parameters["bias"]
        return linear(x, self.packed(), bias, choose_linear(x.device, x.dtype))


def tensors_of(packed: Packed) -> dict[str, Tensor]:
    """A packed weight's tensors under the names that a layer gives them."""
    tensors = (packed.values, packed.scale, packed.zero)
    names = ("weight", *SCALES[packed.form.name])
    return {name: cast(Tensor, tensor) for name, tensor in zip(names, tensors, strict=False)}


def form_of(layer: nn.Module) -> LayerFormat | None:
    """How a linear is quantised, if it is."""
    return layer.form if isinstance(layer, QuantizedLinear) else None


def replace_linears(model: nn.Module, packed: Mapping[str, Packed]) -> None:
    """Put quantised linears in the places of these names."""
    for name, weight in packed.items():
        layer = cast(nn.Linear, model.get_submodule(name))
        put = QuantizedLinear(weight, layer.bias, layer.in_features, layer.out_features)
        model.set_submodule(name, put)


def linear_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Outputs and inputs (N, K) of each of torch's linears by name."""
    layers = model.named_modules()
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in layers
        if isinstance(layer, nn.Linear)
    }


def quantize_denoiser(model: nn.Module, mode: str, device: torch.device | str | None = None) -> None:
    """Quantise in place what the policy allows, on ``device`` (None: where each weight is)."""
    wanted = policy.MODES[mode]
    for name, size in linear_sizes(model).items():
        if policy.quantizes(name, size, wanted):
            weight = cast(Tensor, model.get_submodule(name).weight).detach()
            replace_linears(model, {name: policy.pack(weight, wanted, device)})
