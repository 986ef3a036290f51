"""Hooks of other packs see the same in our network as in ComfyUI's own Lens, and do the same.

Every test runs one hook on both networks over the same weights and compares what the hook was given
and what came out.
"""

from __future__ import annotations

import pytest
import torch

from lens_core.tiny import models
from tests.compare import relative_l2
from tests.host.helpers import random_context, random_latent

GRID, TOKENS = (7, 4), 13
IMAGE = GRID[0] * GRID[1]
BLOCKS, HIDDEN = models.DENOISER.num_layers, models.DENOISER.hidden_size
# Two fp32 implementations, as in test_denoiser_parity. Measured: 2e-7.
SAME = 2e-6


@pytest.fixture(scope="module")
def stock(stock_lens):
    return stock_lens()


@pytest.fixture
def networks(tiny, stock):
    """(our network, ComfyUI's)."""
    return tiny.model.model.diffusion_model, stock


def forward(network, options=None, **kwargs):
    x, sigma = random_latent(2, GRID), torch.tensor([0.7, 0.3])
    context = random_context(2, TOKENS)
    return network(x, sigma, context, transformer_options=options or {}, **kwargs)


def on_both(networks, make_hook, make_options, **kwargs):
    """Run one hook on both; checks that it changes the result, and alike. Returns (notes, notes)."""
    notes = []
    results = []
    for network in networks:
        seen: list = []
        options = make_options(make_hook(seen))
        before = dict(options)
        results.append(forward(network, options, **kwargs))
        assert options == before, "the caller's options were changed"
        notes.append(seen)
    assert relative_l2(results[0], results[1]) < SAME
    assert relative_l2(results[0], forward(networks[0])) > 1e-3, "the hook did nothing"
    return notes


def shapes(args: dict) -> dict:
    return {key: tuple(value.shape) for key, value in args.items() if torch.is_tensor(value)}


def test_diffusion_model_wrapper(networks):
    from comfy.patcher_extension import WrappersMP

    def make_hook(seen):
        def wrapper(executor, x, timestep, context, attention_mask, transformer_options, **kwargs):
            seen.append((type(executor.class_obj), x.shape, timestep, context.shape, attention_mask, kwargs))
            return executor(2 * x, timestep, context, attention_mask, transformer_options, **kwargs) + 1

        return wrapper

    def make_options(hook):
        return {"wrappers": {WrappersMP.DIFFUSION_MODEL: {"test": [hook]}}}

    ours, theirs = on_both(networks, make_hook, make_options)
    assert len(ours) == len(theirs) == 1
    assert [type(network) for network in networks] == [ours[0][0], theirs[0][0]]
    assert ours[0][1] == theirs[0][1] and torch.equal(ours[0][2], theirs[0][2])
    assert ours[0][3:] == theirs[0][3:]


def test_wrappers_run_in_order(networks):
    from comfy.patcher_extension import WrappersMP

    def wrapper(factor, add):
        return lambda executor, x, *args, **kwargs: executor(factor * x, *args, **kwargs) + add

    wrappers = {"a": [wrapper(2, 0)], "b": [wrapper(1, 3), wrapper(0.5, 0)]}
    options = {"wrappers": {WrappersMP.DIFFUSION_MODEL: wrappers}}
    assert torch.equal(forward(networks[0], options), forward(networks[0]) + 3)
    assert relative_l2(forward(networks[0], options), forward(networks[1], options)) < SAME


def test_apply_model_wrapper(draw, tiny, stock_model):
    """Around the whole step, on MODEL: x and the result are still the sampler's."""
    from comfy.patcher_extension import WrappersMP

    results, notes = [], []
    for model in (tiny.model, stock_model):
        clone, seen = model.clone(), []

        def wrapper(executor, x, t, *args, seen=seen, **kwargs):
            seen.append((tuple(x.shape), round(t.item(), 5), len(args), sorted(kwargs)))
            return 0.5 * executor(x, t, *args, **kwargs)

        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", wrapper)
        results.append(draw(model=clone)["samples"])
        notes.append(seen)
    assert notes[0] == notes[1] and len(notes[0]) == 4
    assert relative_l2(*results) < 1e-5
    assert relative_l2(results[0], draw()["samples"]) > 0.01


def replace_options(hook, index=1):
    return {"patches_replace": {"dit": {("double_block", index): hook}}}


def test_block_replacement_by_itself_is_bitwise_the_same(networks):
    seen, at = [], []

    def identity(args, extra):
        options = args["transformer_options"]
        at.append((options["block_index"], options["total_blocks"], options["block_type"]))
        seen.append(args)
        return extra["original_block"](args)

    for network in networks:
        assert torch.equal(forward(network, replace_options(identity)), forward(network))
    ours, theirs = seen
    assert ours.keys() == theirs.keys() == {"img", "txt", "vec", "pe", "attn_mask", "transformer_options"}
    for key in ("img", "txt", "vec"):
        assert relative_l2(ours[key], theirs[key]) < SAME
    assert ours["img"].shape == (2, IMAGE, HIDDEN) and ours["txt"].shape == (2, TOKENS, HIDDEN)
    assert at == [(1, BLOCKS, "double")] * 2


