"""ComfyUI's MultiGPU CFG Split: prompt and negative at the same time, each on a device of its own.

PyTorch tells ``cpu`` from ``cpu:0`` and computes on either, so these two stand for two GPUs. Each has its own
copy of the network and a thread, as on real ones.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.compare import relative_l2
from tests.host import fake_graphs
from tests.host.fake_gpu import CPU, GPU
from tests.host.helpers import write_lora
from tests.host.shortage import Shortage, always, before

STEPS = 3


@pytest.fixture
def management(host, tiny, monkeypatch):
    """ComfyUI's memory manager, which sees both devices."""
    import comfy.model_management as management

    management.unload_all_models()
    monkeypatch.setattr(management, "get_all_torch_devices", lambda exclude_current=False: [CPU, GPU])
    yield management
    management.unload_all_models()


@pytest.fixture
def split(management):
    """A MODEL through the MultiGPU CFG Split node."""
    from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

    def run(model: Any, max_gpus: int = 2) -> Any:
        return MultiGPUCFGSplitNode.execute(model, max_gpus).result[0]

    return run


@dataclass
class Forwards:
    """A DIFFUSION_MODEL wrapper that notes each forward: its device, its thread and its network."""

    seen: list[tuple[torch.device | None, int, int]] = field(default_factory=list)

    def __call__(self, executor, x, timestep, context, mask, options, **kwargs):
        device = options.get("multigpu_thread_device")
        self.seen.append((device, threading.get_ident(), id(executor.class_obj)))
        return executor(x, timestep, context, mask, options, **kwargs)

    def count(self) -> dict[torch.device | None, int]:
        """Forwards by device; each has one thread and one network, and shares neither."""
        devices = {device for device, *_ in self.seen}
        for part in (1, 2):
            assert len({entry[part] for entry in self.seen}) == len(devices)
            assert len({(entry[0], entry[part]) for entry in self.seen}) == len(devices)
        return {device: [entry[0] for entry in self.seen].count(device) for device in devices}


@pytest.fixture
def both(split):
    """Draws with a MODEL as it is, then through the split node; returns both pictures and the forwards."""
    from comfy.patcher_extension import WrappersMP

    def run(model: Any, draw: Callable[..., Any], **inputs: Any) -> tuple[Any, Any, dict]:
        want = picture(draw(model=model, **inputs))
        watched, forwards = model.clone(), Forwards()
        watched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "lens_tests", forwards)
        got = picture(draw(model=split(watched), **inputs))
        return want, got, forwards.count()

    return run


def picture(latent: Any) -> torch.Tensor:
    return latent["samples"] if isinstance(latent, dict) else latent


@pytest.fixture
def load(host):
    """Loads a MODEL of the test's own."""

    def run(name="Lens-tiny", dtype="float32", quantization="none"):
        return host.run("LensModelLoader", model_name=name, dtype=dtype, quantization=quantization)[0]

    return run


@pytest.mark.parametrize("negative", ["", "blurry hands"])
@pytest.mark.parametrize("quantization", ["none", "int8_dynamic"])
def test_the_same_picture(host, tiny, load, draw, both, negative, quantization):
    _, conditioning = host.run("LensTextEncode", clip=tiny.clip, prompt="x", negative=negative)
    model = load(quantization=quantization)
    want, got, forwards = both(model, draw, negative=conditioning, steps=STEPS)
    assert torch.equal(got, want) and forwards == {CPU: STEPS, GPU: STEPS}


def test_stock_ksampler(tiny, ksampler, both):
    want, got, forwards = both(tiny.model, ksampler, sampler_name="dpmpp_2m")
    assert torch.equal(got, want) and forwards == {CPU: 2, GPU: 2}


@pytest.fixture
def with_lora(host, own_models):
    def run(model: Any) -> Any:
        write_lora(own_models / "loras" / "several.safetensors", model.model.diffusion_model, 1.0)
        lora = {"lora_name": "several.safetensors", "strength_model": 1.0}
        return host.run("LoraLoaderModelOnly", model=model, **lora)[0]

    return run


