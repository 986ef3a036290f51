"""What one sampling run computes once: the modulation of all its noise levels, and its text.

Counted at the layers themselves, in whole runs by our nodes and ComfyUI's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from lens_core.config import is_modulation
from lens_core.tiny import models
from tests.compare import relative_l2
from tests.host.helpers import random_context

STEPS = 4
LINEARS = 2 * models.DENOISER.num_layers
EMPTY = {"samples": torch.zeros(1, 128, 6, 4)}
# The rows of a matrix product over several noise levels against one of each, over four steps. Measured: 9e-7.
SAME = 1e-5


@pytest.fixture
def calls(tiny) -> Iterator[Counter]:
    """How often each layer of the shared network has run, by name."""
    counted: Counter = Counter()
    handles = [
        layer.register_forward_hook(lambda *_, name=name: counted.update([name]))
        for name, layer in tiny.model.model.diffusion_model.named_modules()
        if is_modulation(name) or name.startswith(("txt_in", "txt_norm."))
    ]
    yield counted
    for handle in handles:
        handle.remove()


def modulations(calls: Counter) -> list[int]:
    """How often each of the modulation's linears has run."""
    counts = [count for name, count in calls.items() if is_modulation(name)]
    assert len(counts) == LINEARS
    return counts


def without_run(model):
    """A clone whose steps keep nothing: every noise level is evaluated when it comes."""
    from comfy.patcher_extension import WrappersMP

    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, "lens")
    return clone


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_lens_sampler_evaluates_the_modulation_once(draw, tiny, calls, cfg):
    got = draw(steps=STEPS, cfg=cfg)["samples"]
    assert modulations(calls) == LINEARS * [1]
    calls.clear()
    want = draw(model=without_run(tiny.model), steps=STEPS, cfg=cfg)["samples"]
    assert modulations(calls) == LINEARS * [STEPS * (1 if cfg == 1 else 2)]
    assert relative_l2(got, want) < SAME


def test_part_of_a_schedule_and_batches_too(draw, calls):
    batch = {"samples": torch.zeros(3, 128, 6, 4)}
    draw(steps=STEPS, latent=batch, denoise=0.5, negative=[[random_context(1, 5), {}]])
    assert modulations(calls) == LINEARS * [1]


def test_a_run_of_more_levels_than_a_table_holds(draw, calls):
    """113 MB at most at once: 150 levels in three."""
    draw(steps=150, cfg=1.0)
    assert modulations(calls) == LINEARS * [3]


def test_stock_ksampler_evaluates_it_once(ksampler, tiny, calls):
    got = ksampler(steps=STEPS)
    assert modulations(calls) == LINEARS * [1]
    assert relative_l2(got, ksampler(without_run(tiny.model), steps=STEPS)) < SAME


@pytest.mark.parametrize("sampler", ["dpm_2", "dpmpp_2s_ancestral", "heun", "euler_ancestral", "uni_pc"])
def test_levels_between_the_schedules_are_evaluated_as_they_come(ksampler, tiny, calls, sampler):
    """Each once, for prompt and negative; those of the schedule together before the first step."""
    model, planned, seen = with_spy_on_levels(tiny.model)
    got = ksampler(model, steps=STEPS, sampler_name=sampler)
    between = seen - planned
    assert modulations(calls) == LINEARS * [1 + len(between)]
    assert bool(between) == (sampler in ("dpm_2", "dpmpp_2s_ancestral"))
    assert planned & seen, "no level of the schedule was asked for"
    assert relative_l2(got, ksampler(without_run(tiny.model), steps=STEPS, sampler_name=sampler)) < SAME


