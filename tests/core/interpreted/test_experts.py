"""The expert kernels against their definition and fp64, and their decoders bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lens_core.kernels import Bank, PackedMatrices, eager
from lens_core.kernels.registry import random_bank
from lens_core.kernels.triton import launch
from lens_core.quant import FORMATS
from tests.compare import relative_l2
from tests.core.expert_loop import expert_loop

# What is rounded is the value between the two products (nvfp4: and x's partner, a weight that the definition
# rounds too): 2^-12 = 2e-4 in the mean in fp16. The interpreter cuts fp32 to bf16 instead of rounding
# it, 2^-9 = 2e-3 in the mean. Measured: 1.6e-4 and 2.5e-3.
FROM_FP64 = {torch.float16: 4e-4, torch.bfloat16: 5e-3}
# The definition rounds in more places (after both products): 4.7e-4 and 3.7e-3 away from fp64 itself.
FROM_DEFINITION = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def check(bank: Bank, x: Tensor, chosen: Tensor, routing: Tensor) -> None:
    got = launch.experts(x, chosen, routing, bank)
    assert got.dtype == torch.float32 and got.shape == (*chosen.shape, x.shape[1])
    assert relative_l2(got, expert_loop(x, chosen, routing, bank)) < FROM_FP64[x.dtype]
    assert relative_l2(got, eager.experts(x, chosen, routing, bank)) < FROM_DEFINITION[x.dtype]


def routed(tokens: int, experts: int, slots: int = 4) -> tuple[Tensor, Tensor]:
    logits, chosen = torch.randn(tokens, experts).topk(slots)
    return chosen.int(), logits.softmax(-1)


# Experts, hidden, inner, tokens, rows of a tile, dtype.
SIZES = [
    # 160 and 224 are no multiples of a row block (64, 128), 40 and 56 words none of a word block (32).
    (8, 160, 224, 20, 16, torch.float16),
    (8, 160, 224, 20, 16, torch.bfloat16),
    (8, 96, 320, 45, 32, torch.float16),
    (8, 352, 96, 90, 64, torch.bfloat16),  # three word blocks, the last one of 24
    (4, 96, 160, 70, 64, torch.float16),  # an expert has more rows than a tile
    (4, 128, 256, 10, 16, torch.bfloat16),  # 32 words: nothing to mask
    (32, 32, 32, 1, 16, torch.float16),
]


# Each size in one of the formats; small ones in both.
@pytest.mark.parametrize(
    ("experts", "hidden", "inner", "tokens", "tile", "dtype", "form"),
    [(*size, tuple(FORMATS)[index % 2]) for index, size in enumerate(SIZES)]
    + [(*size, tuple(FORMATS)[1 - index % 2]) for index, size in enumerate(SIZES) if index >= 4],
    ids=str,
)
def test_experts(
    experts: int, hidden: int, inner: int, tokens: int, tile: int, dtype: torch.dtype, form: str
):
    assert launch.tile_rows(4 * tokens, experts) == tile
    bank = random_bank(experts, hidden, inner, form, generator(), "cpu")
    check(bank, torch.randn(tokens, hidden).to(dtype), *routed(tokens, experts))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("used", [(0, 1, 2, 3), (28, 29, 30, 31), (3, 7, 20, 31)], ids=str)
def test_experts_that_nobody_chose(used: tuple[int, ...], form: str):
    """The first, the last or most of them are empty, and the others have several tiles each."""
    bank = random_bank(32, 96, 64, form, generator(), "cpu")
    chosen = torch.tensor(used, dtype=torch.int32).expand(40, 4)
    check(bank, torch.randn(40, 96).half(), chosen, torch.rand(40, 4))


def test_one_expert_takes_every_slot():
    """Cannot come from a router, but the grid's bound on tiles must hold for it too."""
    bank = random_bank(8, 96, 64, "mxfp4", generator(), "cpu")
    for expert in (0, 7):
        chosen = torch.full((50, 4), expert, dtype=torch.int32)
        check(bank, torch.randn(50, 96).half(), chosen, torch.rand(50, 4))


@pytest.mark.parametrize("tokens", [1, 2, 7, 129])
def test_one_slot_per_token(tokens: int):
    bank = random_bank(8, 64, 96, "nvfp4", generator(), "cpu")
    check(bank, torch.randn(tokens, 64).half(), *routed(tokens, 8, slots=1))


def test_activations_are_clamped():
    bank = random_bank(4, 64, 64, "mxfp4", generator(), "cpu")
    loud = bank._replace(limit=0.5)
    x, (chosen, routing) = torch.randn(9, 64).half(), routed(9, 4)
    check(loud, x, chosen, routing)
    assert relative_l2(launch.experts(x, chosen, routing, loud), expert_loop(x, chosen, routing, bank)) > 0.1


