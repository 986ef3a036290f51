"""The grid detectors: what has a grid of 16 pixels, and all that has none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.grid_energy import border_contrast, comb, grid_energy, mean_tile

# The second with a side that is no multiple of 32, the third of Lens' own.
SQUARE, WIDE, LENS = (512, 512), (368, 736), (736, 1472)
# A picture's score is a mean over 127 free points of the spectrum for 16 pixels and 511 for 32. Of grey noise
# each has a deviation of nearly 1, so that of the score is about 0.05; this is four times that.
BY_CHANCE = 0.2
# Coloured noise has few points that count in a comb, about 10 for a spectrum this steep.
COMB_BY_CHANCE = 1.5


def noise(size: tuple[int, int], slope: float = 0.0, seed: int = 0, colours: int = 1) -> Tensor:
    """Noise [H, W, 3] with RMS 0.15 around grey, its amplitude falling with frequency ** slope."""
    height, width = size
    white = torch.randn(height, width, colours, generator=torch.Generator().manual_seed(seed))
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])
    frequency[0, 0] = math.inf
    waves = torch.fft.fft2(white, dim=(0, 1)) * frequency.pow(-slope)[..., None]
    picture = torch.fft.ifft2(waves, dim=(0, 1)).real
    return (0.5 + 0.15 * picture / picture.std()).expand(height, width, 3)


def lines(size: tuple[int, int], period: int, steps: float) -> Tensor:
    """Lines one pixel wide along both axes [H, W, 1], with an RMS of ``steps`` / 255."""
    rows, columns = (torch.arange(side) % period == 0 for side in size)
    grid = (rows[:, None] | columns).float()[..., None]
    return steps / 255 * (grid - grid.mean()) / grid.std()


def tiles(size: tuple[int, int], period: int, steps: float) -> Tensor:
    """The same random tile everywhere [H, W, 3], with an RMS of ``steps`` / 255."""
    tile = torch.randn(period, period, 3, generator=torch.Generator().manual_seed(5))
    whole = tile.repeat(size[0] // period + 1, size[1] // period + 1, 1)[: size[0], : size[1]]
    return steps / 255 * (whole - whole.mean()) / whole.std()


def plain_pictures() -> dict[str, Tensor]:
    """Pictures [512, 512, 3] without noise: what an ordinary picture is made of."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 512), torch.linspace(0, 1, 512), indexing="ij")
    one = {
        "constant": torch.full((512, 512), 0.3),
        "gradient": 0.2 + 0.3 * x + 0.4 * y**2,
        "vertical edge": (x > 0.37).float(),
        "horizon": (y > 0.611).float() * (0.5 + 0.2 * x),
        "diagonal": (x + y > 1).float(),
        "slanted edge": (x + 0.37 * y > 0.7).float(),
        "disc": (torch.hypot(x - 0.4, y - 0.6) < 0.25).float(),
        "box": ((x > 0.23) & (x < 0.66) & (y > 0.2) & (y < 0.59)).float(),
    }
    return {name: grey[..., None].expand(-1, -1, 3) for name, grey in one.items()}


@pytest.mark.parametrize("size", [SQUARE, WIDE, (256, 208)])
@pytest.mark.parametrize("slope", [0.0, 1.0, 1.5])
def test_noise_of_any_colour_scores_one(size: tuple[int, int], slope: float):
    for seed in range(2):
        assert grid_energy(noise(size, slope, seed)) == pytest.approx(1, abs=BY_CHANCE)


@pytest.mark.parametrize("name", plain_pictures())
def test_shapes_score_one(name: str):
    """Edges put their energy on rays, where a point's neighbours are; a diagonal runs through many points."""
    score = grid_energy(plain_pictures()[name])
    assert score == pytest.approx(1, abs=1e-9 if name == "constant" else BY_CHANCE)


@pytest.mark.parametrize("size", [SQUARE, WIDE])
@pytest.mark.parametrize("pattern", [lines, tiles])
@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_a_faint_grid_shows_and_more_of_it_shows_more(size: tuple[int, int], pattern, slope: float):
    """An RMS of 1 to 4 bytes' steps below noise with 38."""
    picture = noise(size, slope)
    scores = [grid_energy(picture + pattern(size, 16, steps)) for steps in (0, 1, 2, 4)]
    assert scores[1] > 1.08 * scores[0] and scores[2] > 1.35 * scores[0] and scores[3] > 1.7 * scores[0]
    assert scores == sorted(scores)


@pytest.mark.parametrize("name", plain_pictures())
def test_a_faint_grid_shows_on_shapes(name: str):
    picture = plain_pictures()[name]
    assert grid_energy(picture + lines(SQUARE, 16, 1)) > 1.5 * grid_energy(picture)


