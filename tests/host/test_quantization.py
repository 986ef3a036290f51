"""The quantisation selector under ComfyUI: every mode draws, takes a LoRA and gives it back to the bit."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from lens_core.quant.policy import MODES
from tests.compare import relative_l2
from tests.host.helpers import write_lora

FILE = "lens_tiny_bf16.safetensors"
# How far the velocities of the tiny model may be from bf16's by each mode's bits: the rounding of a weight
# (3 % by fp8's three bits, 0.8 % by int8, 9 % by 4 bits in groups) is less in the sum over 96 products and
# more in three blocks one behind the other. Measured in pictures: 0.03, 0.02 and 0.09.
APART = {"float8": 0.08, "int8": 0.05, "int4": 0.25, "uint4": 0.25, "mxfp8": 0.08, "nvfp4": 0.25}


@pytest.fixture(scope="module")
def load(host):
    """A MODEL in bf16, quantised by a mode."""

    def run(mode, file=FILE):
        model, *_ = host.run("LensModelLoader", model_name=file, dtype="bfloat16", quantization=mode)
        return model

    return run


@pytest.fixture(scope="module")
def plain(load, draw):
    return draw(model=load("none"))["samples"]


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_draws_nearly_the_same_picture(load, draw, plain, mode):
    model = load(mode)
    got = draw(model=model)["samples"]
    apart = relative_l2(got, plain)
    assert 1e-4 < apart < APART[mode.split("_")[0]]
    assert torch.equal(draw(model=model)["samples"], got)


@pytest.mark.parametrize("mode", MODES)
def test_a_lora_shows_and_leaves_no_trace(host, load, draw, own_models, mode):
    model = load(mode)
    write_lora(own_models / "loras" / "quantized.safetensors", load("none").model.diffusion_model, 1.0)
    before = draw(model=model)["samples"]
    apart = []
    for strength in (0.5, 1.0):
        (patched,) = host.run(
            "LoraLoaderModelOnly", model=model, lora_name="quantized.safetensors", strength_model=strength
        )
        apart.append(relative_l2(draw(model=patched)["samples"], before))
    assert 0.05 < apart[0] < apart[1]
    assert torch.equal(draw(model=model)["samples"], before)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_a_mode_stays_behind(load, mode):
    """No tensor lives on once its MODEL is gone: none hides behind a class, a cache or a closure."""
    import comfy.model_management

    model = load(mode)
    watched = [weakref.ref(tensor) for tensor in _tensors(model)]
    assert len(watched) > 100
    del model
    comfy.model_management.cleanup_models_gc()
    gc.collect()
    assert not [ref for ref in watched if ref() is not None]


def _tensors(model):
    for parameter in model.model.diffusion_model.parameters():
        if hasattr(parameter, "__tensor_flatten__"):
            names, _ = parameter.__tensor_flatten__()
            yield from (getattr(parameter, name) for name in names)
        else:
            yield parameter


def test_memory_of_other_models_counts_as_free(host, tiny, monkeypatch):
    """``auto`` does not depend on what was drawn before: the host unloads that for the model."""
    import comfy.model_management as management

    gpu = torch.device("cuda", 0)
    loaded = [management.LoadedModel(tiny.model)]
    loaded[0].device = gpu
    monkeypatch.setattr(tiny.model, "loaded_size", lambda: 5_000)
    monkeypatch.setattr(management, "current_loaded_models", loaded)
    monkeypatch.setattr(management, "get_free_memory", lambda device: 1_000)
    free_for_models = host.module("nodes.host.quantized").free_for_models
    assert free_for_models(gpu) == 6_000
    assert free_for_models(torch.device("cuda", 1)) == 1_000
    assert free_for_models(torch.device("cpu")) is None


@pytest.mark.parametrize("free, mode", [(30, "none"), (7, "int8_dynamic"), (4.5, "int4_weight_only")])
def test_auto_goes_by_what_is_free(host, load, monkeypatch, caplog, free, mode):
    """A published-size model on an Ada GPU: only the choice is made here, on the tiny one's file."""
    from lens_core.quant import policy

    own = host.module("lens_core.quant.policy")
    sizes = {f"transformer_blocks.{block}.attn.img_qkv": 57_000_000 for block in range(48)}
    mode_, why = own.choose(sizes, int(free * 1e9), (8, 9), "a GPU")
    assert mode_ == mode and "GB of a GPU are free" in why
    assert policy.choose(sizes, int(free * 1e9), (8, 9), "a GPU") == (mode_, why)
    with caplog.at_level("INFO"):
        load("auto")
    assert "auto chose none" in caplog.text
