"""Checkpoints swapped and swapped back: from RAM, to the bit, and held by nothing but the graph."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import weakref

import pytest
import torch

from tests.compare import relative_l2
from tests.host import fake_graphs
from tests.host.fake_gpu import CPU, GPU, FakeGpu, use_dynamic_patchers
from tests.host.helpers import write_lora

LENS, TURBO = "lens_tiny_bf16.safetensors", "lens_turbo_tiny_bf16.safetensors"
GB = 10**9


@pytest.fixture
def shelf(host):
    return host.module("nodes.host.shelf")


@pytest.fixture
def load(host):
    def run(name, quantization="none", dtype="bfloat16"):
        model, *_ = host.run("LensModelLoader", model_name=name, dtype=dtype, quantization=quantization)
        return model

    return run


@pytest.fixture
def opened(host, monkeypatch):
    """Names of the files that were opened."""
    module, names = host.module("nodes.host.model"), []
    opener = module.open_denoiser
    monkeypatch.setattr(module, "open_denoiser", lambda path: names.append(path.name) or opener(path))
    return names


@pytest.fixture
def ram(shelf, monkeypatch):
    """What the shelf sees of RAM: [available, total] bytes."""
    import comfy.model_management

    room = [1000 * GB, 16 * GB]
    monkeypatch.setattr(shelf, "available_ram", lambda: room[0])
    monkeypatch.setattr(comfy.model_management, "total_ram", room[1] / 2**20)
    return room


@pytest.fixture
def no_leak(caplog):
    """ComfyUI finds no model that lives on without a patcher."""
    yield
    import comfy.model_management

    comfy.model_management.cleanup_models_gc()
    assert "memory leak" not in caplog.text


@pytest.mark.parametrize("quantization", ["none", "int8_dynamic"])
def test_a_swap_back_is_from_ram(load, draw, opened, caplog, ram, no_leak, quantization):
    lens = load(LENS, quantization)
    network = weakref.ref(lens.model)
    want = draw(model=lens)["samples"]
    turbo = load(TURBO, quantization)
    del lens
    gc.collect()
    other = draw(model=turbo)["samples"]
    assert not torch.equal(other, want)
    with caplog.at_level("INFO"):
        again = load(LENS, quantization)
    assert again.model is network()
    assert opened == [LENS, TURBO]
    assert "Lens: lens_tiny_bf16" in caplog.text and "is still in RAM: not read again." in caplog.text
    assert torch.equal(draw(model=again)["samples"], want)
    del turbo
    assert torch.equal(draw(model=load(TURBO, quantization))["samples"], other)
    assert opened == [LENS, TURBO]


@pytest.mark.parametrize(
    "quantization, node, strength",
    [("none", "LensLoraLoader", "strength"), ("int8_dynamic", "LoraLoaderModelOnly", "strength_model")],
)
def test_a_lora_in_between_leaves_no_trace(
    host, load, draw, own_models, ram, no_leak, quantization, node, strength
):
    lens = load(LENS, quantization)
    want = draw(model=lens)["samples"]
    write_lora(own_models / "loras" / "shelf.safetensors", load(LENS).model.diffusion_model, 1.0)
    (patched,) = host.run(node, model=lens, lora_name="shelf.safetensors", **{strength: 1.0})
    assert relative_l2(draw(model=patched)["samples"], want) > 0.05
    network = weakref.ref(lens.model)
    turbo = load(TURBO, quantization)
    del lens, patched
    gc.collect()
    again = load(LENS, quantization)  # the LoRA is still in its weights
    assert again.model is network()
    assert torch.equal(draw(model=again)["samples"], want)
    assert turbo is not None


def test_all_goes_with_the_last_model(load, draw, shelf, ram, no_leak):
    """/free, or a loader taken out of the graph: ComfyUI lets go of its outputs, and that is all."""
    models = [load(LENS)]
    models.append(load(TURBO))
    models.append(load(LENS, "int8_dynamic").clone())
    networks = [weakref.ref(model.model) for model in models]
    for model in models:
        draw(model=model)
    del model, models[:2]
    gc.collect()
    assert all(network() is not None for network in networks), "a clone of a clone holds all"
    models.clear()
    gc.collect()
    assert not [network for network in networks if network() is not None]
    assert not list(shelf._living)


def test_nothing_needs_the_collector(load, ram):
    """Nothing in a cycle: a model's RAM is free as soon as it is let go of."""
    lens, turbo = load(LENS), load(TURBO)
    networks = [weakref.ref(lens.model), weakref.ref(turbo.model)]
    gc.collect()
    gc.disable()
    try:
        del lens, turbo
        assert not [network for network in networks if network() is not None]
    finally:
        gc.enable()


def test_settings_are_told_apart(load, opened, ram):
    """Of one file: by dtype and quantisation."""
    models = [load(LENS), load(LENS, "int8_dynamic"), load(LENS, dtype="float32")]
    assert len({id(model.model) for model in models}) == len(opened) == 3
    assert models[2].model_dtype() == torch.float32
    assert load(LENS, "int8_dynamic").model is models[1].model


