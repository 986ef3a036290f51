"""LensStepCache in ComfyUI's runs: which forwards skip, what keeps them from it, what the log says."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lens_core.denoiser import StepCacheOptions
from lens_core.interval import Interval
from lens_core.pipeline import LensPipeline
from lens_core.sampling import reference_noise
from tests.compare import relative_l2
from tests.host.helpers import random_context, recorded, write_lora

STEPS = 10
EMPTY = {"samples": torch.zeros(1, 128, 6, 4)}
# Above every change: skips wherever it may.
ALWAYS = 10.0


@pytest.fixture(scope="module", autouse=True)
def more_nodes(host):
    """Nodes that ComfyUI loads beside its core ones."""
    import nodes

    for name in ("easycache", "hooks"):
        path = Path(nodes.__file__).parent / "comfy_extras" / f"nodes_{name}.py"
        assert asyncio.run(nodes.load_custom_node(str(path), module_parent="comfy_extras"))


@pytest.fixture
def cached(host, tiny) -> Callable:
    """A MODEL behind the node; keyword arguments replace its inputs."""

    def make(model=None, **changes):
        inputs = {"threshold": ALWAYS, "start": 0.0, "end": 1.0, "max_consecutive": 1000}
        (out,) = host.run("LensStepCache", model=model or tiny.model, **{**inputs, **changes})
        return out

    return make


@pytest.fixture
def ran(tiny) -> Iterator[list[int]]:
    """The index of every block that runs."""
    seen: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, index=index: seen.append(index))
        for index, block in enumerate(tiny.model.model.diffusion_model.transformer_blocks)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def full(ran: list[int]) -> list[bool]:
    """Of every forward of three blocks, whether it ran them all."""
    text = "".join(map(str, ran))
    assert text.replace("012", "").strip("0") == "", text
    return [part == "12" for part in text.split("0")[1:]]


def said(caplog) -> list[str]:
    return [message for message in caplog.messages if "forwards skipped" in message]


@pytest.fixture
def run(host, tiny) -> Callable:
    """SamplerCustomAdvanced over our parts; returns the latents."""

    def sample(model, sampler="euler", steps=STEPS, cfg=1.0, sigmas=None, positive=None, latent=EMPTY):
        (guider,) = host.run(
            "LensGuider", model=model, positive=positive or tiny.positive, negative=tiny.negative, cfg=cfg
        )
        (noise,) = host.run("RandomNoise", noise_seed=1)
        (chosen,) = host.run("KSamplerSelect", sampler_name=sampler)
        (levels,) = host.run("LensScheduler", steps=steps, latent=latent, denoise=1.0)
        levels = levels if sigmas is None else sigmas
        parts = {"noise": noise, "guider": guider, "sampler": chosen, "latent_image": latent}
        return host.run("SamplerCustomAdvanced", sigmas=levels, **parts)[0]["samples"]

    return sample


def test_a_threshold_of_0_is_no_cache(draw, cached, ran, caplog):
    caplog.set_level("INFO")
    assert torch.equal(draw(model=cached(threshold=0.0), steps=4)["samples"], draw(steps=4)["samples"])
    assert all(full(ran)) and not said(caplog)


def test_a_threshold_that_nothing_is_below_changes_no_bit(draw, cached, ran, caplog):
    caplog.set_level("INFO")
    got = draw(model=cached(threshold=1e-30), steps=4)["samples"]
    assert all(full(ran)) and said(caplog) == ["Lens: 0 of 8 forwards skipped 2 of 3 blocks."]
    assert torch.equal(got, draw(steps=4)["samples"])


def test_all_but_the_first_and_last_step_of_each_entry(draw, cached, ran, caplog):
    """Prompt and negative alternate; each is skipped by its own residuals."""
    caplog.set_level("INFO")
    got = draw(model=cached(), steps=STEPS)["samples"]
    assert full(ran) == [step in (0, STEPS - 1) for step in range(STEPS) for _ in range(2)]
    assert said(caplog) == ["Lens: 16 of 20 forwards skipped 2 of 3 blocks."]
    assert got.isfinite().all()
    assert relative_l2(got, draw(steps=STEPS)["samples"]) > 1e-3


def test_the_settings_arrive(draw, cached, ran):
    draw(model=cached(start=0.3, end=0.8, max_consecutive=2), steps=STEPS, cfg=1.0)
    assert full(ran) == [True, True, True, False, False, True, False, False, True, True]


def test_a_moderate_threshold_stays_nearer_than_a_large_one(draw, cached, ran):
    """Between two steps of random weights block 0's part changes by 0.6 to 1.2."""
    want = draw(steps=20)["samples"]
    distances, computed = [], []
    for threshold in (0.75, 0.95, ALWAYS):
        ran.clear()
        distances.append(relative_l2(draw(model=cached(threshold=threshold), steps=20)["samples"], want))
        computed.append(sum(full(ran)))
    assert 40 > computed[0] > computed[1] > computed[2] == 4
    assert 0 < distances[0] < distances[1] < distances[2]


