"""Normalised attention guidance: the formulas, the denoiser against a straight-line rendering with three
streams, its limits, and what runs beside it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lens_core.config import DenoiserConfig
from lens_core.denoiser import (
    BlockGraphs,
    DenoiserRun,
    LensDenoiser,
    NagOptions,
    Negative,
    StepCache,
    StepCacheOptions,
    nag,
)
from lens_core.denoiser.block import JointAttention
from lens_core.denoiser.nag import TwoPrompts, guide, warn_without_effect
from lens_core.errors import SettingError
from lens_core.interval import WHOLE
from lens_core.kernels import EAGER_BLOCK
from lens_core.kernels import block as kernels
from lens_core.quantized import quantize_denoiser
from tests.compare import relative_l2
from tests.core import graph_cases
from tests.core.nag_cases import joint_rotary, shared_by
from tests.reference import nag_line, straight_line

GRID, TOKENS = (5, 3), 15
# As for the velocity without it (test_denoiser): angles of the time embedding in fp32.
FP32 = 1e-5
STRONG = NagOptions(4.0, 1.5, 0.5)


def features(tokens: int, batch: int = 1) -> Tensor:
    """Text features whose layers differ in size a hundredfold, as the real ones do."""
    return torch.tensor([1.0, 5.0, 20.0, 100.0])[:, None] * torch.randn(batch, tokens, 4, 64)


def negative(
    denoiser: LensDenoiser, text: Tensor, options: NagOptions = STRONG, real: Tensor | None = None
) -> Negative:
    return Negative(denoiser.embed_text(text), options, real)


def case(tokens: int = 9, batch: int = 1) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Arguments of a forward."""
    return torch.randn(batch, TOKENS, 128), torch.full((batch,), 0.6), features(tokens, batch), GRID


# The formulas


@pytest.mark.parametrize("scale", [0.5, 4.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_formulas(dtype: torch.dtype, scale: float):
    """Rounding: a few steps of 2^-9 in bf16. Measured: 7e-16, 4e-7, 2.5e-3."""
    wanted, unwanted = (torch.randn(1, 40, 24 * 64, dtype=torch.float64).to(dtype) for _ in range(2))
    got = guide(wanted, unwanted, NagOptions(scale, 2.5, 0.25))
    want = nag_line.limited(wanted[0].double(), unwanted[0].double(), scale, 2.5, 0.25)
    assert got.dtype == dtype
    assert (
        relative_l2(got[0], want) < {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    )


@pytest.mark.parametrize(("scale", "tau"), [(1.0, 2.5), (50.0, 2.5), (1000.0, 1.0), (4.0, 1.5)])
def test_no_tokens_norm_is_above_its_limit(scale: float, tau: float):
    """Values as large as the checkpoint's; at alpha 1 nothing hides what the limit lets through."""
    size = 10 ** torch.linspace(-3, 5, 60)[:, None]
    wanted, unwanted = size * torch.randn(2, 60, 256), size * torch.randn(2, 60, 256)
    norm = guide(wanted, unwanted, NagOptions(scale, tau, 1.0)).abs().sum(-1) / wanted.abs().sum(-1)
    assert norm.max() < tau * (1 + 1e-5)
    assert scale == 1 or norm.min() > tau * (1 - 1e-5), "so large a scale meets the limit everywhere"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_equal_answers_the_same_bits(dtype: torch.dtype):
    same = torch.randn(2, 30, 256).to(dtype)
    same[0, 3] = 0  # no 0 / 0
    assert torch.equal(guide(same, same.clone(), STRONG), same)
    assert torch.equal(guide(same, torch.randn_like(same), NagOptions(4.0, 2.5, 0.0)), same)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"scale": -1.0}, "nag_scale must be 0"),
        ({"scale": math.inf}, "nag_scale must be 0"),
        ({"scale": math.nan}, "nag_scale must be 0"),
        ({"tau": 0.9}, "nag_tau must be at least 1"),
        ({"tau": math.nan}, "nag_tau must be at least 1"),
        ({"alpha": 1.1}, "nag_alpha must lie between"),
        ({"alpha": math.nan}, "nag_alpha must lie between"),
    ],
)
def test_settings_that_mean_nothing(wrong: dict[str, float], words: str):
    with pytest.raises(SettingError, match=words):
        NagOptions(**wrong)