def test_short_of_ram_the_oldest_goes_first(load, opened, ram, caplog, shelf, monkeypatch):
    lens, turbo = load(LENS), load(TURBO)
    third = load(LENS, "int8_dynamic")
    assert len(opened) == 3
    load(LENS)  # now TURBO is the least recently used
    size = lens.model_size()
    networks = [weakref.ref(model.model) for model in (lens, turbo, third)]
    del lens, turbo
    ram[0] = 4 * GB - size // 2  # one too many
    with caplog.at_level("INFO"):
        again = load(LENS, "int8_dynamic")
    assert again.model is third.model
    assert [network() is not None for network in networks] == [True, False, True]
    assert (
        "Lens: lens_turbo_tiny_bf16 is not kept in RAM for a swap back: 4.0 GB are available" in caplog.text
    )
    ram[0] = 0
    last = load(TURBO)
    assert [name for name in opened if name == TURBO] == [TURBO, TURBO]
    del third, again
    gc.collect()
    assert not [network for network in networks if network() is not None]
    assert load(TURBO).model is last.model, "what is returned is never dropped"


def test_what_is_on_the_gpu_counts_as_ram(load, ram, shelf, monkeypatch):
    """It comes back to RAM when ComfyUI needs the GPU for the next."""
    FakeGpu(1 << 40).install(monkeypatch)
    import comfy.model_management as management

    lens, turbo = load(LENS), load(TURBO)
    assert lens.load_device == GPU and lens.offload_device == CPU
    size = turbo.model_size()
    ram[0] = 4 * GB + size // 2
    assert load(LENS).model is lens.model
    assert [key.name for key in _on(shelf)] == [TURBO, LENS]
    management.load_models_gpu([lens, turbo])
    assert turbo.loaded_size() == size
    load(LENS)
    assert [key.name for key in _on(shelf)] == [LENS]
    management.unload_all_models()


def test_flags_that_keep_models_on_the_gpu(load, ram, shelf, monkeypatch, caplog):
    """Swapped out models would stay there, too."""
    import comfy.model_management as management

    monkeypatch.setattr(management, "unet_offload_device", lambda: torch.device("meta"))
    lens = load(LENS)
    with caplog.at_level("INFO"):
        load(TURBO)
        assert not _on(shelf) or [key.name for key in _on(shelf)] == [TURBO]
    assert "lens_tiny_bf16 is not kept: ComfyUI's start flags keep models on the GPU." in caplog.text
    assert lens is not None


def _on(shelf):
    return [key for one in shelf._living for key in one._denoisers]


def test_a_replaced_file_is_read_anew(host, load, draw, opened, own_models, tiny_models, ram):
    source, path = tiny_models / "diffusion_models", own_models / "diffusion_models" / "replaced.safetensors"
    node = host.node_classes["LensModelLoader"]
    shutil.copyfile(source / LENS, path)
    before = node.fingerprint_inputs(model_name=path.name)
    first = load(path.name)
    old = weakref.ref(first.model)
    other = load(TURBO)
    del first
    shutil.copyfile(source / TURBO, path)
    os.utime(path, ns=(1, 1))
    assert node.fingerprint_inputs(model_name=path.name) != before
    again = load(path.name)
    assert opened == [path.name, TURBO, path.name]
    assert torch.equal(draw(model=again)["samples"], draw(model=other)["samples"])
    gc.collect()
    assert old() is None, "what can never be served again stays"


def test_a_prompt_holds_the_shelf_from_its_fingerprints(host, load, opened, ram, shelf):
    """ComfyUI forgets the old MODEL before the loader runs; the prompt's end forgets what it did not use."""
    node = host.node_classes["LensModelLoader"]
    outputs = [load(LENS)]
    network = weakref.ref(outputs[0].model)

    async def prompt(name, runs):
        node.fingerprint_inputs(model_name=name, dtype="bfloat16", quantization="none")
        outputs.clear()
        if runs:
            outputs.append(load(name))

    asyncio.run(prompt(TURBO, True))
    asyncio.run(prompt(LENS, True))
    assert outputs[0].model is network() and opened == [LENS, TURBO]
    asyncio.run(prompt(TURBO, False))
    gc.collect()
    assert network() is None and not list(shelf._living)


def test_a_fingerprint_of_nothing(host, load, ram):
    """A linked name is None, and a missing file is for the loader itself to speak of."""
    node = host.node_classes["LensModelLoader"]
    lens = load(LENS)
    assert node.fingerprint_inputs(model_name=None, dtype=None) == ""
    assert node.fingerprint_inputs(model_name="no such file") == ""
    assert load(LENS).model is lens.model