@pytest.mark.parametrize("quantization", ["none", "int8_dynamic"])
def test_with_a_lora(load, with_lora, draw, split, both, quantization):
    """Before the split or after it; and without it again."""
    model = load(quantization=quantization)
    plain = draw(model=model)["samples"]
    want, got, forwards = both(with_lora(model), draw)
    assert torch.equal(got, want) and forwards == {CPU: 2, GPU: 2}
    assert torch.equal(draw(model=with_lora(split(model)))["samples"], want)
    assert torch.equal(draw(model=split(model))["samples"], plain)
    assert relative_l2(want, plain) > 0.05


def test_guidance_in_some_steps(tiny, draw, both):
    """Outside them there is one forward a step, on the first."""
    want, got, forwards = both(tiny.model, draw, steps=4, guidance_start=0.25, guidance_end=0.75)
    assert torch.equal(got, want) and forwards == {CPU: 4, GPU: 2}


def test_step_cache(host, tiny, draw, both, caplog):
    """Each entry of the conditioning is on one device in all steps, so what is skipped is the same."""
    caplog.set_level("INFO")
    settings = {"threshold": 10.0, "start": 0.0, "end": 1.0, "max_consecutive": 1}
    (model,) = host.run("LensStepCache", model=tiny.model, **settings)
    want, got, forwards = both(model, draw, steps=6)
    assert torch.equal(got, want) and forwards == {CPU: 6, GPU: 6}
    said = [record.getMessage() for record in caplog.records if "forwards skipped" in record.getMessage()]
    assert said[0] == said[1] and "of 12 forwards" in said[0]
    assert relative_l2(want, draw(steps=6)["samples"]) > 1e-4


def with_hook(model, conds):
    import comfy.hooks

    clone, name = model.clone(), "diffusion_model.transformer_blocks.0.img_mlp.w2.weight"
    doubled = {name: 2 * model.model.state_dict()[name]}
    group = comfy.hooks.create_hook_model_as_lora(doubled, None, strength_model=1.0, strength_clip=0.0)
    return clone, comfy.hooks.set_hooks_for_conditioning(conds, group)


def with_weight_wrapper(model, conds):
    clone, name = model.clone(), "diffusion_model.transformer_blocks.0.img_mlp.w2.weight"
    clone.add_weight_wrapper(name, lambda weight: 2 * weight)
    return clone, conds


def with_block_patch(model, conds):
    clone = model.clone()
    clone.set_model_double_block_patch(lambda args: {"img": 1.1 * args["img"], "txt": args["txt"]})
    return clone, conds


@pytest.mark.parametrize("change", [with_hook, with_weight_wrapper, with_block_patch])
def test_nodes_that_change_the_model(tiny, draw, both, change):
    """What ComfyUI brings to the copies too."""
    model, positive = change(tiny.model, tiny.positive)
    want, got, forwards = both(model, draw, positive=positive)
    assert torch.equal(got, want) and forwards == {CPU: 2, GPU: 2}
    assert relative_l2(want, draw()["samples"]) > 1e-4


def with_bypass_lora(model, path):
    import comfy.sd
    from safetensors.torch import load_file

    write_lora(path, model.model.diffusion_model, 1.0)
    return comfy.sd.load_bypass_lora_for_models(model, None, load_file(path), 1.0, 0.0)[0]


def with_replaced_layer(model, path):
    name = "diffusion_model.transformer_blocks.0.img_mlp.w1"
    own, clone = model.get_model_object(name), model.clone()
    clone.add_object_patch(name, torch.nn.Sequential(own, torch.nn.Tanh()))
    return clone


def with_compiled_mark(model, path):
    clone = model.clone()
    clone.model_options["torch_compile_kwargs"] = {}
    return clone