def test_factors_differ_from_expert_to_expert():
    bank = random_bank(4, 64, 64, "nvfp4", generator(), "cpu")
    bank = bank._replace(
        gate_up=bank.gate_up._replace(scale=bank.gate_up.scale * torch.tensor([1.0, 0.5, 2, 0.3])),
        down=bank.down._replace(scale=bank.down.scale * torch.tensor([0.7, 3.0, 1, 0.1])),
    )
    check(bank, torch.randn(20, 64).half(), *routed(20, 4))


@pytest.mark.parametrize("form", FORMATS)
def test_a_run_repeats_bit_by_bit(form: str):
    bank, x = random_bank(8, 96, 64, form, generator(), "cpu"), torch.randn(30, 96).half()
    chosen, routing = routed(30, 8)
    assert torch.equal(launch.experts(x, chosen, routing, bank), launch.experts(x, chosen, routing, bank))


def test_a_dense_bank_goes_to_the_definition():
    bank = random_bank(4, 64, 32, "mxfp4", generator(), "cpu")
    x, (chosen, routing) = torch.randn(5, 64).half(), routed(5, 4)
    from lens_core.encoder.moe import DenseExperts

    loose = DenseExperts(bank, torch.float16).bank()
    want = eager.experts(x, chosen, routing, loose)
    assert torch.equal(launch.experts(x, chosen, routing, loose), want)
    assert relative_l2(want, eager.experts(x, chosen, routing, bank)) < FROM_DEFINITION[torch.float16]


def decoded(form: str, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[len(scales), 512]: all 256 bytes under every scale byte, through the down kernel and as defined.

    512 tokens that are the rows of an identity matrix give back the columns of the weights.
    """
    rows, kind = len(scales), FORMATS[form]
    blocks = torch.arange(256, dtype=torch.uint8).expand(1, rows, 256).unflatten(-1, (16, 16)).contiguous()
    scales = scales.to(torch.uint8)[None, :, None].expand(1, rows, 512 // kind.group).contiguous()
    scale = torch.ones(1) if kind.has_scale else None
    matrices = PackedMatrices(blocks, scales, scale, torch.zeros(1, rows).bfloat16(), kind)
    out = torch.empty(512, rows, dtype=torch.float32)
    launch.expert_kernels.down[launch._grid(8, rows, (64, 32, 4))](
        launch.planes(torch.eye(512).to(dtype)),
        torch.arange(512, dtype=torch.int32),
        torch.ones(512, 1),
        *launch._operands(matrices),
        out,
        torch.tensor([0, 512], dtype=torch.int32),
        8,
        K=512,
        N=rows,
        **launch._settings(matrices, out.to(dtype), 64, (64, 32, 4)),
    )
    return out.T, eager.dense(matrices, torch.float32)[0]


def test_every_code_under_every_mxfp4_scale():
    """Scale bytes up to 128 (values to 12). Below byte 2 halves are subnormal, which the interpreter's bf16
    does not have. NaN would not be equal."""
    got, want = decoded("mxfp4", torch.arange(129), torch.bfloat16)
    assert torch.equal(got[2:], want[2:])
    assert (got[:2] - want[:2]).abs().max() < 2.0**-126
    assert want[128].max() == 12 and want[2].abs().max() == 6 * 2.0**-125


def test_every_code_under_fp16s_mxfp4_scales():
    """From 105 on, the codes' halves are still multiples of fp16's smallest number, 2^-24."""
    got, want = decoded("mxfp4", torch.arange(105, 129), torch.float16)
    assert torch.equal(got, want)


def test_every_code_under_every_nvfp4_scale():
    """All e4m3 numbers that are not negative and no NaN, with the subnormal ones below byte 8."""
    got, want = decoded("nvfp4", torch.arange(127), torch.bfloat16)
    assert torch.equal(got, want)
    assert want[126].max() == 6 * 448 and want[1].max() == 6 * 2.0**-9


def test_every_code_under_fp16s_nvfp4_scales():
    """The kernel carries 2^-16 of the value, so fp16 is exact down to scales of 1/16 (byte 0x18), below
    which it rounds to multiples of 2^-8: 1.5e-6 of the largest value in the bank."""
    got, want = decoded("nvfp4", torch.arange(127), torch.float16)
    assert torch.equal(got[0x18:], want[0x18:])
    assert (got - want).abs().max() <= 2.0**-9
