"""Out of memory while sampling: the run begins again with streamed weights, and draws the same picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.host import fake_graphs
from tests.host.fake_gpu import FakeGpu, own_bytes
from tests.host.shortage import Shortage, always, before, first, shorten

STEPS = 3
EMPTY = {"samples": torch.zeros(1, 128, 6, 4)}


@pytest.fixture
def short(host, tiny, monkeypatch):
    """Makes a stage run short of memory."""
    return shorten(host, tiny, monkeypatch)


# Each step has a forward for the prompt and one for the negative.
@pytest.mark.parametrize("forward", range(1, 2 * STEPS + 1))
def test_every_forward_of_sampling(draw, short, management, progress, forward):
    """From step 0 with the same noise. The bar falls to 0, and on as soon as the step shown last is reached:
    ComfyUI's sends no smaller number, unless there are previews, of which each step has one."""
    want = draw(steps=STEPS)["samples"]
    progress.clear()
    shortage = short("sample", lambda call: call == forward)
    assert torch.equal(draw(steps=STEPS)["samples"], want)
    assert shortage.calls == forward + 2 * STEPS and not shortage.leaked
    begun = list(range(1, (forward + 1) // 2))
    bars = [done for done, _, preview in progress if preview is None]
    assert bars == [*begun, 0, *range(max(1, len(begun)), STEPS + 1)]
    shown = [done for done, _, preview in progress if preview is not None]
    assert shown == [*begun, *range(1, STEPS + 1)]


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


def test_a_training_run_is_not_taken_again(host, management):
    """Its steps have changed weights by then."""
    from types import SimpleNamespace

    recovery = host.module("nodes.host.recovery")
    patcher = SimpleNamespace(model=None, load_device=torch.device("cpu"))
    patcher.get_additional_models_with_key = lambda key: []
    guider = SimpleNamespace(model_patcher=patcher, conds={}, model_options={})
    shortage = Shortage(always)
    executor = type("Executor", (), {"class_obj": guider, "__call__": lambda self, *args: shortage(*args)})()
    with torch.inference_mode(False), torch.enable_grad(), pytest.raises(torch.OutOfMemoryError):
        recovery.sample_with_recovery(executor, *torch.zeros(4, 1))
    assert shortage.calls == 1
