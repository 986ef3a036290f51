"""Out of memory at each stage of a picture: once, and it is drawn all the same; always, and one error says why.

The shortage is thrown by layers and functions of ours at a chosen call, while a tensor is held in their frame.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.host import fake_graphs
from tests.host.fake_gpu import FakeGpu, own_bytes

STEPS = 3
EMPTY = {"samples": torch.zeros(1, 128, 6, 4)}
SIZES = re.compile(r"\d+\.\d\d GB are needed, \d+\.\d\d GB are free")


class Shortage:
    """Throws at the calls for which ``fails`` says so; ``loaded`` has the models loaded at the call after."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        self.fails, self.calls = fails, 0
        self.held: list[weakref.ref] = []
        self.leaked = False
        self.loaded: list[Any] | None = None

    def __call__(self, *_: Any, **__: Any) -> None:
        import comfy.model_management as management

        self.calls += 1
        self.leaked |= any(ref() is not None for ref in self.held)
        if self.held and self.loaded is None:
            self.loaded = management.loaded_models()
        if self.fails(self.calls):
            tensor = torch.zeros(10)
            self.held.append(weakref.ref(tensor))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def first(call: int) -> bool:
    return call == 1


def always(call: int) -> bool:
    return True


def before(function: Callable, shortage: Shortage) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        shortage(*args)
        return function(*args, **kwargs)

    return run


@pytest.fixture
def management(host, tiny):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    yield comfy.model_management
    comfy.model_management.interrupt_current_processing(False)
    comfy.model_management.unload_all_models()


@pytest.fixture
def short(host, tiny, monkeypatch):
    """Makes a stage run short of memory; ``step`` is which of the sampler's."""
    network, autoencoder = tiny.model.model.diffusion_model, tiny.vae.first_stage_model
    places = {
        "load model": (host.module("lens_core.denoiser_file").DenoiserFile, "load"),
        "load vae": (host.module("nodes.host.vae"), "load_vae"),
        "encode": (host.module("lens_core.encoder.gpt_oss").GptOssLayer, "forward"),
        "sample": (network.norm_out, "forward"),
        "decode": (autoencoder, "decode"),
    }

    def run(stage: str, fails: Callable[[int], bool]) -> Shortage:
        shortage = Shortage(fails)
        owner, name = places[stage]
        monkeypatch.setattr(owner, name, before(getattr(owner, name), shortage), raising=False)
        return shortage

    return run


@pytest.fixture
def stages(host, tiny, draw):
    """Each stage as a call that returns tensors to compare."""

    def loaded(node: str, **inputs: Any) -> list[torch.Tensor]:
        model = host.run(node, **inputs)[0]
        module = model.model if node == "LensModelLoader" else model.first_stage_model
        return list(module.state_dict().values())

    return {
        "load model": lambda: loaded("LensModelLoader", model_name="Lens-tiny", dtype="float32"),
        "load vae": lambda: loaded("LensVAELoader", vae_name="flux2_tiny_vae.safetensors"),
        "encode": lambda: [
            host.run("LensTextEncode", clip=tiny.clip, prompt="a red circle", negative="")[0][0][0]
        ],
        "sample": lambda: [draw(steps=STEPS)["samples"]],
        "decode": lambda: [host.run("LensVAEDecode", latent=EMPTY, vae=tiny.vae)[0]],
    }


ALL = ["load model", "load vae", "encode", "sample", "decode"]
WORDS = {
    "load model": ("while loading Lens-tiny", "quantised already"),
    "load vae": ("while loading flux2_tiny_vae", "--cpu-vae"),
    "encode": ("while encoding the prompt", "placement 'cpu'"),
    "sample": ("while sampling", "smaller than 64x96", "int8_dynamic or uint4_sdnq", "--reserve-vram"),
    "decode": ("while decoding", "VAE Decode (Tiled)", "smaller pictures"),
}


