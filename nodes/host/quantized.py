"""Quantised linears under ComfyUI: its own quantised tensors, through lens_core's kernels.

Weights are comfy-kitchen's QuantizedTensor in the layers that ComfyUI makes for mixed precision, so LoRA,
partial loading, dynamic VRAM and saving are ComfyUI's. Only the product is ours, and one layout: 4- and 8-bit
integers with a scale and a zero point for each group, which ComfyUI has not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import torch
from comfy_kitchen.tensor import BaseLayoutParams
from torch import Tensor, nn

from ...lens_core.kernels import Inputs, choose_linear
from ...lens_core.kernels.linear import linear
from ...lens_core.quant import kitchen
from ...lens_core.quant import linear as definitions
from ...lens_core.quant.layer_format import AFFINE, LayerFormat, from_json, to_json
from ...lens_core.quant.linear import Packed, QuantizedRows

_AFFINE_LAYOUT = "LensAffineLayout"
QuantizedTensor = comfy.quant_ops.QuantizedTensor


class AffineLayout(comfy.quant_ops.QuantizedLayout):
    """``lens_affine`` (see ``lens_core.quant.layer_format``) as one of comfy-kitchen's layouts."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """``scale`` and ``zero`` are [N, K / group]."""

        zero: Tensor
        bits: int = 4
        group: int = 64

        def _tensor_fields(self) -> list[str]:
            return ["scale", "zero"]

    @classmethod
    def quantize(
        cls, tensor: Tensor, bits: int = 4, group: int = 64, stochastic_rounding: int | None = 0, **_: Any
    ) -> tuple[Tensor, Params]:
        """[N, K] anew; with ``stochastic_rounding``, a seed, so that the mean of small changes stays."""
        form = LayerFormat(AFFINE, bits, group)
        packed = definitions.quantize(tensor, form, seed=stochastic_rounding or None)
        return packed.values, cls.Params(
            packed.scale, tensor.dtype, tuple(tensor.shape), packed.zero, bits, group
        )

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        """[N, K] in the dtype that it had."""
        form = LayerFormat(AFFINE, params.bits, params.group)
        return definitions.unpack(Packed(form, qdata, params.scale, params.zero), params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Bytes, scales and zero points."""
        return qtensor._qdata, qtensor._params.scale, qtensor._params.zero

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Params) -> dict[str, Tensor]:
        """By what their names have after ``weight``."""
        return {"": qdata, "_scale": params.scale, "_zero": params.zero}

    @classmethod
    def requantize_kwargs(cls, qtensor: Any) -> dict[str, Any]:
        """What a changed weight is quantised with again."""
        return {"bits": qtensor._params.bits, "group": qtensor._params.group}


comfy.quant_ops.register_layout_class(_AFFINE_LAYOUT, AffineLayout)


def operations(dtype: torch.dtype) -> Any:
    """ComfyUI's operations for a model in ``dtype`` of which some linears are quantised."""
    mixed = comfy.ops.mixed_precision_ops(compute_dtype=dtype)

    class Linear(_QuantizedLinear, mixed.Linear):
        pass

    class Operations(mixed):
        pass

    Operations.Linear = Linear
    return Operations


class _QuantizedLinear:
    """What is ours in a linear of ComfyUI's mixed precision."""

    form: LayerFormat | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factory_kwargs["device"] = None  # weights stay where they come from; without memory until then

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        raw = state_dict.get(f"{prefix}comfy_quant")
        self.form = None if raw is None else from_json(raw, prefix.rstrip("."))
        if self.form is None or self.form.name != AFFINE:
            super()._load_from_state_dict(state_dict, prefix, *rest)
        else:
            self._load_affine(state_dict, prefix, *rest)
        # Where ComfyUI computes and not we (a LoRA in bypass mode, say), inputs are not quantised: its fp8
        # inputs would have one fixed scale.
        self._full_precision_mm = self.form is not None and not kitchen.has(self.form)

    def _load_affine(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        names = ("weight", "weight_scale", "weight_zero", "comfy_quant")
        values, scale, zero, _ = (state_dict.pop(prefix + name) for name in names)
        dtype, shape = self.factory_kwargs["dtype"], self._orig_shape
        params = AffineLayout.Params(scale, dtype, shape, zero, self.form.bits, self.form.group)
        weight = QuantizedTensor(values, _AFFINE_LAYOUT, params)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.quant_format, self.layout_type = AFFINE, _AFFINE_LAYOUT
        missing = rest[2]
        nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)
        if f"{prefix}weight" in missing:
            missing.remove(f"{prefix}weight")

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", **kwargs: Any) -> Any:
        """ComfyUI's, with all that the format's own entry says."""
        out = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        if self.form is not None:
            out[f"{prefix}comfy_quant"] = to_json(self.form)
        return out

    def forward(self, x: Inputs, *args: Any, **kwargs: Any) -> Tensor:
        """[B, T, N] of [B, T, K]; straight where the weight is at hand as it is stored."""
        if isinstance(x, QuantizedRows):
            if at_hand(self, x.device):
                return self._forward(x, self.weight, self.bias)
            return self.forward_comfy_cast_weights(x, x.dtype, want_requant=True)
        if x.requires_grad or not at_hand(self, x.device) or not x.is_floating_point():
            if self.form is not None and kitchen.has(self.form):
                self._full_precision_mm = not kitchen.multiplies(self.form, x.device)
            return super().forward(x, *args, **kwargs)
        comfy.ops.run_every_op()
        return self._forward(x, self.weight, self.bias)

    def _forward(self, x: Inputs, weight: Any, bias: Tensor | None) -> Tensor:
        if not isinstance(weight, QuantizedTensor) or kitchen.multiplies(self.form, x.device):
            return super()._forward(definitions.as_tensor(x), weight, bias)
        return linear(x, packed_of(weight, self.form), bias, choose_linear(x.device, x.dtype))


def free_for_models(device: torch.device) -> int | None:
    """Bytes of GPU memory that ComfyUI can give a model, all others unloaded; None without a GPU."""
    management = comfy.model_management
    if device.type in ("cpu", "mps"):
        return None
    # The page asks in a thread of its own, while models come and go.
    loaded = [entry.model for entry in list(management.current_loaded_models) if entry.device == device]
    sizes = (patcher.loaded_size() for patcher in loaded if patcher is not None)
    return management.get_free_memory(device) + sum(sizes)


def packed_of(weight: Any, form: LayerFormat) -> Packed:
    """A weight's tensors as lens_core has them."""
    if kitchen.has(form):
        return kitchen.packed_of(weight, form)
    params = weight._params
    return Packed(form, weight._qdata, params.scale, getattr(params, "zero", None))


def form_of(layer: Any) -> LayerFormat | None:
    """How a linear is quantised, if it computes with its weight as that is stored, and here.

    Not one whose forward another node has replaced, or whose weight is computed anew in each step.
    """
    form = getattr(layer, "form", None)
    if form is None or "forward" in vars(layer):
        return None
    return None if layer.weight_function or layer.bias_function else form


def at_hand(layer: Any, device: torch.device) -> bool:
    """Whether a linear's quantised weight lies on ``device`` as it is to be used; not in a format whose
    products are ComfyUI's there."""
    form = form_of(layer)
    if form is None:  # another node's layer need not even have a weight
        return False
    weight, bias = layer.weight, layer.bias
    if not isinstance(weight, QuantizedTensor) or weight.device != device or kitchen.multiplies(form, device):
        return False
    return bias is None or bias.device == device
