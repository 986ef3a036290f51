"""Guidance: u + g (p - u) with the norm of p, token by token."""

from __future__ import annotations

import pytest
import torch

from lens_core.sampling import grid_to_tokens, norm_rescaled_guidance, tokens_to_grid

# fp32 has 24 bits (6e-8); a guided vector takes three operations and two norms over 128 channels.
FP32 = 1e-6


def predictions() -> tuple[torch.Tensor, torch.Tensor]:
    """Conditional and unconditional velocities [2, 15, 128] of very different lengths."""
    length = torch.logspace(-3, 3, 15)[:, None]
    return torch.randn(2, 15, 128) * length, torch.randn(2, 15, 128)


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 5.0, 20.0])
def test_the_formula_in_fp64(scale: float):
    cond, uncond = predictions()
    p, u = cond.double(), uncond.double()
    guided = u + scale * (p - u)
    want = guided * p.square().sum(-1, keepdim=True).sqrt() / guided.square().sum(-1, keepdim=True).sqrt()
    got = norm_rescaled_guidance(cond, uncond, scale)
    assert (got - want).norm(dim=-1).div(want.norm(dim=-1)).max() < FP32


def test_every_token_keeps_the_norm_of_the_conditional():
    cond, uncond = predictions()
    got = norm_rescaled_guidance(cond, uncond, 5.0)
    torch.testing.assert_close(got.norm(dim=-1), cond.norm(dim=-1), rtol=FP32, atol=0)


def test_the_rescaling_may_amplify():
    # p and u of opposite direction, g = 0.4: the guided vector is 5 times shorter than p.
    p = torch.ones(1, 1, 128)
    torch.testing.assert_close(norm_rescaled_guidance(p, -p, 0.4), -p, rtol=FP32, atol=0)


def test_a_factor_common_to_both_drops_out():
    cond, uncond = predictions()
    want = norm_rescaled_guidance(cond, uncond, 5.0)
    # A power of two changes no mantissa, so nothing but the exponent may differ.
    assert torch.equal(norm_rescaled_guidance(cond / 8, uncond / 8, 5.0), want / 8)
    got = norm_rescaled_guidance(cond * 0.37, uncond * 0.37, 5.0)
    torch.testing.assert_close(got, want * 0.37, rtol=1e-4, atol=1e-5)


def test_zero_vectors_give_zeros():
    zero = torch.zeros(1, 3, 128)
    assert torch.equal(norm_rescaled_guidance(zero, zero, 5.0), zero)


def test_a_guided_vector_of_zero_stays_zero():
    # g = 2 and u = 2 p: u + 2 (p - u) = 0, whose direction nobody knows.
    p = torch.ones(1, 1, 128)
    assert torch.equal(norm_rescaled_guidance(p, 2 * p, 2.0), torch.zeros_like(p))


def test_scale_1_returns_the_conditional_itself():
    cond, uncond = predictions()
    assert norm_rescaled_guidance(cond, uncond, 1.0) is cond


def test_channels_of_a_grid_equal_channels_of_tokens():
    cond, uncond = predictions()
    on_tokens = norm_rescaled_guidance(cond, uncond, 5.0)
    grids = tokens_to_grid(cond, (5, 3)), tokens_to_grid(uncond, (5, 3))
    on_grid = norm_rescaled_guidance(*grids, 5.0, dim=1)
    # The norm adds up the same numbers in another order.
    torch.testing.assert_close(grid_to_tokens(on_grid), on_tokens, rtol=FP32, atol=0)


def test_bf16_stays_bf16_and_takes_norms_in_fp32():
    cond, uncond = (x.bfloat16() for x in predictions())
    got = norm_rescaled_guidance(cond, uncond, 5.0)
    assert got.dtype == torch.bfloat16
    # Rounding 128 channels to bf16 moves a norm by about 2^-9 / sqrt(128) = 2e-4; a norm kept in bf16
    # would be off by up to 2^-9 itself.
    torch.testing.assert_close(got.double().norm(dim=-1), cond.double().norm(dim=-1), rtol=1e-3, atol=0)