def apart(args):
    """A calc_cond_batch function that evaluates prompt and negative in forwards of their own."""
    from comfy.samplers import calc_cond_batch

    common = args["input"], args["sigma"], args["model_options"]
    positive, negative = args["conds"]
    lists = ([positive, None], [None, negative])
    return [calc_cond_batch(args["model"], both, *common)[which] for which, both in enumerate(lists)]


@pytest.mark.parametrize("negative", ["", "a blue square"], ids=["empty", "as long as the prompt"])
def test_sampler_equals_the_pipeline(host, tiny, draw, cached, tiny_folder, caplog, negative):
    """lens_core's pipeline, which names its entries itself, skips the same and draws the same."""
    caplog.set_level("INFO")
    pipeline = LensPipeline.from_folder(tiny_folder, torch.device("cpu"), torch.float32)
    noise = reference_noise(5, 1, 24, 128, torch.bfloat16, "cpu").float()
    options = StepCacheOptions(0.95, Interval(0.2, 0.9), 2)
    common = {"noise": noise, "size": (96, 64), "steps": STEPS, "cfg": 5.0, "negative": negative}
    pictures = pipeline("a red circle", **common, guided=Interval(0.1, 0.7), step_cache=options)

    positive, unwanted = host.run("LensTextEncode", clip=tiny.clip, prompt="a red circle", negative=negative)
    assert unwanted[0][0].shape[1] == (positive[0][0].shape[1] if negative else 0)
    model, recorder = recorded(cached(threshold=0.95, start=0.2, end=0.9, max_consecutive=2))
    model.set_model_sampler_calc_cond_batch_function(apart)
    inputs = {"model": model, "negative": unwanted, "seed": 5, "noise": "reference"}
    got = draw(**inputs, steps=STEPS, guidance_start=0.1, guidance_end=0.7)["samples"]
    assert {call.batch for call in recorder.calls} == {1}
    decoded = (tiny.vae.decode(got) * 255).to(torch.uint8)
    assert (decoded.int() - pictures.int()).abs().max() <= 1
    theirs, ours = (re.search(r"(\d+) of (\d+) forwards", line).groups() for line in said(caplog))
    assert theirs == ours and 0 < int(ours[0]) < int(ours[1]) == 16


def test_entries_in_one_forward_are_skipped_together(tiny, draw, cached, ran):
    """ComfyUI joins what has one shape; how it joins them may change within a run, by free memory."""
    negative = [[random_context(1, tiny.positive[0][0].shape[1]), {}]]
    model, recorder = recorded(cached())
    steps = iter(range(STEPS))
    from comfy.samplers import calc_cond_batch

    def joined_at_times(args):
        if next(steps) in (4, 5):
            return apart(args)
        return calc_cond_batch(
            args["model"], args["conds"], *(args[key] for key in ("input", "sigma", "model_options"))
        )

    model.set_model_sampler_calc_cond_batch_function(joined_at_times)
    draw(model=model, negative=negative, steps=STEPS)
    assert [call.batch for call in recorder.calls] == [2, 2, 2, 2, 1, 1, 1, 1, 2, 2, 2, 2]
    # What is joined and what is apart are entries of their own; each begins with a step in full.
    assert full(ran) == [1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1]


def test_an_area_in_the_prompt_and_its_copy_in_the_negative_are_two(host, tiny, draw, cached, ran, caplog):
    """ComfyUI gives the negative an entry for the same area, under the same identifier."""
    caplog.set_level("INFO")
    place = {"width": 32, "height": 32, "x": 0, "y": 0, "strength": 1.0}
    (area,) = host.run("ConditioningSetArea", conditioning=tiny.positive, **place)
    negative = [[random_context(1, tiny.positive[0][0].shape[1]), {}]]
    model = cached()
    model.set_model_sampler_calc_cond_batch_function(apart)
    draw(model=model, positive=[*tiny.positive, *area], negative=negative, steps=4)
    assert full(ran) == [*4 * [True], *8 * [False], *4 * [True]]
    assert said(caplog) == ["Lens: 8 of 16 forwards skipped 2 of 3 blocks."]


def test_every_run_begins_anew(draw, cached, ran):
    """The same MODEL again, at the same size and at another."""
    model = cached()
    first = draw(model=model, steps=4, cfg=1.0)["samples"]
    assert torch.equal(draw(model=model, steps=4, cfg=1.0)["samples"], first)
    draw(model=model, steps=4, cfg=1.0, latent={"samples": torch.zeros(2, 128, 4, 4)})
    assert full(ran) == 3 * [True, False, False, True]


def test_a_run_in_two_parts(host, cached, run, ran):
    """Each part has its own first and last step."""
    (levels,) = host.run("LensScheduler", steps=8, latent=EMPTY, denoise=1.0)
    high, low = host.run("SplitSigmas", sigmas=levels, step=4)
    model = cached()
    run(model, sigmas=high)
    run(model, sigmas=low)
    assert full(ran) == 2 * [True, False, False, True]


