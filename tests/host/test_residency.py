"""The modulation gets GPU memory last and gives it back first, whatever becomes of the MODEL."""

from __future__ import annotations

import math

import pytest
import torch

from lens_core.config import DenoiserConfig, is_modulation
from lens_core.denoiser import LensDenoiser
from tests.host.fake_gpu import CPU, GPU, FakeGpu, own_bytes, use_dynamic_patchers
from tests.host.helpers import random_context, random_latent, write_lora

LINEARS = 6  # img_mod and txt_mod of the tiny model's three blocks


@pytest.fixture
def management(host, tiny):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    yield comfy.model_management
    comfy.model_management.unload_all_models()


@pytest.fixture
def gpu(management, monkeypatch):
    """Room for everything; tests make it smaller."""
    return FakeGpu(1 << 40).install(monkeypatch)


@pytest.fixture
def load(host):
    """Loads a MODEL of the test's own."""
    return lambda: host.run("LensModelLoader", model_name="Lens-tiny", dtype="float32")[0]


@pytest.fixture
def dynamic(host, monkeypatch):
    """ComfyUI's dynamic patcher, as on CUDA."""
    use_dynamic_patchers(monkeypatch)


@pytest.fixture
def with_lora(host, own_models):
    """A clone with a LoRA on five layers, one of them modulation."""

    def run(model):
        write_lora(own_models / "loras" / "order.safetensors", model.model.diffusion_model, 1.0)
        lora = {"lora_name": "order.safetensors", "strength_model": 1.0}
        return host.run("LoraLoaderModelOnly", model=model, **lora)[0]

    return run


@pytest.fixture(params=["loaded", "cloned", "deep cloned", "with a LoRA", "not dynamic any more", "delegate"])
def model(request, gpu, load, with_lora):
    """A MODEL with the classic patcher, made in any of the ways that ComfyUI has."""
    if request.param in ("not dynamic any more", "delegate"):
        request.getfixturevalue("dynamic")
    made = load()
    return {
        "loaded": lambda: made,
        "cloned": lambda: made.clone().clone(),
        "deep cloned": lambda: made.deepclone_multigpu(new_load_device=GPU),
        "with a LoRA": lambda: with_lora(made).clone(),
        "not dynamic any more": lambda: with_lora(made.clone(disable_dynamic=True)),
        "delegate": lambda: with_lora(made).get_non_dynamic_delegate(),
    }[request.param]()


def forward(model) -> torch.Tensor:
    return model.model.diffusion_model(random_latent(1, (5, 3)), torch.tensor([0.7]), random_context(1, 6))


def count(model, modules=None) -> tuple[int, int]:
    """Bytes of the modulation and of all other weights: in the model, or those of it among ``modules``."""
    split = [0, 0]
    for name, module in model.model.diffusion_model.named_modules():
        if modules is None or module in modules:
            split[not is_modulation(name)] += own_bytes(module)
    return split[0], split[1]


def load_into(gpu, management, model, capacity: float) -> tuple[int, int]:
    """What of the modulation and of all else is on a GPU of this size, loaded anew."""
    management.unload_all_models()
    gpu.capacity = capacity
    management.load_models_gpu([model])
    return count(model, gpu.here)


def test_modulation_is_a_third_of_the_weights():
    """At full size: 96 linears, told by their names alone."""
    network = LensDenoiser(DenoiserConfig(), device="meta")
    linears = [module for name, module in network.named_modules() if is_modulation(name)]
    assert [tuple(linear.weight.shape) for linear in linears] == [(9216, 1536)] * 96
    assert 0.32 < sum(map(own_bytes, linears)) / sum(map(own_bytes, network.modules())) < 0.34


# ComfyUI keeps room for the modules that it streams ahead, one a stream.
@pytest.mark.parametrize("streams, room", [(0, 0.5), (2, 2.5)])
def test_modulation_is_loaded_last(gpu, management, model, monkeypatch, streams, room):
    """Room for all but the modulation: that alone stays off; with more room, linear by linear comes too."""
    monkeypatch.setattr(management, "NUM_STREAMS", streams)
    modulation, others = count(model)
    linear = modulation / LINEARS
    assert not model.is_dynamic() and load_into(gpu, management, model, 1 << 40) == (modulation, others)
    want = forward(model)
    for more in range(3):
        on_gpu = load_into(gpu, management, model, others + (room + more) * linear)
        assert on_gpu == (more * linear, others)
        assert model.model.model_offload_buffer_memory == streams * linear
        assert torch.equal(forward(model), want)


@pytest.mark.parametrize("freed", [0.5, 3.5, 5.9])
def test_modulation_is_freed_first(gpu, management, model, freed):
    modulation, others = load_into(gpu, management, model, 1 << 40)
    want = forward(model)
    linear = modulation / LINEARS
    gpu.capacity = model.loaded_size()
    management.free_memory(freed * linear, GPU)
    assert count(model, gpu.here) == (modulation - math.ceil(freed) * linear, others)
    assert torch.equal(forward(model), want)


def test_all_is_loaded_again_when_there_is_room(gpu, management, model):
    whole = load_into(gpu, management, model, 1 << 40)
    model.partially_unload(CPU, whole[0])
    assert count(model, gpu.here)[0] == 0
    management.load_models_gpu([model])
    assert count(model, gpu.here) == whole == count(model) and model.loaded_size() == model.model_size()


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "with a LoRA"])
def test_modulation_lies_last_in_the_address_space(gpu, management, dynamic, load, with_lora, lora):
    """comfy-aimdo frees the highest addresses first; clones share the places."""
    model = with_lora(load()) if lora else load()
    assert model.is_dynamic()
    management.load_models_gpu([model.clone()])
    places = {name: m._v[1] for name, m in model.model.named_modules() if hasattr(m, "_v")}
    highest = sorted(places, key=places.__getitem__)[-LINEARS:]
    assert len(places) > LINEARS and all(map(is_modulation, highest))


def test_dynamic_patcher_gives_way_on_a_cpu(host, management, dynamic, load, tiny, draw):
    """As ComfyUI's own does, but not to that."""
    classes = host.module("nodes.host.residency")
    assert classes.patcher_class() is classes.DynamicLensPatcher
    assert classes.patcher_class(disable_dynamic=True) is classes.LensPatcher
    model = load()
    assert (
        type(model) is type(model.clone()) is type(model.clone(disable_dynamic=True)) is classes.LensPatcher
    )
    assert model.clone().is_clone(model) and model.load_device == CPU
    assert torch.equal(draw(model=model)["samples"], draw()["samples"])
