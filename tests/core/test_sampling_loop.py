"""The Euler loop, the starting noise and the order of tokens in a grid."""

from __future__ import annotations

import pytest
import torch

from lens_core.sampling import euler, grid_to_tokens, reference_noise, sigmas, tokens_to_grid


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_a_straight_path_ends_in_the_picture(steps: int):
    noise, picture = torch.randn(1, 6, 128), torch.randn(1, 6, 128)
    latents = euler(lambda x, sigma: noise - picture, noise, sigmas(steps, 1024))
    # Each of up to 20 steps rounds numbers of size 5 in fp32 (3e-7).
    assert (latents - picture).abs().max() < 1e-5


def test_a_linear_field_gives_the_product_of_the_step_factors():
    levels = torch.tensor([1.0, 0.7, 0.25, 0.0])
    start = torch.randn(1, 6, 128)
    got = euler(lambda x, sigma: (2 + sigma) * x, start, levels)
    # x += (next - sigma) (2 + sigma) x, by hand.
    factor = (1 - 0.3 * 3) * (1 - 0.45 * 2.7) * (1 - 0.25 * 2.25)
    # Factors are near cancellation (0.1), which turns fp32's 6e-8 into about 1e-6.
    torch.testing.assert_close(got, factor * start, rtol=1e-5, atol=0)


def test_the_field_is_asked_at_every_level_but_the_last():
    seen = []

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(sigma)
        return torch.zeros_like(x)

    levels = torch.tensor([1.0, 0.5, 0.0])
    euler(velocity, torch.zeros(1, 2, 128), levels)
    assert [sigma.shape for sigma in seen] == [(), ()]
    assert [sigma.item() for sigma in seen] == [1.0, 0.5]


def test_latents_keep_their_dtype_and_are_rounded_after_each_step():
    start = torch.randn(1, 6, 128).bfloat16()
    levels = torch.tensor([1.0, 0.7, 0.0])
    seen = []

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.full_like(x, 1 / 3)

    got = euler(velocity, start, levels)
    slope = torch.tensor(1 / 3).bfloat16().float()
    assert [x.dtype for x in (*seen, got)] == [torch.bfloat16] * 3
    assert torch.equal(seen[1], (start.float() + (levels[1] - levels[0]) * slope).bfloat16())
    assert torch.equal(got, (seen[1].float() + (levels[2] - levels[1]) * slope).bfloat16())


def test_no_steps_return_the_start():
    start = torch.randn(1, 2, 128)
    assert torch.equal(euler(lambda x, sigma: x, start, torch.zeros(0)), start)


def test_on_step_counts_up_to_the_total():
    calls = []
    euler(lambda x, _: x, torch.zeros(1, 2, 128), sigmas(4, 2), lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_on_step_may_raise_to_cancel():
    asked = []

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        asked.append(sigma)
        return x

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        euler(velocity, torch.zeros(1, 2, 128), sigmas(20, 2), stop)
    assert len(asked) == 2


def test_noise_is_token_major_and_in_the_generators_order():
    noise = reference_noise(7, 2, 15, 128, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(7)
    assert noise.shape == (2, 15, 128)
    assert torch.equal(noise, torch.randn(2, 15, 128, generator=generator))


def test_noise_repeats_with_its_seed_and_ignores_the_global_state():
    first = reference_noise(7, 1, 15, 128, torch.float32, "cpu")
    torch.manual_seed(99)
    assert torch.equal(reference_noise(7, 1, 15, 128, torch.float32, "cpu"), first)
    assert not torch.equal(reference_noise(8, 1, 15, 128, torch.float32, "cpu"), first)


def test_noise_is_drawn_in_the_models_dtype():
    noise = reference_noise(7, 1, 15, 128, torch.bfloat16, "cpu")
    generator = torch.Generator().manual_seed(7)
    assert noise.dtype == torch.bfloat16
    assert torch.equal(noise, torch.randn(1, 15, 128, generator=generator, dtype=torch.bfloat16))


def test_token_number_is_row_times_width_plus_column():
    height, width = 3, 5
    tokens = torch.randn(2, height * width, 128)
    grid = tokens_to_grid(tokens, (height, width))
    assert grid.shape == (2, 128, height, width)
    for row in range(height):
        for column in range(width):
            assert torch.equal(grid[:, :, row, column], tokens[:, row * width + column])


def test_grid_to_tokens_undoes_tokens_to_grid():
    tokens = torch.randn(2, 15, 128)
    assert torch.equal(grid_to_tokens(tokens_to_grid(tokens, (3, 5))), tokens)
