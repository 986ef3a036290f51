"""LoRA as hooks: weights that change from prompt to prompt and step to step draw as in ComfyUI's own Lens.

What a run keeps (modulation, projected text) is of the weights without hooks, so it must not be used with
them. The LoRA of these tests is on both of what is kept, and on the blocks.
"""

from __future__ import annotations

import pytest
import torch

from tests.compare import relative_l2
from tests.host.helpers import random_context, write_lora

STEPS = 4
# Two fp32 implementations over four steps. Measured: 8e-7 at most.
SAME = 1e-5


@pytest.fixture
def node(host):
    """Runs one of ComfyUI's hook nodes by the name of its class."""
    from comfy_extras import nodes_hooks

    def run(name, **inputs):
        own = getattr(nodes_hooks, name)
        (result, *more) = getattr(own(), own.FUNCTION)(**inputs)
        return (result, *more) if more else result

    return run


@pytest.fixture
def hook(node, tiny, own_models):
    """A LoRA as a hook; ``keyframes`` are (share of the run, strength)."""
    write_lora(own_models / "loras" / "hook.safetensors", tiny.model.model.diffusion_model, 1.0)

    def run(strength=1.0, keyframes=()):
        hooks = node("CreateHookLoraModelOnly", lora_name="hook.safetensors", strength_model=strength)
        frames = None
        for start, factor in keyframes:
            given = {"strength_mult": factor, "start_percent": start, "prev_hook_kf": frames}
            frames = node("CreateHookKeyframe", **given)
        return node("SetHookKeyframes", hooks=hooks, hook_kf=frames)

    return run


@pytest.fixture
def both(host, tiny, stock_model):
    """Our MODEL and ComfyUI's own, with one schedule: shares of a run mean the same noise levels."""
    from comfy.model_management import unload_all_models

    shift = {"max_shift": 1.0, "base_shift": 1.0, "width": 1024, "height": 1024}
    yield [host.run("ModelSamplingFlux", model=model, **shift)[0] for model in (tiny.model, stock_model)]
    # ComfyUI takes a schedule back when another clone is loaded; EasyCache's tests ask for it before that.
    unload_all_models()


def check_same(both, draw, **conditioning):
    """Both draw it alike, and not as without hooks; our MODEL is as before afterwards."""
    before = draw(model=both[0], steps=STEPS)["samples"]
    ours, theirs = (draw(model=model, steps=STEPS, **conditioning)["samples"] for model in both)
    assert relative_l2(ours, theirs) < SAME
    assert relative_l2(ours, before) > 0.01, "the hooks do nothing"
    assert torch.equal(draw(model=both[0], steps=STEPS)["samples"], before), "something stayed"
    return ours


def test_hook_on_the_prompt(both, draw, node, hook, tiny):
    """And none on the negative: weights change back and forth in every step."""
    props = {"strength": 1.0, "set_cond_area": "default", "hooks": hook(0.7)}
    check_same(both, draw, positive=node("ConditioningSetProperties", cond_NEW=tiny.positive, **props))


def test_hook_on_prompt_and_negative_is_the_lora(both, draw, node, hook, host, tiny):
    props = {"strength": 1.0, "set_cond_area": "default", "hooks": hook(0.7)}
    pair = {"positive_NEW": tiny.positive, "negative_NEW": tiny.negative}
    positive, negative = node("PairConditioningSetProperties", **pair, **props)
    got = check_same(both, draw, positive=positive, negative=negative)
    lora = {"lora_name": "hook.safetensors", "strength_model": 0.7}
    (patched,) = host.run("LoraLoaderModelOnly", model=both[0], **lora)
    assert relative_l2(got, draw(model=patched, steps=STEPS)["samples"]) < SAME


