"""What the steps of one picture share: the same velocities with it as without, and nothing mixed up."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lens_core.denoiser import DenoiserRun, LensDenoiser
from lens_core.denoiser.rope import joint_positions, rotary_table
from lens_core.kernels import EAGER_BLOCK, BlockKernels, block
from lens_core.kernels.block import SCORE_LIMIT
from lens_core.loading import load_denoiser
from lens_core.ops import sdpa
from tests.compare import relative_l2
from tests.reference import straight_line

CPU = torch.device("cpu")
# fp32 sums in another order, see test_modulation.py; of the whole model. Measured: 1e-7.
REORDERED = 1e-6
# Against the oracle, whose angles differ by 3e-5 near 1000 radians: see test_denoiser.py.
FP32 = 1e-5


def inputs(grid: tuple[int, int], tokens: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Latents and text features."""
    return torch.randn(batch, grid[0] * grid[1], 128), torch.randn(batch, tokens, 4, 64)


def test_a_run_changes_nothing(denoiser: LensDenoiser):
    """Over steps, sizes and text lengths that alternate, as with guidance and in one run's tiles."""
    levels = [1.0, 0.75, 0.25]
    run = DenoiserRun(levels)
    cases = [(grid, inputs(grid, tokens)) for grid in ((5, 3), (3, 5), (2, 2)) for tokens in (0, 1, 9)]
    for level in (*levels, 0.5):
        for grid, (x, text) in cases:
            arguments = (x, torch.tensor([level]), text, grid)
            assert relative_l2(denoiser(*arguments, run=run), denoiser(*arguments)) < REORDERED


def test_a_run_with_pictures_at_levels_of_their_own(denoiser: LensDenoiser):
    x, text = inputs((5, 3), 4, batch=3)
    sigma, run = torch.tensor([0.75, 0.5, 0.75]), DenoiserRun([0.875, 0.75])
    got = denoiser(x, sigma, text, (5, 3), run=run)
    for index in range(3):
        one = slice(index, index + 1)
        want = denoiser(x[one], sigma[one], text[one], (5, 3))
        # A batch's matrix products add in another order, too.
        assert relative_l2(got[one], want) < FP32


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_embedded_text_equals_its_features(denoiser: LensDenoiser, tokens: int):
    x, text = inputs((5, 3), tokens)
    sigma = torch.tensor([0.6])
    embedded = denoiser.embed_text(text)
    assert embedded.shape == (1, tokens, 128)
    assert torch.equal(denoiser(x, sigma, embedded, (5, 3)), denoiser(x, sigma, text, (5, 3)))


def test_rotations_belong_to_a_size_and_a_text_length(denoiser: LensDenoiser):
    run = DenoiserRun()
    names = [((5, 3), 4), ((3, 5), 4), ((5, 3), 0), ((15, 1), 4), ((5, 3), 5)]
    tables = [run.rotary(denoiser, *name, CPU) for name in names]
    for (grid, tokens), table in zip(names, tables, strict=True):
        positions = joint_positions(*grid, tokens, CPU)
        assert table.shape == (2, 15 + tokens, 32) and table.dtype == torch.float32
        assert torch.equal(table, rotary_table(positions, denoiser.config.axes_dims_rope, 10000.0))
        assert run.rotary(denoiser, grid, tokens, CPU) is table, "kept"
    assert not torch.equal(tables[0], tables[1]), "a portrait is no landscape"


def called(denoiser: LensDenoiser) -> Counter[str]:
    """Calls of every layer of the blocks from now on."""
    calls: Counter[str] = Counter()
    for name, layer in denoiser.named_modules():
        if name.startswith("transformer_blocks.") and isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


def test_the_last_blocks_text_ends_at_its_keys_and_values(
    denoiser: LensDenoiser, oracle: straight_line.Model
):
    """No one reads its text stream, so nothing of it is computed; the picture is the oracle's anyway."""
    calls, (x, text) = called(denoiser), inputs((5, 3), 9)
    got = denoiser(x, torch.tensor([0.6]), text, (5, 3))
    want = straight_line.velocity(oracle, x[0], list(text[0].unbind(1)), 0.6, 5, 3)
    assert relative_l2(got[0], want) < FP32
    layers = (name for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear))
    every = {name for name in layers if name.startswith("transformer_blocks.")}
    last = f"transformer_blocks.{len(denoiser.blocks) - 1}"
    unread = {f"{last}.{name}" for name in ("txt_mlp.w1", "txt_mlp.w2", "txt_mlp.w3", "attn.to_add_out")}
    assert unread < every
    assert calls == dict.fromkeys(every - unread, 1)