def test_encoder_and_vae_stay(tiny, load, draw, ram):
    """A swap of denoisers asks neither to be loaded again, nor moves what they have on a device."""
    import comfy.model_management as management

    others = [tiny.clip.patcher, tiny.vae.patcher]
    management.load_models_gpu(others)
    before = [(id(patcher.model), patcher.loaded_size()) for patcher in others]
    for name in (LENS, TURBO, LENS):
        draw(model=load(name))
    assert [(id(patcher.model), patcher.loaded_size()) for patcher in others] == before
    loaded = [entry.model for entry in management.current_loaded_models]
    assert all(any(entry is patcher for entry in loaded) for patcher in others)


def test_a_model_for_another_device_has_weights_of_its_own(load, ram):
    """ComfyUI makes these (Select Model Device, several GPUs) by the loader's recipe, past the shelf."""
    lens = load(LENS)
    copy = lens.deepclone_multigpu(new_load_device=torch.device("cpu"))
    assert copy.model is not lens.model
    assert load(LENS).model is lens.model


@pytest.mark.parametrize("quantization", ["none", "int8_dynamic"])
def test_a_bypass_lora_in_between_leaves_no_trace(load, quantization, draw, ram, no_leak, own_models):
    """It replaces layers' forwards, and its MODEL may be gone before ComfyUI undoes that."""
    import comfy.sd
    from safetensors.torch import load_file

    lens = load(LENS, quantization)
    want = draw(model=lens)["samples"]
    path = own_models / "loras" / "bypass.safetensors"
    write_lora(path, lens.model.diffusion_model, 1.0)
    patched, _ = comfy.sd.load_bypass_lora_for_models(lens, None, load_file(path), 1.0, 0.0)
    assert relative_l2(draw(model=patched)["samples"], want) > 0.05
    network = weakref.ref(lens.model)
    turbo = load(TURBO, quantization)
    del lens, patched
    gc.collect()
    again = load(LENS, quantization)
    assert again.model is network() and turbo is not None
    assert torch.equal(draw(model=again)["samples"], want)


@pytest.fixture
def dynamic(host, monkeypatch):
    """Dynamic VRAM as on CUDA, and graphs by a stand-in."""
    from comfy.ldm.modules import attention

    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    fake_graphs.install(host.module("lens_core.denoiser.graph"), monkeypatch)
    monkeypatch.setattr(host.module("nodes.host.accelerate"), "why_never", lambda model: None)
    gpu = FakeGpu(1 << 40).install(monkeypatch)
    use_dynamic_patchers(monkeypatch)
    yield gpu
    import comfy.model_management

    comfy.model_management.unload_all_models()


def test_a_swap_under_dynamic_vram(load, opened, ram, dynamic, no_leak):
    import comfy.model_management as management

    lens, network = load(LENS), None
    network = weakref.ref(lens.model)
    assert lens.is_dynamic()
    management.load_models_gpu([lens])
    turbo = load(TURBO)
    del lens
    management.load_models_gpu([turbo])
    again = load(LENS)
    assert again.model is network() and again.is_dynamic()
    management.load_models_gpu([again])
    assert opened == [LENS, TURBO]
    patchers = [weakref.ref(turbo.model), network]
    del again, turbo
    gc.collect()
    assert not [patcher for patcher in patchers if patcher() is not None]


def test_graphs_go_and_their_weights_stay(host, load, draw, opened, ram, dynamic, no_leak):
    """LensAccelerate's model is outside dynamic VRAM, so it is another: it is on the shelf, too. The graphs,
    which hold GPU memory, are gone with its MODEL."""

    def accelerated(name):
        return host.run("LensAccelerate", model=load(name), cuda_graphs=True, attention="auto")[0]

    def graphs_of(model):
        return model.model_options["transformer_options"]["lens_graphs"]

    fast = accelerated(LENS)
    assert not fast.is_dynamic() and type(fast).__name__ == "LensPatcher"
    want = draw(model=fast, steps=3)["samples"]
    network, graphs = weakref.ref(fast.model), weakref.ref(graphs_of(fast))
    assert graphs().runs["recorded"]
    turbo = accelerated(TURBO)
    del fast
    gc.collect()
    assert graphs() is None and network() is not None
    draw(model=turbo)
    again = accelerated(LENS)
    assert again.model is network()
    assert torch.equal(draw(model=again, steps=3)["samples"], want)
    assert graphs_of(again).runs["recorded"]
    assert opened == [LENS, LENS, TURBO, TURBO], "each once by either patcher"
    del again, turbo
    gc.collect()
    assert network() is None


def test_what_comfyui_asks_about_shelved_weights(host, load, draw, ram, dynamic):
    """The patcher of these very weights, or they could not be moved off the GPU."""
    import comfy.model_management as management

    fast = host.run("LensAccelerate", model=load(LENS), cuda_graphs=True, attention="auto")[0]
    draw(model=fast)
    network, turbo = weakref.ref(fast.model), load(TURBO)
    assert any(module in dynamic.here for module in network().modules())
    del fast
    gc.collect()
    assert network() in [entry.model.model for entry in management.current_loaded_models]
    management.unload_all_models()
    assert not any(module in dynamic.here for module in network().modules())
    assert turbo is not None