@pytest.mark.parametrize("stage", ALL)
def test_once_is_the_same_result(stages, short, management, caplog, stage):
    want = stages[stage]()
    management.load_models_gpu([])
    shortage = short(stage, first)
    got = stages[stage]()
    assert len(got) == len(want) and all(map(torch.equal, got, want))
    assert not shortage.leaked, "the first attempt's tensors were there when the second began"
    said = [record.message for record in caplog.records if "tried once more with less" in record.message]
    assert len(said) == 1 and WORDS[stage][0] in said[0]
    caplog.clear()
    assert all(map(torch.equal, stages[stage](), want)) and not caplog.records


@pytest.mark.parametrize("stage", ALL)
def test_always_is_one_error_and_the_next_works(stages, short, management, monkeypatch, caplog, stage):
    want = stages[stage]()
    with monkeypatch.context():
        shortage = short(stage, always)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            stages[stage]()
    monkeypatch.undo()
    error = caught.value
    assert type(error).__name__ == "OutOfMemory" and management.is_oom(error)
    assert error.__cause__ is None and error.__context__ is None, "more than one error"
    message = str(error)
    assert message.startswith("CUDA out of memory") and "\n" not in message
    assert all(words in message for words in WORDS[stage]), message
    assert SIZES.search(message) or stage == "load vae", message
    # Decoding is tried whole, then whole with all else unloaded, then in tiles.
    assert shortage.calls == (3 if stage == "decode" else 2)
    assert not shortage.leaked
    assert not management.loaded_models()
    assert all(map(torch.equal, stages[stage](), want))


@pytest.mark.parametrize("stage", ALL)
def test_other_errors_and_cancel_pass(stages, short, management, stage):
    class Other(Exception):
        pass

    for kind in (Other, management.InterruptProcessingException, MemoryError):

        def fails(call: int, kind=kind) -> bool:
            raise kind

        shortage = short(stage, fails)
        with pytest.raises(kind):
            stages[stage]()
        assert shortage.calls == 1
        shortage.fails = lambda call: False


@pytest.mark.parametrize("stage", ["encode", "sample", "decode"])
def test_cancel_during_the_second_attempt(tiny, stages, short, management, stage):
    want = stages[stage]()

    def fails(call: int) -> bool:
        if call == 2:
            management.interrupt_current_processing(True)
            management.throw_exception_if_processing_interrupted()
        return call == 1

    short(stage, fails)
    with pytest.raises(management.InterruptProcessingException):
        stages[stage]()
    assert not tiny.model.model.streamed and tiny.clip.cond_stage_model.placement == "auto"
    assert all(map(torch.equal, stages[stage](), want))


def test_models_are_unloaded_in_between(tiny, stages, short, management):
    """All others, and the denoiser before it is loaded again."""
    management.load_models_gpu([tiny.clip.patcher, tiny.vae.patcher])
    shortage = short("sample", first)
    stages["sample"]()
    assert [patcher.model for patcher in shortage.loaded] == [tiny.model.model]


