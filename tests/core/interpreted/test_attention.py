"""The attention kernel against its definition and a plain fp64 softmax with a sink."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lens_core.config import EncoderConfig
from lens_core.encoder.attention import yarn_table
from lens_core.encoder.packing import Packing, pack
from lens_core.kernels import AttentionPlan, eager
from lens_core.kernels.triton import launch
from tests.compare import relative_l2

DTYPES = (torch.float16, torch.bfloat16)
# Rotated queries and keys, softmax weights and the result are rounded, 2^-12 = 2e-4 each in fp16. The
# interpreter cuts fp32 to bf16 instead of rounding it, which is 2e-3 each and always towards zero, so
# errors of a few places add up. Measured: 3.4e-4 and 9.0e-3.
FROM_FP64 = {torch.float16: 1e-3, torch.bfloat16: 1.5e-2}
# The definition itself is 3e-4 and 2e-3 away from fp64.
FROM_DEFINITION = {torch.float16: 1e-3, torch.bfloat16: 1.5e-2}
WINDOW = 128
CONFIG = EncoderConfig()


def inputs(tokens: int, prefix: int, dtype: torch.dtype, heads: int = 8, shared: int = 1) -> list[Tensor]:
    """q, k, v, the prefix's keys and values, sinks. Sinks as large as scores, so that they count."""
    shapes = (tokens, heads, 64), (tokens, shared, 64), (tokens, shared, 64), (2, prefix, shared, 64)
    return [*(torch.randn(shape).to(dtype) for shape in shapes), (2 * torch.randn(heads)).to(dtype)]


def planned(packing: Packing, prefix: int, dtype: torch.dtype) -> AttentionPlan:
    rotary = yarn_table(CONFIG, packing.positions)
    return AttentionPlan(packing.blocks, packing.positions, rotary, prefix, WINDOW, dtype)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    cos, sin = yarn_table(CONFIG, positions).double()[:, :, None]
    a, b = x.double()[..., :32], x.double()[..., 32:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def softmax_with_sink(tensors: list[Tensor], packing: Packing, prefix: int, sliding: bool) -> Tensor:
    """fp64, one prompt and one head at a time."""
    q, k, v, past, sinks = (tensor.double() for tensor in tensors)
    q, k = rotated(q, packing.positions), rotated(k, packing.positions)
    out, start = torch.empty_like(q), 0
    for length in packing.lengths:
        own = slice(start, start + length)
        start += length
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]
            keys, values = (
                torch.cat([before[:, shared], now[own, shared]])
                for before, now in zip(past[:, :prefix], (k, v), strict=True)
            )
            behind = packing.positions[own][:, None] - torch.arange(prefix + length)
            seen = (behind >= 0) & (behind < (WINDOW if sliding else math.inf))
            scores = (q[own, head] @ keys.T / 8).masked_fill(~seen, -math.inf)
            sink = sinks[head].expand(length, 1)
            out[own, head] = torch.cat([scores, sink], -1).softmax(-1)[:, :-1] @ values
    return out


def check(tensors: list[Tensor], packing: Packing, prefix: int, sliding: bool) -> None:
    dtype = tensors[0].dtype
    plan = planned(packing, prefix, dtype)
    got = launch.attention(*tensors, plan, sliding)
    assert got.dtype == dtype and got.shape == tensors[0].shape
    assert relative_l2(got, softmax_with_sink(tensors, packing, prefix, sliding)) < FROM_FP64[dtype]
    assert relative_l2(got, eager.attention(*tensors, plan, sliding)) < FROM_DEFINITION[dtype]


# 16 queries are a tile and 64 keys a step: at, before and after their ends, and past the window.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sliding", [True, False], ids=["sliding", "full"])
@pytest.mark.parametrize("prefix", [0, 97])
@pytest.mark.parametrize("lengths", [(1,), (15, 16, 17), (63, 1, 65), (200,)], ids=str)
def test_attention(lengths: tuple[int, ...], prefix: int, sliding: bool, dtype: torch.dtype):
    packing = pack([range(length) for length in lengths], after=prefix)
    check(inputs(sum(lengths), prefix, dtype), packing, prefix, sliding)


@pytest.mark.parametrize(("heads", "shared"), [(8, 8), (4, 2), (16, 2)])
@pytest.mark.parametrize("prefix", [0, 5])
def test_groups_of_heads(heads: int, shared: int, prefix: int):
    """Every head has its own sink, and a group its own keys."""
    packing = pack([range(20), range(3)], after=prefix)
    check(inputs(23, prefix, torch.float16, heads, shared), packing, prefix, True)


@pytest.mark.parametrize("prefix", [64, 128, 130])
def test_prefixes_at_the_ends_of_steps_and_longer_than_the_window(prefix: int):
    for sliding in (True, False):
        check(inputs(33, prefix, torch.float16), pack([range(33)], after=prefix), prefix, sliding)


def test_a_prompt_of_two_blocks_of_queries():
    """The second block of 512 looks back at the first one's keys."""
    packing = pack([range(530)], after=0)
    assert len(packing.blocks) == 2
    check(inputs(530, 0, torch.float16), packing, 0, False)


def test_a_prefix_that_the_batch_itself_is():
    """The plan knows the prefix's length, but nothing stands before its own tokens."""
    packing = pack([range(97)], after=0)
    tensors = inputs(97, 97, torch.float16)
    got = launch.attention(*tensors, planned(packing, 97, torch.float16), True)
    want = softmax_with_sink(tensors, packing, 0, True)
    assert relative_l2(got, want) < FROM_FP64[torch.float16]


@pytest.mark.parametrize("sink", [-60000.0, 300.0])
def test_extreme_sinks(sink: float):
    """A sink far below all scores changes nothing; one far above takes all weight. Neither gives NaN."""
    packing, tensors = pack([range(20)], after=0), inputs(20, 0, torch.float16)
    tensors[4] = torch.full_like(tensors[4], sink)
    got = launch.attention(*tensors, planned(packing, 0, torch.float16), False)
    want = softmax_with_sink(tensors, packing, 0, False)
    assert (got - want).abs().max() < 2e-3 * max(want.abs().max().item(), 1)


def test_prompts_do_not_see_each_other():
    packing, tensors = pack([range(40), range(40)], after=0), inputs(80, 0, torch.float16)
    plan = planned(packing, 0, torch.float16)
    before = launch.attention(*tensors, plan, False)
    for tensor in tensors[:3]:
        tensor[:40] = float("nan")
    assert torch.equal(launch.attention(*tensors, plan, False)[40:], before[40:])