def ours(calls: list[tuple[str, Any]]) -> BlockKernels:
    """The definitions under another name, with an attention of their own; calls are noted."""

    def noted(name: str, operation: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append((name, args))
            return operation(*args)

        return run

    operations = ("add_modulate", "joint_heads", "swiglu", "attend")
    return BlockKernels("ours", *(noted(name, getattr(block, name)) for name in operations))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The denoiser's choice is ``ours``; -> its calls."""
    calls: list[tuple[str, Any]] = []
    kernels = ours(calls)
    monkeypatch.setattr("lens_core.denoiser.transformer.choose_block", lambda *_: kernels)
    return calls


def attentions(calls: list[tuple[str, Any]]) -> list[str]:
    return [name for name, _ in calls if name in ("attend", "joint_heads")]


def test_the_kernels_attention_asks_for_the_image_alone_at_the_end(denoiser: LensDenoiser, fast: list):
    x, text = inputs((5, 3), 4)
    arguments = (x, torch.tensor([0.6]), text, (5, 3))
    got = denoiser(*arguments)
    assert [args[-1] for name, args in fast if name == "attend"] == [False, False, True]
    assert attentions(fast) == 3 * ["attend"]
    want = denoiser(*arguments, attention=sdpa)
    assert relative_l2(got, want) < REORDERED


def test_another_attention_or_a_mask_takes_the_heads_alone(denoiser: LensDenoiser, fast: list):
    x, text = inputs((5, 3), 4)
    arguments = (x, torch.tensor([0.6]), text, (5, 3))
    denoiser(*arguments, attention=sdpa)
    denoiser(*arguments, text_real=torch.ones(1, 4, dtype=torch.bool))
    assert attentions(fast) == 6 * ["joint_heads"]


@pytest.mark.parametrize("stream", ["", "added_"])
@pytest.mark.parametrize("sign", [1, -1])
def test_layers_whose_scores_may_be_too_large_are_left_out(
    denoiser: LensDenoiser, fast: list, stream: str, sign: int, caplog: pytest.LogCaptureFixture
):
    """The largest weight counts, of either sign and in either stream; a text's query meets image keys too."""
    for index, factor in enumerate((1.01, 0.99, 0)):
        attention: Any = denoiser.blocks[index].attn
        for norm in attention.norms():
            norm.weight.fill_(0.1)
        attention.norm_k.weight[7] = 2.0
        getattr(attention, f"norm_{stream}q").weight[20] = sign * factor * SCORE_LIMIT / 8 / 2
    run = DenoiserRun()
    x, text = inputs((5, 3), 4)
    arguments = (x, torch.tensor([0.6]), text, (5, 3))
    with caplog.at_level(logging.INFO):
        got = [denoiser(*arguments, run=run) for _ in range(2)]
    assert attentions(fast) == 2 * ["joint_heads", "attend", "attend"]
    assert run.bounded(denoiser, x) == {denoiser.blocks[1].attn, denoiser.blocks[2].attn}
    assert caplog.messages == [
        "Attention of 1 of 3 blocks runs in PyTorch: their scores may exceed 56.",
    ]
    assert torch.equal(*got)
    assert relative_l2(got[0], denoiser(*arguments, attention=sdpa)) < REORDERED


def test_nothing_is_said_where_all_layers_are_bounded(
    denoiser: LensDenoiser, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO):
        assert len(DenoiserRun().bounded(denoiser, torch.zeros(1))) == 3
    assert caplog.messages == []


def test_bounds_are_of_the_weights_that_are_used(denoiser: LensDenoiser, monkeypatch: pytest.MonkeyPatch):
    """Patched ones, as ComfyUI hands them out."""
    largest = denoiser.blocks[1].attn.norm_k
    monkeypatch.setattr(
        denoiser, "weight_of", lambda norm, _: norm.weight * 100 if norm is largest else norm.weight
    )
    assert DenoiserRun().bounded(denoiser, torch.zeros(1)) == {
        denoiser.blocks[0].attn,
        denoiser.blocks[2].attn,
    }


def test_models_that_share_a_run_have_bounds_of_their_own(denoiser: LensDenoiser, tiny_folder: Path):
    """As copies of one model on several GPUs do."""
    other, run, like = load_denoiser(tiny_folder, torch.float32), DenoiserRun(), torch.zeros(1)
    for model in (denoiser, other, denoiser):
        assert run.bounded(model, like) == {block.attn for block in model.blocks}


def test_modulation_comes_back_from_ram(denoiser: LensDenoiser, monkeypatch: pytest.MonkeyPatch):
    """Planned levels and such as came on demand; what is new is still evaluated."""
    levels, dtype = [0.875, 0.625, 0.25], torch.float32
    first = DenoiserRun(levels)
    want = [first.modulation(denoiser, torch.tensor([level]), dtype) for level in (*levels, 0.5)]
    again = DenoiserRun(levels, first.in_ram())
    new = again.modulation(denoiser, torch.tensor([0.125]), dtype)
    monkeypatch.setattr("lens_core.denoiser.modulation.modulation", None)
    for level, tables in zip((*levels, 0.5), want, strict=True):
        got = again.modulation(denoiser, torch.tensor([level]), dtype)
        assert all(torch.equal(table, expected) for table, expected in zip(got, tables, strict=True))
    assert torch.equal(again.modulation(denoiser, torch.tensor([0.125]), dtype).blocks, new.blocks)


def slope(
    denoiser: LensDenoiser, x: Tensor, text: Tensor, along: Tensor, of_text: bool
) -> tuple[float, float]:
    """How a sum of velocities grows along a direction of the latents or the text: by gradients, and by steps
    to both sides."""
    sigma, weights = torch.tensor([0.6]), torch.randn(x.shape)

    def total(step: float) -> Tensor:
        moved = (x, text + step * along) if of_text else (x + step * along, text)
        return (denoiser(moved[0], sigma, moved[1], (5, 3)) * weights).sum()

    entry = text if of_text else x
    (gradient,) = torch.autograd.grad(total(0), entry)
    by_steps = (total(1e-2) - total(-1e-2)) / 2e-2
    return (gradient * along).sum().item(), by_steps.item()


@pytest.mark.parametrize("of_text", [False, True])
def test_gradients_go_through_the_definitions(tiny_folder: Path, of_text: bool, monkeypatch):
    """Where gradients of either input are asked for, the choice of kernels is not even looked at."""
    with torch.inference_mode(False), torch.enable_grad():
        denoiser = load_denoiser(tiny_folder, torch.float32).requires_grad_(False)
        x, text = inputs((5, 3), 4)
        (text if of_text else x).requires_grad_(True)
        monkeypatch.setattr("lens_core.denoiser.transformer.choose_block", None)
        by_gradient, by_steps = slope(
            denoiser, x, text, torch.randn(text.shape if of_text else x.shape), of_text
        )
        # The third derivative times 1e-4 / 6, and fp32's 1e-6 of a sum of 1000 over 2e-2. Measured: 2e-4.
        assert by_gradient == pytest.approx(by_steps, rel=2e-3)
        assert abs(by_gradient) > 1e-2


def test_a_single_weight_in_training_is_need_enough(tiny_folder: Path, fast: list):
    """Nothing that enters the blocks has gradients then."""
    with torch.inference_mode(False), torch.enable_grad():
        denoiser = load_denoiser(tiny_folder, torch.float32).requires_grad_(False)
        (x, text), sigma = inputs((5, 3), 4), torch.tensor([0.6])
        denoiser(x, sigma, text, (5, 3))
        assert attentions(fast) == 3 * ["attend"], "no gradients are asked for yet"
        fast.clear()
        trained: Any = denoiser.blocks[1].attn.to_out[0].weight.requires_grad_(True)
        denoiser(x, sigma, text, (5, 3)).sum().backward()
        assert fast == [] and trained.grad.abs().sum() > 0


def test_gradients_of_all_weights_and_without_a_need_the_choice(tiny_folder: Path, fast: list):
    with torch.inference_mode(False), torch.enable_grad():
        denoiser = load_denoiser(tiny_folder, torch.float32).requires_grad_(True)
        (x, text), sigma = inputs((5, 3), 4), torch.tensor([0.6])
        denoiser(x, sigma, text, (5, 3)).sum().backward()
        assert fast == []
        last = f"transformer_blocks.{len(denoiser.blocks) - 1}."
        for name, parameter in denoiser.named_parameters():
            unread = name.startswith((last + "txt_mlp", last + "txt_norm2", last + "attn.to_add_out"))
            unread = unread or name == last + "attn.norm_added_q.weight"
            assert unread or parameter.grad.abs().sum() > 0, name
        with torch.no_grad():
            denoiser(x, sigma, text, (5, 3))
        assert attentions(fast) == 3 * ["attend"]


def test_plain_kernels_have_no_attention_of_their_own(denoiser: LensDenoiser, monkeypatch):
    """And nobody looks for the bounds of their scores."""
    assert replace(EAGER_BLOCK).attend is None
    monkeypatch.setattr(DenoiserRun, "bounded", None)
    x, text = inputs((5, 3), 4)
    assert denoiser(x, torch.tensor([0.6]), text, (5, 3)).isfinite().all()


def test_two_models_in_one_run_are_kept_apart(denoiser: LensDenoiser):
    """As a guider of two MODELs asks them: by turns, at the same levels."""
    other = copy.deepcopy(denoiser)
    for layer in other.blocks:
        layer.img_mod[1].weight.data.mul_(2)
    run = DenoiserRun([0.7, 0.3])
    arguments = (torch.randn(1, 15, 128), torch.tensor([0.7]), torch.randn(1, 9, 4, 64), (5, 3))
    with torch.no_grad():
        for model in (denoiser, other, denoiser):
            assert torch.equal(model(*arguments, run=run), model(*arguments, run=DenoiserRun([0.7, 0.3])))
        assert not torch.equal(denoiser(*arguments, run=run), other(*arguments, run=run))
