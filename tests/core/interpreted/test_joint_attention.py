"""The denoiser's attention kernel: against fp64 and its definition, at tiles' ends, and at its limits.

The block's own choice is bf16 alone, for fp16 overflows where scores are large. They are small in most of
these tests, so that fp16 can show what the interpreter's rough bf16 would hide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lens_core.config import DenoiserConfig
from lens_core.denoiser import NagOptions
from lens_core.denoiser.block import JointAttention
from lens_core.denoiser.nag import TwoPrompts
from lens_core.denoiser.rope import joint_positions, rotary_table
from lens_core.kernels import EAGER_BLOCK, block_registry
from lens_core.kernels import block as definitions
from lens_core.kernels.block import EXP2_HEADROOM, SCORE_LIMIT, HeadNorms, score_bound
from lens_core.kernels.block_registry import triton_block_kernels
from lens_core.kernels.triton import block_launch
from lens_core.tiny.models import DENOISER as TINY
from tests.compare import relative_l2
from tests.core import block_cases as cases
from tests.core import block_formulas as formulas
from tests.core.nag_cases import joint_rotary, shared_by

DTYPES = (torch.float16, torch.bfloat16)
# Queries, keys, weights and the result are rounded, 2^-12 = 2e-4 each in fp16. The interpreter cuts fp32 to
# bf16 instead of rounding it, 3e-3 each and always towards zero. Measured: 4.5e-4 and 7.9e-3.
FROM_FP64 = {torch.float16: 6e-4, torch.bfloat16: 1.2e-2}
# The definition itself is 4e-4 and 3e-3 away from fp64. Measured: 6.0e-4 and 8.3e-3.
FROM_DEFINITION = {torch.float16: 8e-4, torch.bfloat16: 1.5e-2}
# Queries and keys are rounded once, see test_block.py.
ROUNDING = {torch.float16: 3e-4, torch.bfloat16: 5e-3}
# 128 queries are a program's share and 64 keys a step: at, before and behind their ends.
ENDS = (1, 63, 64, 65, 127, 128, 129, 200)
LOG2E = math.log2(math.e)


@pytest.fixture(autouse=True)
def _large_programs(monkeypatch: pytest.MonkeyPatch):
    """What goes before attention is ``test_block.py``'s; here it takes few programs, for the interpreter's
    time goes by their number."""
    for name, size in (("_TOKENS", 64), ("_ROWS", 64), ("_NUMBERS", 2**16)):
        monkeypatch.setattr(block_launch, name, size)


def check(tokens: Sequence[int], batch: int, dtype: torch.dtype, image_only: bool, heads: int = 2) -> None:
    angle, rotary = cases.angles(tokens)
    streams = cases.projections(tokens, batch, heads, dtype)
    norms = cases.head_norms(len(tokens), dtype)
    got = block_launch.attend([qkv.clone() for qkv in streams], norms, rotary, image_only)
    exact = formulas.attended(*formulas.heads(streams, norms, angle)).split(list(tokens), dim=1)
    definition = definitions.attend(streams, norms, rotary, image_only)
    assert len(got) == len(definition) == (1 if image_only else len(tokens))
    for x, want, defined in zip(got, exact, definition, strict=False):
        assert x.shape == want.shape and x.dtype == dtype
        assert relative_l2(x, want) < FROM_FP64[dtype]
        assert relative_l2(x, defined) < FROM_DEFINITION[dtype]


@pytest.mark.parametrize("tokens", ENDS)
def test_image_alone(tokens: int):
    check((tokens,), 1, torch.float16, image_only=False, heads=1)


@pytest.mark.parametrize("image_only", [False, True])
@pytest.mark.parametrize(
    "tokens", [(1, 1), (64, 1), (63, 65), (128, 64), (129, 63), (1, 200), (65, 129)], ids=str
)
def test_image_and_text(tokens: tuple[int, int], image_only: bool):
    """Texts longer than the image, too."""
    check(tokens, 1, torch.float16, image_only, heads=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(3,), (9, 5), (5, 70)], ids=str)
def test_pictures_and_heads_do_not_mix(tokens: tuple[int, ...], dtype: torch.dtype):
    check(tokens, 2, dtype, image_only=False, heads=TINY.num_attention_heads)


@pytest.mark.parametrize("image_only", [False, True])
def test_bf16_at_the_ends_of_tiles(image_only: bool):
    check((129, 65), 1, torch.bfloat16, image_only, heads=1)


def test_as_many_heads_as_lens():
    check((3, 2), 1, torch.bfloat16, image_only=True, heads=24)


def test_the_self_test_passes(monkeypatch: pytest.MonkeyPatch):
    """All of it, in fp16: in bf16 the interpreter's cuts add up to more than it allows. Lens' own width."""
    monkeypatch.setattr(block_registry, "attends", lambda *_: True)
    assert block_registry.difference(torch.device("cpu"), torch.float16, 64) < FROM_DEFINITION[torch.float16]


def test_angles_of_a_picture():
    """The rotation table that the denoiser makes, of a picture that is wider than high."""
    positions = joint_positions(2, 3, 4, torch.device("cpu"))
    rotary = rotary_table(positions, TINY.axes_dims_rope, TINY.rope_theta)
    streams, norms = cases.projections((6, 4), 1, 1, torch.float16), cases.head_norms(2, torch.float16)
    want = definitions.attend(streams, norms, rotary, False)
    got = block_launch.attend([qkv.clone() for qkv in streams], norms, rotary, False)
    assert all(relative_l2(x, y) < FROM_DEFINITION[torch.float16] for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(3,), (2, 3)], ids=str)
def test_queries_and_keys_are_turned_in_place(tokens: tuple[int, ...], dtype: torch.dtype):
    """Queries times log2(e) / sqrt(D), so that the softmax is in powers of two; values stay as they are."""
    angle, rotary = cases.angles(tokens)
    streams, norms = cases.projections(tokens, 2, 2, dtype), cases.head_norms(len(tokens), dtype)
    exact = formulas.heads(streams, norms, angle)
    block_launch.attend(streams, norms, rotary, False)
    q, k, v = (
        torch.cat([qkv.unflatten(-1, (3, 2, 64))[:, :, index] for qkv in streams], dim=1)
        for index in range(3)
    )
    assert relative_l2(q, exact[0] * LOG2E / 8) < ROUNDING[dtype]
    assert relative_l2(k, exact[1]) < ROUNDING[dtype]
    assert torch.equal(v.double(), exact[2])


@pytest.mark.parametrize("image_only", [False, True])
@pytest.mark.parametrize("tokens", [(65,), (5, 67)], ids=str)
def test_nothing_is_written_but_projections_and_results(tokens: tuple[int, ...], image_only: bool, fences):
    angle, rotary = cases.angles(tokens)
    norms = cases.head_norms(len(tokens), torch.float16)
    streams = cases.projections(tokens, 2, 1, torch.float16)
    exact = formulas.attended(*formulas.heads(streams, norms, angle)).split(list(tokens), dim=1)
    fenced = [norm._replace(q=fences.around(norm.q), k=fences.around(norm.k)) for norm in norms]
    got = block_launch.attend(
        [fences.around(qkv) for qkv in streams], fenced, fences.around(rotary), image_only
    )
    for x, want in zip(got, exact, strict=False):
        assert relative_l2(x, want) < FROM_FP64[torch.float16]
    fences.assert_intact()


def test_projections_of_any_layout_stay_as_they_are():
    """The in-place work is done on a contiguous copy."""
    tokens, (angle, rotary) = (3, 4), cases.angles((3, 4))
    streams, norms = cases.projections(tokens, 2, 2, torch.float16), cases.head_norms(2, torch.float16)
    spread = [torch.stack([qkv, qkv], dim=-1) for qkv in streams]
    got = block_launch.attend([x[..., 0] for x in spread], norms, rotary, False)
    exact = formulas.attended(*formulas.heads(streams, norms, angle)).split(list(tokens), dim=1)
    assert all(relative_l2(x, y) < FROM_FP64[torch.float16] for x, y in zip(got, exact, strict=True))
    assert all(torch.equal(x[..., 0], qkv) for x, qkv in zip(spread, streams, strict=True))


# What the denoiser lets through: queries and keys of this gain have a bound of 55.8, just below the limit.
GAIN = 2.640625
AXIS = 8 * torch.eye(64)[0]  # as long as RMSNorm makes a vector of 64 channels
# The largest score, as a power of two.
LARGEST = score_bound(GAIN, GAIN, 64) * LOG2E
# The interpreter cuts the weights and the result, each up to 2^-7 and in the worst case the same way.
TWO_CUTS = 1.6e-2


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch):
    """``attend`` of queries, keys and values [T, 64] of image and text that are normed, turned and scaled
    already: -> result of the image [N, 64], and the same in fp64 of the same bf16 numbers."""
    monkeypatch.setattr(block_launch, "_turn", lambda *_, **__: None)

    def attend(
        image: Sequence[Tensor], text: Sequence[Tensor], gains: Sequence[float] = (GAIN, GAIN)
    ) -> tuple[Tensor, Tensor]:
        norms = [HeadNorms(torch.ones(64), torch.full((64,), gain).bfloat16(), 1e-6) for gain in gains]
        streams = [torch.cat(list(stream), dim=-1).bfloat16()[None] for stream in (image, text)]
        q, k, v = torch.cat(streams, dim=1)[0].double().chunk(3, dim=-1)
        scores = q[: len(image[0])] @ k.T
        weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
        (got,) = block_launch.attend(streams, norms, torch.zeros(2, len(q), 32), True)
        return got[0], weights @ v / weights.sum(-1, keepdim=True)

    return attend


def test_the_gain_is_at_the_limit():
    assert 0.99 * SCORE_LIMIT < score_bound(GAIN, GAIN, 64) <= SCORE_LIMIT


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("values", [1.0, 1.4e5])
def test_rows_whose_scores_are_all_near_the_limit(turned, sign: int, values: float):
    """Keys differ a little, and so do their weights; none is NaN, and not all are zero."""
    q = sign * AXIS.repeat(3, 1) * GAIN * LOG2E / 8
    keys = GAIN * (AXIS + torch.cat([torch.zeros(73, 1), torch.randn(73, 63)], dim=-1))
    keys[:, 0] -= torch.rand(73)
    v = values * (1 + torch.rand(73, 64))
    got, want = turned((q, keys[:3], v[:3]), (torch.zeros(70, 64), keys[3:], v[3:]))
    assert (q @ keys.T).abs().max() > 0.99 * LARGEST
    assert relative_l2(got, want) < TWO_CUTS


def test_a_row_with_scores_at_both_ends(turned):
    """Keys at the lower end count for nothing beside one at the upper, however many."""
    keys, values = torch.cat([-AXIS.repeat(99, 1), AXIS[None]]) * GAIN, torch.randn(101, 64)
    q = AXIS.repeat(100, 1) * GAIN * LOG2E / 8
    got, want = turned((q, keys, values[:100]), (q[:1], keys[:1], values[100:]))
    assert relative_l2(want, values[99:100].bfloat16().expand(100, -1)) < 1e-9
    assert relative_l2(got, want) < TWO_CUTS


def test_the_checkpoints_values_over_the_keys_of_a_large_picture(turned):
    """8,300 keys, all at the upper end: the largest sums there are."""
    q = AXIS.repeat(100, 1) * GAIN * LOG2E / 8
    keys, values = GAIN * AXIS.repeat(8300, 1), 1.4e5 * (1 - torch.rand(8300, 64) / 8)
    empty = torch.zeros(8200, 64)
    got, want = turned((q, keys[:100], values[:100]), (empty, keys[100:], values[100:]))
    assert want.max() > 1.3e5
    assert relative_l2(got, want) < TWO_CUTS


@pytest.mark.parametrize("gains", [(-5.0, 0.125), (0.125, -5.0)])
def test_the_larger_of_the_gains_bounds_the_scores(turned, gains: tuple[float, float]):
    """Scores of 150 as powers of two, above what the denoiser lets through: without the right number taken
    off, two to that power is infinite. The larger gain is the image's or the text's, and negative."""
    q = AXIS.repeat(3, 1) * 150 / 320
    keys = [abs(gain) * AXIS.repeat(3, 1) for gain in gains]
    values = torch.randn(6, 64)
    got, want = turned((q, keys[0], values[:3]), (q, keys[1], values[3:]), gains)
    assert relative_l2(got, want) < TWO_CUTS


def test_the_headroom_keeps_the_largest_sums_finite():
    """Ten thousand keys at the bound, with the checkpoint's largest values, and the lowest row's weights."""
    largest = 2.0**EXP2_HEADROOM * 1.4e5 * 10_000
    assert largest < 2.0**-20 * torch.finfo(torch.float32).max
    # The kernel's bound is up to 1 % for the keys' rounding and 2^-8 for the queries' above the true one.
    limit = SCORE_LIMIT * LOG2E
    lowest = -limit - max(limit * 1.01 * (1 + 2**-8) - EXP2_HEADROOM, 0)
    assert 2.0**lowest > 2.0**20 * torch.finfo(torch.bfloat16).tiny


@pytest.mark.parametrize(("wanted", "unwanted", "image_only"), [(5, 9, False), (9, 5, True), (5, 0, False)])
def test_a_layer_of_two_prompts(wanted: int, unwanted: int, image_only: bool):
    """The kernels overwrite what they read, and each prompt needs the image's projections."""
    config = DenoiserConfig(num_attention_heads=2)
    layer = JointAttention(config, nn).requires_grad_(False).half()
    streams = [torch.randn(2, count, config.hidden_size).half() for count in (12, wanted + unwanted)]
    rotary = joint_rotary(config, (4, 3), wanted, unwanted)
    prompts = TwoPrompts(wanted, NagOptions(4.0, 2.5, 0.5))
    got, want = (
        layer(streams, shared_by(layer, kernels, rotary, prompts), image_only)
        for kernels in (triton_block_kernels(), EAGER_BLOCK)
    )
    assert len(got) == len(want) == (1 if image_only else 2)
    for x, y in zip(got, want, strict=True):
        # The scale makes the difference of two answers, and their rounding, four times as large.
        assert relative_l2(x, y) < 4 * FROM_DEFINITION[torch.float16]
