"""nag_scale of LensGuider and LensSampler: when the negative is avoided, with what runs beside it."""

from __future__ import annotations

import logging

import pytest
import torch

from lens_core.denoiser import NagOptions
from tests.compare import relative_l2
from tests.host.helpers import random_context, random_latent, recorded
from tests.reference import nag_line, straight_line

STRONG = {"cfg": 1.0, "nag_scale": 8.0, "nag_tau": 2.5, "nag_alpha": 0.5}
# Sums of a matrix product with more rows may be taken in another order; fp32.
ORDER = 1e-5


@pytest.fixture
def negative() -> list:
    return [[random_context(1, 6), {}]]


def test_off_changes_no_bit_and_on_does(draw, negative):
    without = draw(cfg=1.0)["samples"]
    assert torch.equal(draw(cfg=1.0, negative=negative, nag_scale=0.0)["samples"], without)
    got = draw(negative=negative, **STRONG)["samples"]
    assert relative_l2(got, without) > 0.01
    other = draw(negative=[[random_context(1, 6, seed=1), {}]], **STRONG)["samples"]
    assert relative_l2(got, other) > 0.01


def test_the_prompt_itself_as_the_negative_changes_nothing(draw, tiny):
    same = draw(negative=tiny.positive, **STRONG)["samples"]
    assert relative_l2(same, draw(cfg=1.0)["samples"]) < ORDER


def test_the_forward_is_the_straight_lines(host, tiny, tiny_folder, negative):
    """One step of the guider against a rendering of three streams from the same features."""
    (guider,) = host.run("LensGuider", model=tiny.model, positive=tiny.positive, negative=negative, **STRONG)
    noise, sigmas = random_latent(1, (6, 4)), torch.tensor([1.0, 0.4])
    (sampler,) = host.run("KSamplerSelect", sampler_name="euler")
    # A latent of zeros is not shifted, and at sigma 1 the noise is all.
    sampler = sampler if not isinstance(sampler, tuple) else sampler[0]
    got = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0)
    oracle = straight_line.load_folder(tiny_folder)
    prompts = [list(text[0][0][0].unflatten(-1, (4, -1)).unbind(1)) for text in (tiny.positive, negative)]
    x = noise[0].flatten(1).T
    velocity = nag_line.velocity(oracle, x, prompts, 1.0, (6, 4), (8.0, 2.5, 0.5))
    # Euler's last latent is divided by 1 - sigma, as of a schedule that stops early.
    want = (x - 0.6 * velocity).T.unflatten(-1, (6, 4)) / (1 - 0.4)
    assert relative_l2(got[0], want) < ORDER


def test_one_forward_a_step(draw, tiny, negative):
    model, recorder = recorded(tiny.model)
    draw(model=model, negative=negative, **STRONG)
    assert [call.batch for call in recorder.calls] == [1, 1]


def test_an_empty_negative_is_a_prompt_of_no_tokens(draw):
    """As it is under guidance."""
    assert relative_l2(draw(**STRONG)["samples"], draw(cfg=1.0)["samples"]) > 0.001


def test_outside_the_guided_steps_it_is_off(draw, negative):
    nothing = draw(negative=negative, guidance_start=0.0, guidance_end=0.0, **STRONG)["samples"]
    assert torch.equal(nothing, draw(cfg=1.0)["samples"])
    half = draw(negative=negative, guidance_end=0.5, **STRONG)["samples"]
    whole = draw(negative=negative, **STRONG)["samples"]
    assert relative_l2(half, nothing) > 0.01 and relative_l2(half, whole) > 0.001


def test_a_negative_for_a_part_of_the_steps(host, draw, negative):
    """By the conditioning itself: above its range there is nothing to avoid."""
    (early,) = host.run("ConditioningSetTimestepRange", conditioning=negative, start=0.0, end=0.5)
    (late,) = host.run("ConditioningSetTimestepRange", conditioning=negative, start=0.999, end=1.0)
    none, got = (draw(negative=text, **STRONG)["samples"] for text in (late, early))
    assert torch.equal(none, draw(cfg=1.0)["samples"])
    assert relative_l2(got, none) > 0.01


def test_batches_with_padding(draw, tiny, negative):
    """Two prompts of different length in one batch, and a negative for both, equal each alone."""
    prompts = [random_context(1, 9, seed=2), random_context(1, 5, seed=3)]
    padded = torch.nn.functional.pad(prompts[1], (0, 0, 0, 4), value=1e3)
    mask = torch.arange(9) < torch.tensor([9, 5])[:, None]
    both = [[torch.cat([prompts[0], padded]), {"attention_mask": mask}]]
    latent = {"samples": torch.zeros(2, 128, 6, 4)}
    got = draw(positive=both, negative=negative, latent=latent, **STRONG)["samples"]
    for index, prompt in enumerate(prompts):
        one = {"samples": torch.zeros(1, 128, 6, 4), "batch_index": [index]}
        want = draw(positive=[[prompt, {}]], negative=negative, latent=one, **STRONG)["samples"]
        assert relative_l2(got[index], want[0]) < ORDER