@pytest.mark.parametrize(
    "change, reason",
    [
        (with_bypass_lora, "a node changes how its layers compute (a LoRA in bypass mode does)"),
        (with_replaced_layer, "a node has replaced some of its layers"),
        (with_compiled_mark, "it is compiled"),
    ],
)
def test_what_the_copies_lack_is_drawn_on_one(load, draw, both, own_models, caplog, change, reason):
    """ComfyUI would draw with a bypass LoRA in the prompt's forwards alone, and share replaced layers."""
    model = change(load(), own_models / "loras" / "bypass.safetensors")
    want, got, forwards = both(model, draw)
    assert torch.equal(got, want) and set(forwards) == {None}
    said = [record.getMessage() for record in caplog.records if "on one GPU" in record.getMessage()]
    assert said == [f"Lens: this run is on one GPU: {reason}, and ComfyUI does that on the first alone."]


def test_cuda_graphs_are_off(host, tiny, draw, split, caplog, monkeypatch):
    from comfy.ldm.modules import attention

    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    fake_graphs.install(host.module("lens_core.denoiser.graph"), monkeypatch)
    monkeypatch.setattr(host.module("nodes.host.accelerate"), "why_never", lambda model: None)
    (model,) = host.run("LensAccelerate", model=tiny.model, cuda_graphs=True, attention="auto")
    assert torch.equal(draw(model=split(model))["samples"], draw()["samples"])
    graphs = model.model_options["transformer_options"]["lens_graphs"]
    assert not graphs._recorded
    assert caplog.text.count("without CUDA graphs: it is spread over several GPUs") == 1


def networks_of(model: Any) -> list[Any]:
    (copy,) = model.get_additional_models_with_key("multigpu")
    return [patcher.model.diffusion_model for patcher in (model, copy)]


def test_modulation_is_computed_once(host, load, draw, split, monkeypatch):
    """By the first device; the other is given it, and its own weights give way to the steps."""
    module = host.module("lens_core.denoiser.modulation")
    run, evaluated, room = host.module("nodes.host.run"), [], []
    evaluate, make_room = module.modulation, run._make_room

    def noted(denoiser, *args):
        evaluated.append(denoiser)
        return evaluate(denoiser, *args)

    monkeypatch.setattr(module, "modulation", noted)
    monkeypatch.setattr(run, "_make_room", lambda *args: room.append(args[1:3]) or make_room(*args))
    model = split(load())
    draw(model=model, steps=STEPS)
    assert evaluated == networks_of(model)[:1]
    assert [network for _, network in room] == networks_of(model)
    assert [patcher.load_device for patcher, _ in room] == [CPU, GPU]


@pytest.fixture
def short(monkeypatch):
    """Makes a network short of memory at some calls."""

    def run(network: Any, fails: Callable[[int], bool]) -> Shortage:
        shortage = Shortage(fails)
        norm = network.norm_out
        monkeypatch.setattr(norm, "forward", before(norm.forward, shortage), raising=False)
        return shortage

    return run


@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("ratio", [0.0, 0.4], ids=["nvidia", "others"])
def test_out_of_memory(host, load, draw, split, short, management, monkeypatch, caplog, which, ratio):
    """In a thread: both are unloaded, and the second attempt has none of either's layers on a GPU."""
    for name, value in {
        "is_device_cpu": lambda device: False,
        "vram_state": management.VRAMState.NORMAL_VRAM,
        "lowvram_available": True,
        "MIN_WEIGHT_MEMORY_RATIO": ratio,
    }.items():
        monkeypatch.setattr(management, name, value)
    model = split(load())
    want = draw(model=model, steps=STEPS)["samples"]
    networks, unloaded, streamed = networks_of(model), [], []
    shortage = short(networks[which], lambda call: call == 2)
    unload = management.unload_all_models

    def noted() -> None:
        unload()
        unloaded.append(len(management.current_loaded_models))

    def count(network, args) -> None:
        if unloaded:
            copies = model.get_additional_models_with_key("multigpu")
            streamed.append([patcher.loaded_size() / patcher.model_size() for patcher in (model, *copies)])

    monkeypatch.setattr(management, "unload_all_models", noted)
    for network in networks:
        network.img_in.register_forward_pre_hook(count)
    assert torch.equal(draw(model=model, steps=STEPS)["samples"], want)
    assert shortage.calls == 2 + STEPS and not shortage.leaked and unloaded == [0]
    assert len(streamed) == 2 * STEPS and max(map(max, streamed)) < 0.05
    assert caplog.text.count("Out of memory while sampling") == 1
    assert not any(patcher.model.streamed for patcher in (model, *model.get_additional_models()))