@pytest.mark.parametrize("period", [8, 32])
def test_harmonics_and_pairs_of_tokens_count(period: int):
    assert grid_energy(noise(SQUARE, 1.0) + tiles(SQUARE, period, 4)) > 1.8


@pytest.mark.parametrize("period", [7, 13, 15, 17, 20])
@pytest.mark.parametrize("pattern", [lines, tiles])
def test_other_periods_do_not_count(period: int, pattern):
    """4 and 16 times what shows at 16 pixels; 20 shares a quarter's and a half's frequency with 16."""
    picture = noise(SQUARE, 1.0)
    change = grid_energy(picture + pattern(SQUARE, period, 4)) - grid_energy(picture)
    assert change < (0.6 if period == 20 else 0.05)


def test_a_grid_shows_at_lens_own_wide_size():
    picture = noise(LENS, 1.0)
    plain, faint = grid_energy(picture), grid_energy(picture + lines(LENS, 16, 1))
    assert plain == pytest.approx(1, abs=BY_CHANCE) and faint > 1.4 * plain


def test_brightness_does_not_count():
    picture = 0.5 * noise(SQUARE, 1.0)
    assert grid_energy(picture + 0.3) == pytest.approx(grid_energy(picture), rel=1e-4)


def test_no_score_is_above_fifteen():
    """p is one of 15 bins that it is compared with."""
    assert 14.8 < grid_energy(0.5 + tiles(SQUARE, 32, 40)) <= 15


def test_too_small_a_picture_is_refused():
    assert grid_energy(noise((64, 64))) == pytest.approx(1, abs=BY_CHANCE)
    with pytest.raises(ValueError, match="not 48x64"):
        grid_energy(noise((64, 48)))


def test_mean_tile_is_what_repeats():
    pattern = torch.randn(16, 16, 3, dtype=torch.float64)
    images = torch.stack([level + pattern.repeat(5, 7, 1) for level in (0.3, 0.7)])
    images = torch.nn.functional.pad(images, (0, 0, 0, 9, 0, 4), value=3.0)  # fills no tile
    torch.testing.assert_close(mean_tile(images), pattern - pattern.mean((0, 1)))


def test_tokens_of_different_colours_show_at_their_borders():
    """Each token a little lighter or darker: the spectrum has nothing at multiples of 1 / 16."""
    offset = torch.randn(32, 32, 1).repeat_interleave(16, 0).repeat_interleave(16, 1) * 3 / 255
    picture = noise(SQUARE, 1.5)
    assert border_contrast(picture) == pytest.approx(1, abs=0.03)  # of 32 000 differences each
    assert border_contrast(picture + offset) > 1.2
    assert grid_energy(picture + offset) < 1.1 * grid_energy(picture)


@pytest.mark.parametrize("name", plain_pictures())
def test_shapes_have_no_borders(name: str):
    """An edge that lies on a token's border is not the tokens'."""
    picture = plain_pictures()[name]
    assert border_contrast(picture) == pytest.approx(1, abs=0.03)
    assert border_contrast(picture.roll(3, 1)) == pytest.approx(border_contrast(picture), abs=0.03)


def test_border_contrast_of_an_exact_mosaic():
    """No difference inside a token, and 0.1 across: 0.1 + half a step over half a step."""
    y, x = torch.meshgrid(torch.arange(64) // 16, torch.arange(96) // 16, indexing="ij")
    picture = (0.5 + 0.1 * ((x + y) % 2))[..., None].expand(-1, -1, 3)
    assert border_contrast(picture) == pytest.approx(1 + 0.1 * 510, rel=1e-5)


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_comb_of_noise_is_one_and_of_a_grid_below_it_is_not(slope: float):
    images = torch.stack([noise(SQUARE, slope, seed) for seed in range(4)]) - 0.5
    assert comb(images) == pytest.approx(1, abs=0.5)
    assert comb(images + tiles(SQUARE, 13, 2)) == pytest.approx(comb(images), abs=0.3)
    assert comb(images + tiles(SQUARE, 16, 2)) > 3 * comb(images)


@pytest.mark.parametrize("name", plain_pictures())
def test_comb_of_shapes_is_about_one(name: str):
    """A smooth error is no grid, though its tiles are alike: so they are with any other period."""
    value = comb(plain_pictures()[name][None])
    assert 1 / COMB_BY_CHANCE / 2 < value < 2 * COMB_BY_CHANCE
    assert name != "constant" or value == 1


def test_comb_gains_by_every_picture():
    """The pattern is the same, chance is not."""
    images = torch.stack([noise(SQUARE, 0.0, seed) for seed in range(4)]) + tiles(SQUARE, 16, 1)
    assert comb(images) - 1 > 2 * (comb(images[:1]) - 1)