# Each step has a forward for the prompt and one for the negative.
@pytest.mark.parametrize("forward", range(1, 2 * STEPS + 1))
def test_every_forward_of_sampling(draw, short, management, progress, forward):
    """From step 0 with the same noise; the bar begins anew."""
    want = draw(steps=STEPS)["samples"]
    progress.clear()
    shortage = short("sample", lambda call: call == forward)
    assert torch.equal(draw(steps=STEPS)["samples"], want)
    assert shortage.calls == forward + 2 * STEPS and not shortage.leaked
    begun = [done for done, *_ in progress][: (forward - 1) // 2]
    assert [done for done, *_ in progress] == begun + [1, 2, 3]
    assert begun == [1, 2][: len(begun)]


def test_stock_ksampler(ksampler, short, management):
    want = ksampler(steps=STEPS)
    shortage = short("sample", lambda call: call == 4)
    assert torch.equal(ksampler(steps=STEPS), want)
    assert shortage.calls == 4 + 2 * STEPS


@pytest.fixture
def advanced(host, tiny):
    """SamplerCustomAdvanced with a guider that outlives its runs, as in a workflow."""
    both = {"positive": tiny.positive, "negative": tiny.negative, "cfg": 5.0}
    (guider,) = host.run("LensGuider", model=tiny.model, **both)
    (noise,) = host.run("RandomNoise", noise_seed=1)
    (levels,) = host.run("LensScheduler", steps=STEPS, latent=EMPTY, denoise=1.0)

    def run(sampler: Any) -> torch.Tensor:
        chain = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": levels}
        return host.run("SamplerCustomAdvanced", latent_image=EMPTY, **chain)[1]["samples"]

    run.guider = guider
    return run


def sampler_of(host, name: str = "euler") -> Any:
    return host.run("KSamplerSelect", sampler_name=name)[0]


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "dpmpp_2m", "uni_pc"])
def test_sampler_custom_advanced(host, advanced, short, management, name):
    want = advanced(sampler_of(host, name))
    shortage = short("sample", lambda call: call == 4)
    assert torch.equal(advanced(sampler_of(host, name)), want)
    assert shortage.calls > 4