def test_out_of_memory_twice(load, draw, split, short):
    model = split(load())
    want = draw(model=model)["samples"]
    shortage = short(networks_of(model)[1], always)
    with pytest.raises(torch.OutOfMemoryError, match="while sampling"):
        draw(model=model)
    assert shortage.calls == 2
    shortage.fails = lambda call: False
    assert torch.equal(draw(model=model)["samples"], want)


def test_the_other_device_is_waited_for(load, draw, split, short, management, monkeypatch):
    """One fails while the other computes: nothing is unloaded under it, however long it takes."""
    import comfy.multigpu

    model = split(load())
    want = draw(model=model)["samples"]
    first, second = networks_of(model)
    failed, ended, order = threading.Event(), threading.Event(), []

    def fails(call: int) -> bool:
        order.append("fails") if call == 1 else None
        failed.set()
        return call == 1

    def computes(*_: Any) -> None:
        failed.wait(10)
        if not ended.is_set():
            ended.wait(0.5)
            order.append("computed")
            ended.set()

    unload = management.unload_all_models
    monkeypatch.setattr(management, "unload_all_models", lambda: order.append("unloaded") or unload())
    # As with a forward that takes longer than ComfyUI's 5 s.
    monkeypatch.setattr(comfy.multigpu.MultiGPUThreadPool, "shutdown", lambda pool: None)
    short(first, fails)
    second.norm_out.register_forward_pre_hook(computes)
    assert torch.equal(draw(model=model)["samples"], want)
    assert order == ["fails", "computed", "unloaded"]


LENS, TURBO = "lens_tiny_bf16.safetensors", "lens_turbo_tiny_bf16.safetensors"


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_swapped_checkpoints(load, draw, split, caplog, no_collector):
    """The loader's next file, and back: from the shelf. No copy outlives its MODEL, and ComfyUI knows it."""
    model = load(LENS, "bfloat16")
    network, want = weakref.ref(model.model), draw(model=model)["samples"]
    gone = []
    for _ in range(2):
        model = split(model)
        for _ in range(2):
            assert torch.equal(draw(model=model)["samples"], want)
        gone.append(weakref.ref(networks_of(model)[1]))
        model = split(load(TURBO, "bfloat16"))
        assert gone[-1]() is None and network() is not None
        assert not torch.equal(draw(model=model)["samples"], want)
        gone.append(weakref.ref(networks_of(model)[1]))
        model = load(LENS, "bfloat16")
        assert model.model is network() and gone[-1]() is None
        assert torch.equal(draw(model=model)["samples"], want)
    del model
    assert network() is None and "memory leak" not in caplog.text


def test_a_copy_on_the_gpu_is_used_again(load, with_lora, draw, split, caplog, no_collector):
    """By the MODEL of the same loader with another LoRA, say; its patchers of before are let go of."""
    model = load()
    halved = split(with_lora(model))
    draw(model=halved)
    patcher, network = weakref.ref(halved.get_additional_models()[0]), networks_of(halved)[1]
    for _ in range(2):
        halved = split(model)
        assert torch.equal(draw(model=halved)["samples"], draw(model=model)["samples"])
        assert networks_of(halved)[1] is network and patcher() is None
    assert "memory leak" not in caplog.text
