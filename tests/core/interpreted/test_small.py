"""Residual and norm, routing and sorting against their definitions and fp64."""

from __future__ import annotations

import pytest
import torch

from lens_core.kernels import eager
from lens_core.kernels.triton import launch
from tests.compare import relative_l2

# fp16 rounds once, by up to 2^-11 = 5e-4, 2e-4 in the mean. The interpreter cuts fp32 to bf16 instead of
# rounding it: up to 2^-8 = 4e-3.
ROUNDING = {torch.float16: 3e-4, torch.bfloat16: 4e-3}
# fp32 sums of a few hundred numbers in another order.
EXACT = 1e-6


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("hidden", [64, 352, 2880])
@pytest.mark.parametrize("slots", [0, 1, 4])
@pytest.mark.parametrize("with_norm", [True, False])
def test_add_norm(dtype: torch.dtype, hidden: int, slots: int, with_norm: bool):
    x = torch.randn(3, hidden)
    update_dtype = dtype if slots == 1 else torch.float32  # attention's output, and the experts'
    updates = torch.randn(3, slots, hidden).to(update_dtype) if slots else None
    weight = torch.randn(hidden).bfloat16() if with_norm else None
    total, normed = launch.add_norm(x, updates, weight, 1e-5, dtype)
    want_total, want_normed = eager.add_norm(x, updates, weight, 1e-5, dtype)
    exact = x.double() if updates is None else x.double() + updates.double().sum(1)
    assert total.dtype == torch.float32 and relative_l2(total, want_total) < EXACT
    assert relative_l2(total, exact) < EXACT
    if weight is None:
        assert normed is None and want_normed is None
        return
    exact = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    assert normed.dtype == want_normed.dtype == dtype
    assert relative_l2(normed, exact) < ROUNDING[dtype] and relative_l2(want_normed, exact) < ROUNDING[dtype]


def test_add_norm_takes_updates_of_any_layout():
    x, updates = torch.randn(5, 64), torch.randn(64, 4, 5).permute(2, 1, 0)
    assert relative_l2(launch.add_norm(x, updates, None, 0, torch.float16)[0], x + updates.sum(1)) < EXACT


def test_add_norm_leaves_the_stream_it_was_given_as_it_is():
    x = torch.randn(5, 64)
    before = x.clone()
    launch.add_norm(x, torch.randn(5, 4, 64), torch.randn(64), 1e-5, torch.float16)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("experts", "hidden", "top_k"), [(4, 96, 4), (8, 352, 4), (32, 2880, 4), (8, 64, 1)])
def test_route(dtype: torch.dtype, experts: int, hidden: int, top_k: int):
    x, weight, bias = torch.randn(9, hidden), torch.randn(experts, hidden), torch.randn(experts)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    chosen, routing = launch.route(x, weight, bias, top_k)
    want_chosen, want_routing = eager.route(x, weight, bias, top_k)
    assert chosen.dtype == torch.int32 and torch.equal(chosen, want_chosen)
    values, exact = (x.double() @ weight.double().T + bias.double()).topk(top_k)
    assert torch.equal(chosen.long(), exact)
    # Logits reach 100 here, so their fp32 error of 1e-6 is 1e-5 in an exponential.
    assert (routing - values.softmax(-1)).abs().max() < 1e-4
    assert (routing - want_routing).abs().max() < 1e-4


def test_route_takes_the_lower_index_of_equal_logits():
    """Deterministic, so that a repeated run gives the same picture."""
    x, weight = torch.ones(1, 64).half(), torch.zeros(8, 64).half()
    bias = torch.tensor([0, 2, 1, 2, 0, 2, 1, 1]).half()
    chosen, routing = launch.route(x, weight, bias, 4)
    assert chosen.tolist() == [[1, 3, 5, 2]]
    assert torch.allclose(routing, torch.tensor([[2.0, 2, 2, 1]]).softmax(-1))


def test_route_survives_huge_logits():
    x, weight, bias = torch.full((1, 64), 600.0).half(), torch.randn(8, 64).half(), torch.zeros(8).half()
    assert torch.isfinite(launch.route(x, weight, bias, 4)[1]).all()


@pytest.mark.parametrize("experts", [1, 4, 32])
@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 600])
def test_sorted_pairs(tokens: int, experts: int):
    """1024 pairs are one chunk: 255 to 257 tokens end just before, at and after its end."""
    chosen = torch.randint(0, experts, (tokens, 4), dtype=torch.int32)
    check_sorted(chosen, experts)


def test_sorted_pairs_of_one_expert_alone():
    for expert in (0, 3, 7):
        check_sorted(torch.full((300, 4), expert, dtype=torch.int32), 8)


def check_sorted(chosen: torch.Tensor, experts: int) -> None:
    source, offsets = launch._sorted(chosen, experts)
    values, order = chosen.flatten().sort(stable=True)
    assert torch.equal(source.long(), order)
    assert torch.equal(offsets.long(), torch.searchsorted(values.long(), torch.arange(experts + 1)))