def with_spy_on_levels(model):
    """A clone; the levels of its runs' schedules; those that the network was asked for."""
    from comfy.patcher_extension import WrappersMP

    planned: set[float] = set()
    seen: set[float] = set()

    def wrapper(executor, x, timestep, context, mask, options, **kwargs):
        planned.update(options["sample_sigmas"].tolist())
        seen.update(timestep.tolist())
        return executor(x, timestep, context, mask, options, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    return clone, planned, seen


@pytest.mark.parametrize("guider", ["LensGuider", "CFGGuider", "BasicGuider"])
def test_sampler_custom_advanced(host, tiny, calls, guider):
    """With our guider and with ComfyUI's; a second run evaluates again, for weights may have changed."""
    both = {"positive": tiny.positive, "negative": tiny.negative, "cfg": 5.0}
    inputs = {"conditioning": tiny.positive} if guider == "BasicGuider" else both
    (guide,) = host.run(guider, model=tiny.model, **inputs)
    (noise,) = host.run("RandomNoise", noise_seed=1)
    (sampler,) = host.run("KSamplerSelect", sampler_name="euler")
    (levels,) = host.run("LensScheduler", steps=STEPS, latent=EMPTY, denoise=1.0)
    chain = {"noise": noise, "guider": guide, "sampler": sampler, "sigmas": levels, "latent_image": EMPTY}
    for runs in (1, 2):
        host.run("SamplerCustomAdvanced", **chain)
        assert modulations(calls) == LINEARS * [runs]


def test_no_steps_evaluate_nothing(host, tiny, calls):
    (guider,) = host.run("LensGuider", model=tiny.model, positive=tiny.positive, negative=[], cfg=1.0)
    (noise,) = host.run("RandomNoise", noise_seed=1)
    (sampler,) = host.run("KSamplerSelect", sampler_name="euler")
    chain = {"noise": noise, "guider": guider, "sampler": sampler, "latent_image": EMPTY}
    host.run("SamplerCustomAdvanced", sigmas=torch.tensor([]), **chain)
    assert not calls


@pytest.mark.parametrize("strength", [0.5, -1.0])
def test_lora_on_the_modulation(host, tiny, load_tiny, draw, own_models, strength):
    """The table of a run is that of its patched weights, and the next run's is its own."""
    from safetensors.torch import save_file

    name, path = "transformer_blocks.1.img_mod.1", own_models / "loras" / "modulation.safetensors"
    network = tiny.model.model.diffusion_model
    rows, columns = network.get_submodule(name).weight.shape
    generator = torch.Generator().manual_seed(4)
    down, up = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator) / 16
    key = f"diffusion_model.{name}.lora"
    save_file({f"{key}_A.weight": down, f"{key}_B.weight": up}, path)
    lora = {"lora_name": path.name, "strength_model": strength}
    before = draw(steps=STEPS)["samples"]
    (patched,) = host.run("LoraLoaderModelOnly", model=tiny.model, **lora)
    assert len(patched.patches) == 1
    merged = load_tiny()[0]
    layer = merged.model.diffusion_model.get_submodule(name)
    layer.weight = torch.nn.Parameter(layer.weight + strength * up @ down, requires_grad=False)
    got = draw(model=patched, steps=STEPS)["samples"]
    assert relative_l2(got, before) > 0.01, "the LoRA does nothing"
    # Measured: 0, for ComfyUI adds the same product.
    assert relative_l2(got, draw(model=merged, steps=STEPS)["samples"]) < SAME
    assert torch.equal(draw(steps=STEPS)["samples"], before)


def text_calls(calls: Counter) -> set[int]:
    """How often the text's norms and projection have run, as one number if they agree."""
    return {count for name, count in calls.items() if not is_modulation(name)}


def test_text_is_projected_once_a_run(draw, calls):
    """The prompt, and a negative that has text."""
    draw(steps=STEPS)
    assert text_calls(calls) == {1}
    calls.clear()
    draw(steps=STEPS, negative=[[random_context(1, 5), {}]])
    assert text_calls(calls) == {2}
    calls.clear()
    draw(steps=STEPS, negative=[[random_context(1, 5), {}]], cfg=1.0)
    assert text_calls(calls) == {2}, "ComfyUI prepares what it will not use"


def test_text_of_several_conditionings(host, tiny, draw, calls):
    """Each of two prompts that are combined."""
    (positive,) = host.run(
        "ConditioningCombine", conditioning_1=tiny.positive, conditioning_2=[[random_context(1, 5), {}]]
    )
    draw(steps=STEPS, positive=positive)
    assert text_calls(calls) == {2}


def test_projected_text_draws_the_same(tiny, draw, monkeypatch):
    """To the bit: it is the same product over the same rows."""
    want = draw(steps=STEPS)["samples"]
    monkeypatch.setattr(type(tiny.model.model), "embed_text", lambda self, text, device: text)
    assert torch.equal(draw(steps=STEPS)["samples"], want)


def test_text_under_hooks_is_projected_in_each_step(tiny, draw, calls):
    """A hook may change the projection at any step."""
    import comfy.hooks

    weight = {"diffusion_model.txt_in.bias": 2 * tiny.model.model.diffusion_model.txt_in.bias}
    hooks = comfy.hooks.create_hook_model_as_lora(weight, None, strength_model=1.0, strength_clip=0.0)
    draw(steps=STEPS, positive=comfy.hooks.set_hooks_for_conditioning(tiny.positive, hooks))
    assert text_calls(calls) == {STEPS}