def test_block_replacement_may_change_everything(networks):
    def make_hook(seen):
        def hook(args, extra):
            seen.append(shapes({key: args[key] for key in ("img", "txt", "vec")}))
            out = extra["original_block"]({**args, "img": 1.1 * args["img"], "vec": 0.9 * args["vec"]})
            return {"img": out["img"] + 0.1, "txt": -out["txt"]}

        return hook

    ours, theirs = on_both(networks, make_hook, replace_options)
    assert ours == theirs and len(ours) == 1


def test_block_may_be_left_out(networks):
    """What step-skipping caches do: return the block's input."""
    on_both(networks, lambda _: lambda args, _: {"img": args["img"], "txt": args["txt"]}, replace_options)


def test_replacement_may_change_options_for_its_block(networks):
    """transformer_options handed to original_block reach its attention, and only its."""

    def make_hook(seen):
        def override(original, *args, **kwargs):
            seen.append(kwargs["transformer_options"]["block_index"])
            return 0.5 * original(*args, **kwargs)

        def hook(args, extra):
            own = {**args["transformer_options"], "optimized_attention_override": override}
            return extra["original_block"]({**args, "transformer_options": own})

        return hook

    assert on_both(networks, make_hook, replace_options) == [[1], [1]]


@pytest.mark.parametrize("name", ["double_block", "post_input"])
def test_patches(networks, name):
    def make_hook(seen):
        def hook(args):
            seen.append((shapes(args), sorted(args), args.get("block_index")))
            return {"img": 1.1 * args["img"], "txt": args["txt"] + 0.1}

        return hook

    ours, theirs = on_both(networks, make_hook, lambda hook: {"patches": {name: [hook, hook]}})
    assert ours == theirs
    assert len(ours) == (2 * BLOCKS if name == "double_block" else 2)


def test_attention_override_is_called_once_a_block(networks):
    def make_hook(seen):
        def override(original, q, k, v, heads, mask=None, **kwargs):
            options = kwargs["transformer_options"]
            names = ("block_index", "total_blocks", "block_type")
            seen.append((*(options[key] for key in names), q.shape, k.shape, v.shape, heads))
            return 0.9 * original(q, k, v, heads, mask=mask, **kwargs)

        return override

    ours, theirs = on_both(networks, make_hook, lambda hook: {"optimized_attention_override": hook})
    assert ours == theirs and [note[0] for note in ours] == list(range(BLOCKS))


@pytest.mark.parametrize(
    "residuals",
    [
        [torch.full((2, IMAGE, HIDDEN), 0.5)],
        [None, torch.full((2, IMAGE // 2, HIDDEN), 0.5), torch.full((2, IMAGE, HIDDEN), -0.5)],
        BLOCKS * [torch.full((1, IMAGE, 1), 0.2)],
        [torch.full((2, IMAGE, HIDDEN), 0.5)] + 9 * [None],
    ],
    ids=["first", "gap_and_part", "broadcast", "more_than_blocks"],
)
def test_control_residuals(networks, residuals):
    results = [forward(network, control={"input": residuals}) for network in networks]
    assert relative_l2(*results) < SAME
    assert relative_l2(results[0], forward(networks[0])) > 1e-3


def test_control_without_residuals(networks):
    for control in (None, {}, {"output": [torch.ones(1)]}, {"input": []}, {"input": [None]}):
        assert torch.equal(forward(networks[0], control=control), forward(networks[0]))


def test_hooks_set_through_model_methods(draw, tiny, stock_model):
    """The same by ModelPatcher's own methods, through a whole run at cfg 5 with an empty negative."""

    def double_block(args):
        return {"img": 1.05 * args["img"], "txt": args["txt"]}

    def first_block(args, extra):
        out = extra["original_block"](args)
        return {"img": out["img"] + 0.1, "txt": out["txt"]}

    def with_control(apply_model, args):
        return apply_model(args["input"], args["timestep"], **args["c"]) * 0.99

    results = []
    for model in (tiny.model, stock_model):
        clone = model.clone()
        clone.set_model_double_block_patch(double_block)
        clone.set_model_patch_replace(first_block, "dit", "double_block", 0)
        clone.set_model_unet_function_wrapper(with_control)
        results.append(draw(model=clone)["samples"])
    # Two steps in fp32; measured: 8e-7.
    assert relative_l2(*results) < 1e-5
    assert relative_l2(results[0], draw()["samples"]) > 0.01
