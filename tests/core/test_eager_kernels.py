"""The definitions in plain PyTorch against fp64, and their two ways through the experts compared."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lens_core.encoder.moe import DenseExperts
from lens_core.kernels import Bank, eager
from lens_core.kernels.plan import AttentionPlan, Block, causal_mask
from lens_core.kernels.registry import random_bank
from lens_core.quant import FORMATS
from tests.compare import relative_l2
from tests.core.expert_loop import expert_loop

# Weights (nvfp4), the value between the products, and both products are rounded: 2^-9 = 2e-3 each in bf16,
# 2^-12 in fp16, nothing worth mentioning in fp32. Measured: 3.7e-3, 4.7e-4, 3e-7.
ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-6}


def bank(form: str = "mxfp4", experts: int = 8) -> Bank:
    return random_bank(experts, 96, 64, form, torch.Generator().manual_seed(0), "cpu")


def routed(tokens: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    logits, chosen = torch.randn(tokens, experts).topk(4)
    return torch.randn(tokens, 96).to(dtype), chosen.int(), logits.softmax(-1)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_one_by_one(tokens: int, form: str, dtype: torch.dtype):
    case = routed(tokens, 8, dtype)
    got = eager.experts(*case, bank(form))
    assert got.dtype == torch.float32
    assert relative_l2(got, expert_loop(*case, bank(form))) < ROUNDING[dtype]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("tokens", "experts"), [(1, 8), (40, 8), (2, 32)])
def test_experts_in_one_grouped_product(tokens: int, experts: int, form: str):
    """What runs on a GPU without Triton; some experts have no rows."""
    case, weights = routed(tokens, experts, torch.bfloat16), bank(form, experts)
    got = eager._grouped(*case, weights)
    assert got.dtype == torch.float32
    assert relative_l2(got, expert_loop(*case, weights)) < ROUNDING[torch.bfloat16]
    assert relative_l2(got, eager._one_by_one(*case, weights)) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize(
    ("capability", "dtype", "grouped"),
    [
        ((8, 0), torch.bfloat16, True),
        ((12, 0), torch.bfloat16, True),
        ((7, 5), torch.bfloat16, False),
        ((8, 0), torch.float16, False),
        ((8, 0), torch.float32, False),
    ],
)
def test_where_the_grouped_product_exists(
    capability: tuple[int, int], dtype: torch.dtype, grouped: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    on_gpu = SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda")
    assert eager._has_grouped_product(on_gpu) is grouped
    assert not eager._has_grouped_product(torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("path", [eager._grouped, eager._one_by_one])
def test_one_expert_takes_every_slot(path):
    x, chosen, routing = routed(9, 8, torch.bfloat16)
    for expert in (0, 7):
        alone = torch.full_like(chosen, expert)
        want = expert_loop(x, alone, routing, bank())
        assert relative_l2(path(x, alone, routing, bank()), want) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("path", [eager._grouped, eager._one_by_one])
@pytest.mark.parametrize("form", FORMATS)
def test_a_dense_bank_equals_the_packed_one(form: str, path):
    """Bit for bit: it holds the same rounded weights."""
    case = routed(20, 8, torch.bfloat16)
    dense = DenseExperts(bank(form), torch.bfloat16)
    assert torch.equal(path(*case, dense.bank()), path(*case, bank(form)))
    assert dense.largest_scale() == 0


def test_routing_is_softmax_over_the_chosen_in_fp32():
    x, weight, bias = torch.randn(9, 96).bfloat16(), torch.randn(8, 96).bfloat16(), torch.randn(8).bfloat16()
    chosen, routing = eager.route(x, weight, bias, 4)
    values, order = (x.double() @ weight.double().T + bias.double()).topk(4)
    assert torch.equal(chosen.long(), order) and chosen.dtype == torch.int32
    # Logits reach 30, so 1e-6 of them is 3e-5 in an exponential; rounded to bf16 they would be 4e-2 off.
    assert (routing - values.softmax(-1)).abs().max() < 1e-4


def test_the_residual_stream_stays_in_fp32():
    """An update far below bf16's resolution of the stream still counts."""
    x, update = torch.full((1, 4), 1000.0), torch.full((1, 1, 4), 0.01).bfloat16()
    total, normed = eager.add_norm(x, update, torch.ones(4), 1e-5, torch.bfloat16)
    assert (total > 1000).all() and total.dtype == torch.float32 and normed.dtype == torch.bfloat16
    assert eager.add_norm(x, None, None, 1e-5, torch.bfloat16) == (x, None)


def test_causal_mask_with_keys_before_the_queries():
    assert causal_mask(2, 4, None, torch.device("cpu")).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(2, 4, 2, torch.device("cpu")).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


def test_a_plans_masks_carry_each_layers_own_sinks():
    """Blocks of equal shape share a buffer, and layers of both kinds alternate."""
    blocks = (Block(0, 0, 3, True), Block(3, 3, 6, True))
    plan = AttentionPlan(blocks, torch.arange(6), torch.zeros(2, 6, 32), 2, 2, torch.float32)
    for sinks in (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])):
        for sliding in (True, False):
            first, second = (plan.mask(block, sinks, sliding) for block in blocks)
            assert first.data_ptr() == second.data_ptr() and first.shape == (2, 3, 6)
            assert torch.equal(second[..., -1], sinks[:, None].expand(2, 3))
            seen = causal_mask(3, 5, 2 if sliding else None, torch.device("cpu"))
            assert torch.equal(second[0, :, :-1] == 0, seen)


def test_a_plans_tiles_cut_every_block():
    blocks = (Block(0, 0, 20, False), Block(20, 20, 21, True), Block(0, 21, 37, True))
    plan = AttentionPlan(blocks, torch.arange(37), torch.zeros(2, 37, 32), 2, 2, torch.float32)
    assert plan.tiles(16).tolist() == [[0, 0, 20, 0], [0, 16, 20, 0], [20, 20, 21, 1], [0, 21, 37, 1]]
