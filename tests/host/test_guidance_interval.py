"""Guidance in a part of the steps: which forwards run, and what other nodes still get."""

from __future__ import annotations

import pytest
import torch

from tests.compare import relative_l2
from tests.host.helpers import random_context, recorded

STEPS = 5
EMPTY = {"samples": torch.zeros(1, 128, 6, 4)}


def texts(recorder) -> list[list[int]]:
    """Text tokens of the forwards at each noise level, in order."""
    levels: dict[float, list[int]] = {}
    for call in recorder.calls:
        levels.setdefault(call.sigma, []).append(call.text_tokens)
    assert list(levels) == sorted(levels, reverse=True)
    return [sorted(tokens) for tokens in levels.values()]


@pytest.fixture
def tokens(tiny) -> int:
    """Text tokens of the prompt; the negative has none."""
    return tiny.positive[0][0].shape[1]


@pytest.mark.parametrize(
    ("start", "end", "guided"),
    [
        (0.0, 1.0, range(5)),
        (0.2, 1.0, range(1, 5)),
        (0.0, 0.6, range(3)),
        (0.2, 0.6, range(1, 3)),
        (0.21, 0.61, range(2, 4)),
        (0.5, 0.5, []),
    ],
)
def test_the_negative_is_evaluated_inside_alone(tiny, draw, tokens, start, end, guided):
    model, recorder = recorded(tiny.model)
    draw(model=model, steps=STEPS, guidance_start=start, guidance_end=end)
    assert texts(recorder) == [[0, tokens] if step in guided else [tokens] for step in range(STEPS)]


def test_without_the_inputs_it_is_every_step_and_the_same_bits(draw):
    assert torch.equal(
        draw(steps=STEPS)["samples"], draw(steps=STEPS, guidance_start=0.0, guidance_end=1.0)["samples"]
    )


def test_outside_it_is_cfg_1(draw):
    nothing = draw(steps=STEPS, guidance_start=0.0, guidance_end=0.0)["samples"]
    assert torch.equal(nothing, draw(steps=STEPS, cfg=1.0)["samples"])
    assert relative_l2(nothing, draw(steps=STEPS)["samples"]) > 0.01


def test_a_run_in_two_parts_is_the_same_as_an_interval(host, tiny):
    """The first steps at cfg 5, the rest at cfg 1, by ComfyUI's own guider and SplitSigmas."""
    (noise,) = host.run("RandomNoise", noise_seed=1)
    (none,) = host.run("DisableNoise")
    (sampler,) = host.run("KSamplerSelect", sampler_name="euler")
    (levels,) = host.run("LensScheduler", steps=STEPS, latent=EMPTY, denoise=1.0)
    inputs = {"model": tiny.model, "positive": tiny.positive, "negative": tiny.negative}

    def run(noise, sigmas, latent, **guider):
        (guider,) = host.run("LensGuider", **inputs, **guider)
        return host.run(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=guider,
            sampler=sampler,
            sigmas=sigmas,
            latent_image=latent,
        )[0]

    whole = run(noise, levels, EMPTY, cfg=5.0, guidance_end=0.4)
    high, low = host.run("SplitSigmas", sigmas=levels, step=2)
    parts = run(none, low, run(noise, high, EMPTY, cfg=5.0), cfg=1.0)
    # The latents between the parts go through the latent format and back, in fp32.
    assert relative_l2(whole["samples"], parts["samples"]) < 1e-5


@pytest.mark.parametrize(
    ("sampler", "guided"),
    [
        ("dpmpp_2m", [1, 2]),
        ("euler_ancestral", [1, 2]),
        # Two levels a step but for the last: the step's own and one between it and the next.
        ("dpm_2", [2, 3, 4, 5]),
        # The level of the next step is asked for twice: ahead, and as that step's own.
        ("heun", [1, 2]),
    ],
)
def test_with_other_samplers(host, tiny, tokens, sampler, guided):
    model, recorder = recorded(tiny.model)
    (guider,) = host.run(
        "LensGuider",
        model=model,
        positive=tiny.positive,
        negative=tiny.negative,
        cfg=5.0,
        guidance_start=0.2,
        guidance_end=0.6,
    )
    (noise,) = host.run("RandomNoise", noise_seed=1)
    (chosen,) = host.run("KSamplerSelect", sampler_name=sampler)
    (levels,) = host.run("LensScheduler", steps=STEPS, latent=EMPTY, denoise=1.0)
    common = {"noise": noise, "guider": guider, "sampler": chosen, "latent_image": EMPTY}
    latents = host.run("SamplerCustomAdvanced", sigmas=levels, **common)[0]["samples"]
    assert latents.isfinite().all()
    seen = texts(recorder)
    assert [index for index, level in enumerate(seen) if 0 in level] == guided
    assert {len(set(level)) for level in seen} == {1, 2}


def test_functions_of_other_nodes_run_in_every_step(tiny, draw):
    """And get no negative where there is none, as at cfg 1."""
    model, scales = tiny.model.clone(), []

    def after(args):
        scales.append((args["cond_scale"], args["uncond"] is None))
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(after)
    got = draw(model=model, steps=STEPS, guidance_start=0.2, guidance_end=0.6)["samples"]
    assert scales == [(1.0, True), (5.0, False), (5.0, False), (1.0, True), (1.0, True)]
    assert torch.equal(got, draw(steps=STEPS, guidance_start=0.2, guidance_end=0.6)["samples"])


def test_a_node_that_needs_the_negative_at_any_cfg_gets_it(tiny, draw, tokens):
    model, recorder = recorded(tiny.model)
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"], disable_cfg1_optimization=True)
    got = draw(model=model, steps=STEPS, guidance_start=0.2, guidance_end=0.6)["samples"]
    assert texts(recorder) == STEPS * [[0, tokens]]
    # At cfg 1 the guided velocity is the prompt's own: what is evaluated beside it changes nothing.
    assert torch.equal(got, draw(steps=STEPS, guidance_start=0.2, guidance_end=0.6)["samples"])


def test_a_negative_of_the_same_length_leaves_the_joint_forward(tiny, draw, tokens):
    model, recorder = recorded(tiny.model)
    negative = [[random_context(1, tokens), {}]]
    draw(model=model, negative=negative, steps=STEPS, guidance_start=0.2, guidance_end=0.6)
    assert [call.batch for call in recorder.calls] == [1, 2, 2, 1, 1]


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.2), (-0.1, 1.0), (0.0, 1.5)])
def test_what_is_no_part_is_refused(draw, start, end):
    """Values that come through a link are not checked by ComfyUI."""
    with pytest.raises(Exception, match=rf"got start {start:g} and end {end:g}"):
        draw(guidance_start=start, guidance_end=end)


def test_comfyuis_own_lens_takes_it_too(draw, stock_model):
    model, recorder = recorded(stock_model)
    draw(model=model, steps=STEPS, guidance_start=0.2, guidance_end=0.6)
    assert [len(level) for level in texts(recorder)] == [1, 2, 2, 1, 1]
