"""mxfp8 and nvfp4 under ComfyUI: unpacked by us where the GPU does not multiply them, else ComfyUI's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

LAYER = "transformer_blocks.0.attn.img_qkv"
CPU = torch.device("cpu")


@pytest.fixture(params=["mxfp8", "nvfp4"])
def model(request, host):
    loaded, *_ = host.run(
        "LensModelLoader",
        model_name="lens_tiny_bf16.safetensors",
        dtype="bfloat16",
        quantization=request.param,
    )
    return loaded


@pytest.fixture
def layer(model):
    return model.model.diffusion_model.get_submodule(LAYER)


@pytest.fixture
def dequantized(host, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Weights that comfy-kitchen unpacks."""
    tensor = host.module("nodes.host.quantized").QuantizedTensor
    theirs, seen = tensor.dequantize, []

    def note(weight):
        seen.append(weight)
        return theirs(weight)

    monkeypatch.setattr(tensor, "dequantize", note)
    return seen


def inputs(layer):
    """In the dtype that the layer computes in, which ComfyUI chooses on a CPU."""
    x = torch.randn(1, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    return x.to(layer.weight.dtype)


def test_a_picture_asks_comfy_kitchen_for_nothing(model, draw, dequantized):
    assert draw(model=model)["samples"].isfinite().all()
    assert dequantized == []


def test_a_weight_from_elsewhere_is_unpacked_by_us_too(layer, dequantized):
    """ComfyUI brings it, still quantised: the same product."""
    x = inputs(layer)
    there = layer(x)
    assert torch.equal(layer.forward_comfy_cast_weights(x), there)
    assert dequantized == []
    want = x.double() @ layer.weight.dequantize().double().T + layer.bias.double()
    assert (there.double() - want).norm() < 1e-6 * want.norm(), "of 128 products in fp32"


def test_the_tensors_are_those_of_lens_core(host, layer):
    """Bytes of scales, which are no numbers to PyTorch's comparisons."""
    here = host.module("nodes.host.quantized")
    packed, form = here.packed_of(layer.weight, layer.form), layer.form
    assert packed.form is form and packed.rows == layer.out_features
    assert packed.scale.dtype == (torch.uint8 if form.name == "mxfp8" else torch.float8_e4m3fn)
    assert (packed.zero is None) is (form.name == "mxfp8")
    quant = host.module("lens_core.quant.linear")
    assert layer.weight.dtype == torch.float32
    assert torch.equal(quant.unpack(packed, torch.float32), layer.weight.dequantize())


def test_products_stay_comfyuis_where_the_gpu_has_them(host, layer, dequantized, monkeypatch):
    here = host.module("nodes.host.quantized")
    assert here.at_hand(layer, CPU) and here.form_of(layer).inputs is None
    asked = []
    monkeypatch.setattr(here.kitchen, "multiplies", lambda *call: asked.append(call) or True)
    assert not here.at_hand(layer, CPU)
    assert asked == [(layer.form, CPU)]
    x = inputs(layer)
    assert layer._forward(x, layer.weight, layer.bias.to(x.dtype)).isfinite().all()
    assert len(dequantized) == 1, "by comfy-kitchen's dispatch"


def test_gradients_of_inputs_pass_through(layer):
    with torch.inference_mode(False), torch.enable_grad():
        x = inputs(layer).requires_grad_()
        layer(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