def test_hook_on_the_prompt_with_a_negative_by_attention(both, draw, node, hook, host, tiny):
    """Both prompts' text goes through the weights of the prompt's hook, as through a LoRA's."""
    props = {"strength": 1.0, "set_cond_area": "default", "hooks": hook(0.7)}
    negative = [[random_context(1, 5), {}]]
    pair = {"positive_NEW": tiny.positive, "negative_NEW": negative}
    hooked = dict(
        zip(("positive", "negative"), node("PairConditioningSetProperties", **pair, **props), strict=True)
    )
    lora = {"lora_name": "hook.safetensors", "strength_model": 0.7}
    (patched,) = host.run("LoraLoaderModelOnly", model=both[0], **lora)
    nag = {"cfg": 1.0, "nag_scale": 8.0}
    got = draw(model=both[0], **hooked, **nag)["samples"]
    assert relative_l2(got, draw(model=patched, negative=negative, **nag)["samples"]) < SAME
    assert relative_l2(got, draw(model=both[0], **hooked, cfg=1.0)["samples"]) > 0.001


def test_strength_that_changes_during_the_run(both, draw, node, hook, tiny):
    hooks = hook(1.0, [(0.0, 0.2), (0.4, 1.0), (0.8, 0.0)])
    props = {"strength": 1.0, "set_cond_area": "default", "hooks": hooks}
    got = check_same(both, draw, positive=node("ConditioningSetProperties", cond_NEW=tiny.positive, **props))
    props["hooks"] = hook(1.0)
    constant = node("ConditioningSetProperties", cond_NEW=tiny.positive, **props)
    assert relative_l2(draw(model=both[0], steps=STEPS, positive=constant)["samples"], got) > 0.01


def test_two_prompts_with_hooks_of_their_own(both, draw, node, hook, tiny):
    """Each on a half of the picture; ComfyUI keeps both sets of weights."""
    halves = torch.zeros(1, 96, 64)
    halves[:, :48] = 1
    positive = None
    for text, strength, mask in (
        (tiny.positive, 0.7, halves),
        ([[random_context(1, 5), {}]], -0.7, 1 - halves),
    ):
        props = {"strength": 1.0, "set_cond_area": "default", "hooks": hook(strength), "mask": mask}
        part = node("ConditioningSetProperties", cond_NEW=text, **props)
        positive = part if positive is None else positive + part
    check_same(both, draw, positive=positive)


def test_hook_on_top_of_a_lora(both, draw, node, hook, host, tiny):
    """The hook comes to weights that are patched already."""
    props = {"strength": 1.0, "set_cond_area": "default", "hooks": hook(0.5)}
    lora = {"lora_name": "hook.safetensors", "strength_model": 0.5}
    patched = [host.run("LoraLoaderModelOnly", model=model, **lora)[0] for model in both]
    check_same(patched, draw, positive=node("ConditioningSetProperties", cond_NEW=tiny.positive, **props))


def test_hook_that_is_set_on_the_clip(both, draw, node, hook, host, tiny):
    """SetClipHooks: our CLIP hands the hook on to the prompt, and keeps its own features."""
    clip = node("SetClipHooks", clip=tiny.clip, hooks=hook(0.7), apply_to_conds=True, schedule_clip=False)
    positive, _ = host.run("LensTextEncode", clip=clip, prompt="a red circle", negative="")
    assert torch.equal(positive[0][0], tiny.positive[0][0]) and "hooks" in positive[0][1]
    got = check_same(both, draw, positive=positive)
    props = {"strength": 1.0, "set_cond_area": "default", "hooks": hook(0.7)}
    on_prompt = node("ConditioningSetProperties", cond_NEW=tiny.positive, **props)
    assert torch.equal(got, draw(model=both[0], steps=STEPS, positive=on_prompt)["samples"])


def test_hook_that_is_scheduled_on_the_clip(both, draw, node, hook, host, tiny):
    """One encoding for each keyframe, all with the same features."""
    hooks = hook(1.0, [(0.0, 0.2), (0.5, 1.0)])
    clip = node("SetClipHooks", clip=tiny.clip, hooks=hooks, apply_to_conds=True, schedule_clip=True)
    positive, _ = host.run("LensTextEncode", clip=clip, prompt="a red circle", negative="")
    assert [entry[1]["clip_start_percent"] for entry in positive] == [0.0, 0.5]
    check_same(both, draw, positive=positive)