@pytest.mark.parametrize(
    ("sampler", "skipped"),
    [
        # One evaluation a step.
        ("dpmpp_2m", 8),
        ("euler_ancestral", 8),
        ("uni_pc", 8),
        ("res_multistep", 8),
        # Two, one of them between two levels: that one is computed.
        ("dpm_2", 8),
        ("dpmpp_2s_ancestral", 8),
        # Two, one of them at the next step's level, which is found out at the second step.
        ("heun", 1),
        ("sa_solver_pece", 1),
        # Levels of its own.
        ("dpm_fast", 0),
    ],
)
def test_samplers(cached, run, ran, caplog, sampler, skipped):
    caplog.set_level("INFO")
    latents = run(cached(), sampler)
    forwards = full(ran)
    assert latents.isfinite().all()
    (line,) = said(caplog)
    assert f"Lens: {skipped} of {len(forwards)} forwards" in line
    assert forwards.count(False) == skipped
    assert ("noise level again" in line) == (sampler in ("heun", "sa_solver_pece"))


def test_heun_with_the_default_start_skips_nothing(cached, run, ran):
    """Its second evaluation of a level comes before the first step that may be skipped."""
    model = cached(start=0.2)
    run(model, "heun")
    assert all(full(ran))


def test_noise_put_back_into_a_picture(host, cached, run, ran):
    """A rising schedule is computed in full."""
    (levels,) = host.run("LensScheduler", steps=4, latent=EMPTY, denoise=1.0)
    (rising,) = host.run("FlipSigmas", sigmas=levels)
    run(cached(), sigmas=rising)
    assert all(full(ran))


HOOKS = {
    "patches_replace": lambda model: model.set_model_patch_replace(
        lambda args, extra: extra["original_block"](args), "dit", "double_block", 1
    ),
    "double_block": lambda model: model.set_model_double_block_patch(lambda args: args),
    "attention": lambda model: model.model_options["transformer_options"].update(
        optimized_attention_override=lambda original, *args, **kwargs: original(*args, **kwargs)
    ),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_all_blocks_run_where_another_node_works_between_them(draw, cached, ran, caplog, hook):
    caplog.set_level("INFO")
    model = cached()
    HOOKS[hook](model)
    got = draw(model=model, steps=4)["samples"]
    assert all(full(ran))
    (line,) = said(caplog)
    assert line == (
        "Lens: 0 of 8 forwards skipped 2 of 3 blocks (another node works between the blocks or on their "
        "attention, and must see them all)."
    )
    assert relative_l2(got, draw(steps=4)["samples"]) < 1e-5


def test_all_blocks_run_where_hooks_change_the_weights(host, tiny, draw, own_models, cached, ran, caplog):
    """A LoRA on the prompt alone; the negative's forwards have none and skip."""
    caplog.set_level("INFO")
    write_lora(own_models / "loras" / "cache_hook.safetensors", tiny.model.model.diffusion_model, 1.0)
    (hooks,) = host.run("CreateHookLoraModelOnly", lora_name="cache_hook.safetensors", strength_model=1.0)
    settings = {"strength": 1.0, "set_cond_area": "default", "hooks": hooks}
    (hooked,) = host.run("ConditioningSetProperties", cond_NEW=tiny.positive, **settings)
    draw(model=cached(), positive=hooked, steps=4)
    assert full(ran).count(False) == 2
    assert said(caplog) == [
        "Lens: 2 of 8 forwards skipped 2 of 3 blocks (hooks change the weights during the run)."
    ]


def test_a_patch_before_the_blocks_is_no_hindrance(draw, cached, ran):
    model = cached()
    model.set_model_patch(lambda args: {"img": args["img"] * 1.01, "txt": args["txt"]}, "post_input")
    draw(model=model, steps=4, cfg=1.0)
    assert full(ran) == [True, False, False, True]


def test_a_later_node_has_the_last_word(draw, cached, ran):
    draw(model=cached(cached(), threshold=0.0), steps=4)
    assert all(full(ran))


def test_the_nodes_input_stays_as_it_is(draw, cached, ran, tiny):
    cached()
    draw(steps=4)
    assert all(full(ran))


def test_beside_easycache(host, draw, cached, ran):
    """What EasyCache leaves out never arrives; of what arrives the cache skips its own."""
    settings = {"reuse_threshold": 0.5, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    (model,) = host.run("EasyCache", model=cached(threshold=0.95), **settings)
    got = draw(model=model, steps=20)["samples"]
    assert len(full(ran)) < 40 and not all(full(ran))
    assert got.isfinite().all()


def test_comfyuis_own_lens_is_refused_with_a_way_out(cached, stock_model):
    with pytest.raises(Exception, match=r"LensTransformer2DModel; .* LensModelLoader.* EasyCache"):
        cached(stock_model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threshold": -1.0}, "got -1"),
        ({"start": 0.8, "end": 0.2}, "got start 0.8 and end 0.2"),
        ({"max_consecutive": 0}, "got 0"),
    ],
)
def test_bad_values_through_links_are_refused(cached, changes, said):
    with pytest.raises(Exception, match=said):
        cached(**changes)
