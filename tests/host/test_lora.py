"""Stock LoRA nodes on our MODEL: the same as merging the weights by hand, and gone when removed."""

from __future__ import annotations

import pytest
import torch

from tests.compare import relative_l2
from tests.host.helpers import LORA_TARGETS, write_lora

# Weights patched in fp32, then the same forward. Measured: 2e-7 at most.
SAME = 1e-5


@pytest.mark.parametrize("strength", [0.7, -1.0])
def test_lora_equals_merged_weights(host, tiny, velocity, own_models, load_tiny, strength):
    merged, *_ = load_tiny()
    network = merged.model.diffusion_model
    deltas = write_lora(own_models / "loras" / "ours.safetensors", network, strength)
    for name, delta in deltas.items():
        layer = network.get_submodule(name)
        layer.weight = torch.nn.Parameter(layer.weight + delta, requires_grad=False)
    before = velocity(tiny.model)
    (patched,) = host.run(
        "LoraLoaderModelOnly", model=tiny.model, lora_name="ours.safetensors", strength_model=strength
    )
    assert len(patched.patches) == len(LORA_TARGETS), "a part of the LoRA found no layer"
    got, want = velocity(patched), velocity(merged)
    assert relative_l2(got, want) < SAME
    assert relative_l2(got, before) > 0.1, "the LoRA does nothing"
    assert torch.equal(velocity(tiny.model), before), "the LoRA stayed"


def test_lora_reaches_the_picture_and_leaves_it(host, tiny, draw, own_models):
    write_lora(own_models / "loras" / "picture.safetensors", tiny.model.model.diffusion_model, 1.0)
    before = draw()["samples"]
    (patched,) = host.run(
        "LoraLoaderModelOnly", model=tiny.model, lora_name="picture.safetensors", strength_model=1.0
    )
    assert relative_l2(draw(model=patched)["samples"], before) > 0.1
    assert torch.equal(draw()["samples"], before)


def test_two_loras_add_up(host, tiny, velocity, own_models):
    """Half and half of one LoRA is the whole of it, to fp32 rounding of the sums."""
    write_lora(own_models / "loras" / "half.safetensors", tiny.model.model.diffusion_model, 1.0)
    lora = {"lora_name": "half.safetensors"}
    (half,) = host.run("LoraLoaderModelOnly", model=tiny.model, strength_model=0.5, **lora)
    (both,) = host.run("LoraLoaderModelOnly", model=half, strength_model=0.5, **lora)
    (whole,) = host.run("LoraLoaderModelOnly", model=tiny.model, strength_model=1.0, **lora)
    assert relative_l2(velocity(both), velocity(whole)) < SAME


def test_our_model_and_comfyui_own_take_the_same_lora(host, tiny, velocity, own_models, stock_model):
    write_lora(own_models / "loras" / "shared.safetensors", tiny.model.model.diffusion_model, 1.0)
    results = []
    for model in (tiny.model, stock_model):
        (patched,) = host.run(
            "LoraLoaderModelOnly", model=model, lora_name="shared.safetensors", strength_model=1.0
        )
        results.append(velocity(patched))
    assert relative_l2(*results) < SAME


def test_lora_on_clip(host, tiny, own_models):
    """LoraLoader passes our CLIP through; a LoRA for the denoiser leaves its features alone."""
    write_lora(own_models / "loras" / "both.safetensors", tiny.model.model.diffusion_model, 1.0)
    _, clip = host.run(
        "LoraLoader",
        model=tiny.model,
        clip=tiny.clip,
        lora_name="both.safetensors",
        strength_model=1.0,
        strength_clip=1.0,
    )
    (conditioning,) = host.run("CLIPTextEncode", clip=clip, text="a red circle")
    assert torch.equal(conditioning[0][0], tiny.positive[0][0])