def test_a_node_that_needs_both_predictions_gets_them(draw, tiny):
    """Prompt and negative in one forward then; guided away from itself the negative stays what it is."""
    negative = [[random_context(1, tiny.positive[0][0].shape[1]), {}]]
    model, recorder = recorded(tiny.model)
    seen = []

    def after(args):
        seen.append(args["uncond_denoised"])
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(after, disable_cfg1_optimization=True)
    got = draw(model=model, negative=negative, **STRONG)["samples"]
    assert [call.batch for call in recorder.calls] == [2, 2]
    assert relative_l2(got, draw(negative=negative, **STRONG)["samples"]) < ORDER
    model, _ = recorded(tiny.model)
    plain = []
    model.set_model_sampler_post_cfg_function(lambda args: plain.append(args["denoised"]) or args["denoised"])
    draw(model=model, positive=negative, cfg=1.0)
    assert relative_l2(seen[0], plain[0]) < ORDER


@pytest.mark.parametrize("kind", ["patch", "override"])
def test_nodes_between_the_blocks_work_with_it(draw, tiny, negative, kind):
    model, calls = tiny.model.clone(), []

    def override(attention, *arguments, **named):
        calls.append(arguments[0].shape[2])
        return attention(*arguments, **named)

    if kind == "override":
        model.model_options["transformer_options"]["optimized_attention_override"] = override
    else:
        model.set_model_patch(
            lambda args: calls.append(args["txt"].shape[1]) or {"img": args["img"], "txt": args["txt"]},
            "double_block",
        )
    got = draw(model=model, negative=negative, **STRONG)["samples"]
    assert relative_l2(got, draw(negative=negative, **STRONG)["samples"]) < ORDER
    tokens = tiny.positive[0][0].shape[1]
    assert set(calls) == ({24 + tokens, 24 + 6} if kind == "override" else {tokens + 6})


def test_the_step_cache_counts_it_as_one(host, draw, tiny, negative, caplog):
    caplog.set_level(logging.INFO)
    (model,) = host.run(
        "LensStepCache", model=tiny.model, threshold=1e9, start=0.0, end=1.0, max_consecutive=9
    )
    draw(model=model, negative=negative, steps=4, **STRONG)
    assert "2 of 4 forwards skipped 2 of 3 blocks." in caplog.text


# What is said


@pytest.fixture
def fresh(host) -> None:
    """As if nothing had been said yet."""
    host.module("lens_core.denoiser.nag")._say_once.cache_clear()
    host.module("nodes.host.guider")._say_first.cache_clear()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"cfg": 1.0}, "The negative has no effect at cfg 1. Set nag_scale"),
        ({"cfg": 5.0, "nag_scale": 4.0}, "nag_scale has no effect where cfg is not 1"),
    ],
)
def test_what_has_no_effect_is_said_once(fresh, draw, negative, caplog, inputs, words):
    for _ in range(2):
        draw(negative=negative, **inputs)
    assert caplog.text.count(words) == 1


def test_a_blank_negative_and_one_that_is_avoided_are_no_matter(fresh, draw, negative, caplog):
    draw(cfg=1.0)
    draw(negative=negative, **STRONG)
    assert "no effect" not in caplog.text


def test_of_several_negatives_the_first_is_taken(fresh, draw, negative, caplog):
    more = [*negative, [random_context(1, 4, seed=5), {}]]
    got = draw(negative=more, **STRONG)["samples"]
    assert torch.equal(got, draw(negative=negative, **STRONG)["samples"])
    assert caplog.text.count("works with the first") == 1


def test_no_negative_at_all_is_an_empty_one(draw):
    assert torch.equal(draw(negative=[], **STRONG)["samples"], draw(**STRONG)["samples"])


def test_comfyuis_own_network_is_refused(draw, stock_model, negative):
    with pytest.raises(Exception, match="Load the file with LensModelLoader"):
        draw(model=stock_model, negative=negative, **STRONG)


def test_settings_that_mean_nothing_are_refused(draw):
    """Values that come through a link are not checked by ComfyUI."""
    with pytest.raises(Exception, match="nag_tau must be at least 1"):
        draw(cfg=1.0, nag_scale=4.0, nag_tau=0.5)


@pytest.mark.parametrize("node", ["LensGuider", "LensSampler"])
def test_the_widgets_are_last_and_off_and_have_lens_cores_defaults(host, node):
    *_, scale, tau, alpha = host.node_classes[node].define_schema().inputs
    usual = NagOptions()
    assert [(widget.id, widget.default, widget.optional) for widget in (scale, tau, alpha)] == [
        ("nag_scale", usual.scale, True),
        ("nag_tau", usual.tau, True),
        ("nag_alpha", usual.alpha, True),
    ]