@pytest.mark.parametrize(
    ("cfg", "scale", "given", "words"),
    [
        (1.0, 0.0, True, "nag_scale (4, say)"),
        (1.0, 0.0, False, None),
        (1.0, 4.0, True, None),
        (5.0, 4.0, True, "no effect where cfg is not 1"),
        (5.0, 0.0, True, None),
    ],
)
def test_what_has_no_effect_is_said_once(
    caplog: pytest.LogCaptureFixture, cfg: float, scale: float, given: bool, words: str | None
):
    nag._say_once.cache_clear()
    for _ in range(2):
        warn_without_effect(cfg, NagOptions(scale), given)
    assert caplog.messages == [] if words is None else words in "".join(caplog.messages)
    assert len(caplog.messages) <= 1


# The denoiser


@pytest.mark.parametrize(("wanted", "unwanted"), [(9, 9), (9, 4), (1, 12), (9, 0)])
@pytest.mark.parametrize("settings", [(4.0, 2.5, 0.25), (20.0, 1.5, 1.0)], ids=str)
def test_velocity_equals_the_straight_line(
    denoiser: LensDenoiser, oracle: straight_line.Model, wanted: int, unwanted: int, settings: tuple
):
    x, level, text, _ = case(wanted)
    other = features(unwanted)
    got = denoiser(x, level, text, GRID, negative=negative(denoiser, other, NagOptions(*settings)))
    prompts = [list(part[0].unbind(1)) for part in (text, other)]
    want = nag_line.velocity(oracle, x[0], prompts, 0.6, GRID, settings)
    assert relative_l2(got[0], want) < FP32
    assert relative_l2(got, denoiser(x, level, text, GRID)) > 0.01, "the negative must matter"


def test_a_negative_equal_to_the_prompt_changes_nothing(denoiser: LensDenoiser):
    x, level, text, _ = case()
    same = negative(denoiser, text, NagOptions(20.0, 2.5, 1.0))
    # On the CPU a product with more rows may be summed in another order.
    assert relative_l2(denoiser(x, level, text, GRID, negative=same), denoiser(x, level, text, GRID)) < 1e-6


def test_without_any_text_it_is_the_picture_alone(denoiser: LensDenoiser):
    arguments = case(0)
    got = denoiser(*arguments, negative=negative(denoiser, features(0)))
    assert torch.equal(got, denoiser(*arguments))


def test_a_padded_batch_equals_each_picture_alone(denoiser: LensDenoiser):
    """Both prompts differ in length from picture to picture; what stands in the padding is large."""
    lengths = {"wanted": (9, 4), "unwanted": (3, 7)}
    alone = {name: [features(count) for count in counts] for name, counts in lengths.items()}
    padded, real = {}, {}
    for name, parts in alone.items():
        most = max(lengths[name])
        rows = [torch.cat([x, torch.full((1, most - x.shape[1], 4, 64), 1e4)], 1) for x in parts]
        padded[name] = torch.cat(rows)
        real[name] = torch.arange(most) < torch.tensor(lengths[name])[:, None]
    x, level, _, _ = case(batch=2)
    unwanted = negative(denoiser, padded["unwanted"], real=real["unwanted"])
    got = denoiser(x, level, padded["wanted"], GRID, text_real=real["wanted"], negative=unwanted)
    for index in range(2):
        row = slice(index, index + 1)
        one = negative(denoiser, alone["unwanted"][index])
        want = denoiser(x[row], level[row], alone["wanted"][index], GRID, negative=one)
        assert relative_l2(got[row], want) < FP32


def test_one_negative_serves_a_batch(denoiser: LensDenoiser):
    x, level, text, _ = case(batch=2)
    other = features(4)
    got = denoiser(x, level, text, GRID, negative=negative(denoiser, other))
    want = denoiser(x, level, text, GRID, negative=negative(denoiser, other.expand(2, -1, -1, -1)))
    assert torch.equal(got, want)