def test_samplers_that_draw_noise_of_their_own(advanced, short, management):
    """From PyTorch's random numbers: they begin again where they began."""
    import comfy.samplers

    def noisy(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma in sigmas[:-1]:
            x = model(x + torch.randn_like(x), sigma * x.new_ones(len(x)), **extra_args)
        return x

    def run() -> torch.Tensor:
        torch.manual_seed(3)
        return advanced(comfy.samplers.KSAMPLER(noisy))

    want = run()
    short("sample", lambda call: call == 4)
    assert torch.equal(run(), want)


def test_a_failed_run_leaves_the_guider_as_it_was(host, advanced, short, management):
    """A workflow keeps it, so nothing of the run may hang on it."""
    want, guider = advanced(sampler_of(host)), advanced.guider
    options = guider.model_options
    shortage = short("sample", always)
    with pytest.raises(torch.OutOfMemoryError):
        advanced(sampler_of(host))
    assert guider.model_options is options
    assert not hasattr(guider, "inner_model") and not hasattr(guider, "loaded_models")
    assert all(not cond["model_conds"] for conds in guider.conds.values() for cond in conds)
    shortage.fails = lambda call: False
    assert torch.equal(advanced(sampler_of(host)), want)


def test_with_a_step_cache(host, tiny, draw, short, management, caplog):
    """Each attempt has its own: nothing of the first is skipped by in the second."""
    caplog.set_level("INFO")
    settings = {"threshold": 10.0, "start": 0.0, "end": 1.0, "max_consecutive": 1}
    (model,) = host.run("LensStepCache", model=tiny.model, **settings)
    want = draw(model=model, steps=6)["samples"]
    shortage = short("sample", lambda call: call == 8)
    assert torch.equal(draw(model=model, steps=6)["samples"], want) and not shortage.leaked
    said = [record.getMessage() for record in caplog.records if "forwards skipped" in record.getMessage()]
    assert len(said) == 2 and said[0] == said[1]


def test_cuda_graphs_are_given_back(host, tiny, draw, short, management, monkeypatch):
    """Before the second attempt, which is without; the next run records anew."""
    from comfy.ldm.modules import attention

    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    fake_graphs.install(host.module("lens_core.denoiser.graph"), monkeypatch)
    monkeypatch.setattr(host.module("nodes.host.accelerate"), "why_never", lambda model: None)
    (model,) = host.run("LensAccelerate", model=tiny.model, cuda_graphs=True, attention="auto")
    graphs = model.model_options["transformer_options"]["lens_graphs"]
    want = draw(steps=STEPS)["samples"]
    recorded = []

    def fails(call: int) -> bool:
        recorded.append(len(graphs._recorded))
        return call == 5

    shortage = short("sample", fails)
    assert torch.equal(draw(model=model, steps=STEPS)["samples"], want)
    assert recorded == [1, 2, 2, 2, 2] + 2 * STEPS * [0]
    shortage.fails = lambda call: False
    assert torch.equal(draw(model=model, steps=STEPS)["samples"], want)
    assert len(graphs._recorded) == 2


@pytest.fixture
def gpu(management, monkeypatch):
    return FakeGpu(1 << 40).install(monkeypatch)


@pytest.fixture(params=[0.0, 0.4], ids=["nvidia", "others"])
def streaming_gpu(request, gpu, management, monkeypatch):
    """ComfyUI gives weights two fifths of the free memory on other GPUs than NVIDIA's."""
    monkeypatch.setattr(management, "MIN_WEIGHT_MEMORY_RATIO", request.param)
    return gpu


def resident(model, gpu) -> int:
    return sum(own_bytes(module) for module in model.model.modules() if module in gpu.here)


def test_the_second_attempt_streams_the_denoiser(host, streaming_gpu, draw, management):
    """Not one linear on the GPU; the next run loads all of it again."""
    want, gpu = draw()["samples"], streaming_gpu
    management.unload_all_models()
    model = host.run("LensModelLoader", model_name="Lens-tiny", dtype="float32")[0]
    there = []

    def hook(*_: Any) -> None:
        there.append(resident(model, gpu))
        if len(there) == 2:
            raise torch.OutOfMemoryError("test")

    handle = model.model.diffusion_model.norm_out.register_forward_pre_hook(hook)
    assert torch.equal(draw(model=model)["samples"], want)
    # What is no layer of ComfyUI's cannot be streamed: the table of noise levels, and some vectors.
    assert there[0] > 0.9 * model.model_size() and len(there) == 6
    assert max(there[2:]) < 0.05 * model.model_size(), there
    handle.remove()
    assert torch.equal(draw(model=model)["samples"], want)
    assert resident(model, gpu) == there[0]


def test_the_second_attempt_joins_no_forwards(tiny, draw, short, management):
    """Prompt and negative of one length run together where there is room."""
    rows = []
    handle = tiny.model.model.diffusion_model.img_in.register_forward_pre_hook(
        lambda _, args: rows.append(len(args[0]))
    )
    short("sample", first)
    draw(steps=1, negative=tiny.positive)
    handle.remove()
    assert rows == [2, 1, 1]


def test_loading_the_denoiser_runs_short(host, gpu, draw, management, monkeypatch):
    """Before a step is taken."""
    want = draw()["samples"]
    management.unload_all_models()
    model = host.run("LensModelLoader", model_name="Lens-tiny", dtype="float32")[0]
    base = host.module("nodes.host.residency").LensPatcher
    shortage = Shortage(first)
    monkeypatch.setattr(base, "load", before(base.load, shortage))
    assert torch.equal(draw(model=model)["samples"], want)
    assert shortage.calls == 2 and not shortage.leaked


def test_quantising_goes_on_on_the_cpu(host, gpu, management, monkeypatch):
    """Where the GPU has no room for one weight."""
    quantised = {"model_name": "Lens-tiny", "dtype": "float32", "quantization": "int8_weight_only"}
    want = host.run("LensModelLoader", **quantised)[0].model.state_dict()
    policy = host.module("lens_core.quant.policy")
    pack, devices = policy.pack, []

    def short(weight, mode, device):
        devices.append(str(device))
        if len(devices) > 2 and str(device) == "cpu:0":
            raise torch.OutOfMemoryError("test")
        return pack(weight, mode, device)

    monkeypatch.setattr(policy, "pack", short)
    model = host.run("LensModelLoader", **quantised)[0]
    assert devices[:3] == 3 * ["cpu:0"] and set(devices[3:]) == {"cpu"}
    got = model.model.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert str(model.load_device) == "cpu:0"


def test_loading_the_vae_onto_the_gpu_runs_short(host, tiny, management, monkeypatch):
    """ComfyUI's own way out would decode on the GPU with weights that never came there."""
    (want,) = host.run("LensVAEDecode", latent=EMPTY, vae=tiny.vae)
    for fails, calls in ((first, 2), (lambda call: call < 3, 3)):
        management.unload_all_models()
        shortage = Shortage(fails)
        with monkeypatch.context() as patch:
            patch.setattr(
                tiny.vae.patcher, "partially_load", before(tiny.vae.patcher.partially_load, shortage)
            )
            (image,) = host.run("VAEDecode", samples=EMPTY, vae=tiny.vae)
        assert shortage.calls == calls and not shortage.leaked
        torch.testing.assert_close(image, want)
        assert tiny.vae.patcher in management.loaded_models()


def test_the_last_resort_are_small_tiles(host, tiny, management, monkeypatch):
    """Of 32 x 32 latents: of ComfyUI's own, 64 x 64, one would be the whole of this picture."""
    decode, sizes = tiny.vae.first_stage_model.decode, []

    def short(samples: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(samples.shape[-2:]))
        if samples.shape[-2] * samples.shape[-1] > 32 * 32:
            raise torch.OutOfMemoryError("test")
        return decode(samples)

    monkeypatch.setattr(tiny.vae.first_stage_model, "decode", short, raising=False)
    (image,) = host.run("VAEDecode", samples={"samples": torch.zeros(1, 128, 40, 40)}, vae=tiny.vae)
    assert sizes[:2] == [(40, 40), (40, 40)] and len(sizes) > 8
    assert image.shape == (1, 640, 640, 3)


def test_a_training_run_is_not_taken_again(host, management):
    """Its steps have changed weights by then."""
    from types import SimpleNamespace

    recovery = host.module("nodes.host.recovery")
    guider = SimpleNamespace(
        model_patcher=SimpleNamespace(model=None, load_device=torch.device("cpu")), conds={}, model_options={}
    )
    shortage = Shortage(always)
    executor = type("Executor", (), {"class_obj": guider, "__call__": lambda self, *args: shortage(*args)})()
    with torch.inference_mode(False), torch.enable_grad(), pytest.raises(torch.OutOfMemoryError):
        recovery.sample_with_recovery(executor, torch.zeros(1))
    assert shortage.calls == 1


def test_an_older_comfyui_names_its_error(host, management, monkeypatch):
    is_shortage = host.module("nodes.host.recovery").is_shortage
    monkeypatch.delattr(management, "is_oom")
    assert is_shortage(torch.OutOfMemoryError("test")) and not is_shortage(RuntimeError("test"))
    again = host.module("lens_core.memory.recovery").OutOfMemory("test")
    assert not is_shortage(again)


def test_stock_clip_nodes_recover(host, tiny, short, management):
    shortage = short("encode", lambda call: call == 7)
    (positive,) = host.run("CLIPTextEncode", clip=tiny.clip, text="a red circle")
    assert torch.equal(positive[0][0], tiny.positive[0][0])
    assert shortage.calls > 24 and not shortage.leaked


def test_dense_experts_cannot_be_streamed(host, management, monkeypatch):
    """All the same the other models make room, and the error names the experts."""
    FakeGpu(1 << 40).install(monkeypatch)
    (clip,) = host.run(
        "LensEncoderLoader",
        encoder_name="gpt_oss_tiny_mxfp4.safetensors",
        experts="bfloat16",
        feature_cache=False,
    )
    layer = host.module("lens_core.encoder.gpt_oss").GptOssLayer
    shortage = Shortage(lambda call: call in (3, 101))
    monkeypatch.setattr(layer, "forward", before(layer.forward, shortage))
    host.run("CLIPTextEncode", clip=clip, text="x")
    shortage.fails = always
    with pytest.raises(torch.OutOfMemoryError, match="experts 'packed', with placement 'stream'"):
        host.run("CLIPTextEncode", clip=clip, text="y")