def test_without_a_negative_nothing_of_it_runs(denoiser: LensDenoiser, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(JointAttention, "_guided", None)
    denoiser(*case())
    with pytest.raises(TypeError):
        denoiser(*case(), negative=negative(denoiser, features(4)))


# One layer of the real size


class OverwritingKernels:
    """Kernels that, as the fast ones may, overwrite the projections that they read."""

    @staticmethod
    def attend(streams: list[Tensor], *rest: Any) -> list[Tensor]:
        out = kernels.attend([x.clone() for x in streams], *rest)
        for x in streams:
            x.fill_(math.nan)
        return out


@pytest.mark.parametrize("fused", [False, True])
def test_a_layer_with_lens_own_heads(fused: bool):
    """Its 24 heads of 64 channels, whether the kernels have an attention of their own or not."""
    config = DenoiserConfig()
    layer = JointAttention(config, nn).requires_grad_(False)
    img, txt, other = (torch.randn(2, count, config.hidden_size) for count in (12, 5, 3))
    block_kernels = replace(EAGER_BLOCK, attend=OverwritingKernels.attend) if fused else EAGER_BLOCK
    shared = shared_by(layer, block_kernels, joint_rotary(config, (4, 3), 5, 3), TwoPrompts(5, STRONG))
    streams = [img, torch.cat([txt, other], 1)]
    got = layer(streams, shared, False)

    def qkv(linear: nn.Module, x: Tensor, q: Any, k: Any) -> list[Tensor]:
        parts = linear(x).view(*x.shape[:2], 3, -1, 64).unbind(2)
        return [q(parts[0]), k(parts[1]), parts[2]]

    for row in range(2):
        seen = []
        own = qkv(layer.img_qkv, img[row : row + 1], layer.norm_q, layer.norm_k)
        for text in (txt, other):
            added = qkv(layer.txt_qkv, text[row : row + 1], layer.norm_added_q, layer.norm_added_k)
            parts = (torch.cat(pair, 1)[0] for pair in zip(own, added, strict=True))
            seen.append(nag_line.attention(*parts, straight_line.denoiser_rope(4, 3, text.shape[1])))
        guided = nag_line.limited(*(out[:12] for out in seen), *(4.0, 1.5, 0.5))
        assert relative_l2(got[0][row], layer.to_out[0](guided)) < FP32
        assert relative_l2(got[1][row], layer.to_add_out(torch.cat([out[12:] for out in seen]))) < FP32


# Beside it


@pytest.mark.parametrize("mode", ["int8_dynamic", "float8_weight_only"])
def test_quantised_layers(denoiser: LensDenoiser, mode: str):
    """Off by the weights' and inputs' rounding, measured 0.007 and 0.015; far less than the
    negative matters."""
    arguments = case()
    other = negative(denoiser, features(4))
    want, without = denoiser(*arguments, negative=other), denoiser(*arguments)
    quantize_denoiser(denoiser, mode)
    error = relative_l2(denoiser(*arguments, negative=other), want)
    assert 1e-5 < error < 0.05 < relative_l2(without, want), (error, relative_l2(without, want))


def test_recorded_launches_know_where_the_prompts_part(
    denoiser: LensDenoiser, monkeypatch: pytest.MonkeyPatch
):
    """9 + 4 tokens are as many as 6 + 7; each is recorded, and played with its own settings."""
    graph_cases.install(monkeypatch)
    graphs = BlockGraphs()
    for wanted, unwanted, options in [(9, 4, STRONG), (6, 7, STRONG), (9, 4, NagOptions(1.0)), (13, 0, None)]:
        for _ in range(3):
            other = None if options is None else negative(denoiser, features(unwanted), options)
            graph_cases.check(denoiser, graphs, *case(wanted), negative=other)
    assert graphs.runs == graph_cases.runs(8, 4, 4)


def test_the_step_cache_goes_on_with_both_prompts(denoiser: LensDenoiser):
    """One that skips nothing gives the same bits; one that skips all it may skips two of four."""
    levels = [1.0, 0.8, 0.5, 0.2, 0.0]
    x, _, text, _ = case()
    other = negative(denoiser, features(4))

    def walk(cache: StepCache | None) -> Tensor:
        run = DenoiserRun(levels[:-1], cache=cache)
        named = {"run": run, "entry": "a", "negative": other}
        return torch.cat([denoiser(x, torch.tensor([at]), text, GRID, **named) for at in levels[:-1]])

    never, always = (StepCache(StepCacheOptions(limit, WHOLE), levels) for limit in (1e-30, 1e30))
    assert torch.equal(walk(never), walk(None))
    walk(always)
    assert (never.skipped, always.skipped) == (0, 2)
