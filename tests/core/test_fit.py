"""Pictures of any size in Lens' sizes: where they go, what is cut off, padded and redrawn."""

from __future__ import annotations

import pytest
import torch

from lens_core.errors import SettingError, SizeError
from lens_core.sampling import (
    ASPECT_RATIOS,
    BASE_RESOLUTIONS,
    bucket,
    bucket_like,
    fit_image,
    fit_mask,
    mask_of_tokens,
    pixels_of_tokens,
    placement,
)
from lens_core.sampling.fit import Box


@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
@pytest.mark.parametrize("base", BASE_RESOLUTIONS)
def test_a_picture_in_a_bucket_of_any_size_gets_that_bucket(base: int, ratio: str):
    for other in BASE_RESOLUTIONS:
        assert bucket_like(base, *bucket(other, ratio)) == bucket(base, ratio)


@pytest.mark.parametrize(
    ("height", "width", "ratio"),
    [(1080, 1920, "16:9"), (4000, 3000, "3:4"), (999, 1001, "1:1"), (10, 9000, "2:1"), (5000, 7, "1:2")],
)
def test_nearest_in_shape_whatever_the_size(height: int, width: int, ratio: str):
    assert bucket_like(1024, height, width) == bucket(1024, ratio)


def test_pictures_without_a_size_and_unknown_settings_are_refused():
    with pytest.raises(SizeError, match="got 0x5"):
        bucket_like(1024, 5, 0)
    with pytest.raises(SettingError, match="one of 256, 512, 768, 1024, 1440, got 1000"):
        bucket_like(1000, 5, 5)
    with pytest.raises(SettingError, match="one of crop, pad, stretch, got 'squeeze'"):
        placement(5, 5, (16, 16), "squeeze")


@pytest.mark.parametrize(
    ("fit", "taken", "filled"),
    [
        ("crop", Box(0, 50, 100, 200), Box(0, 0, 32, 64)),
        ("pad", Box(0, 0, 100, 300), Box(5, 0, 21, 64)),
        ("stretch", Box(0, 0, 100, 300), Box(0, 0, 32, 64)),
    ],
)
def test_placement_of_a_picture_that_is_too_wide(fit: str, taken: Box, filled: Box):
    place = placement(100, 300, (32, 64), fit)
    assert (place.taken, place.filled) == (taken, filled)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (17, 33), (64, 48), (101, 77)])
def test_every_size_fits(fit: str, size: tuple[int, int]):
    place = placement(*size, (64, 48), fit)
    image = fit_image(torch.rand(2, *size, 3), place)
    mask = fit_mask(None, size, place)
    assert image.shape == (2, 64, 48, 3) and 0 <= image.min() <= image.max() <= 1
    assert mask.shape == (1, 64, 48)
    inside = mask[0] == 0
    assert inside.sum() == place.filled.height * place.filled.width
    assert inside.all() == (fit != "pad" or size == (64, 48))


def test_a_picture_in_the_right_size_is_not_touched():
    image, mask = torch.rand(1, 64, 48, 3), torch.rand(1, 64, 48)
    for fit in ("crop", "pad", "stretch"):
        place = placement(64, 48, (64, 48), fit)
        assert torch.equal(fit_image(image, place), image)
        assert torch.equal(fit_mask(mask, (64, 48), place), mask)


def test_what_is_cut_off_and_what_is_repeated():
    """A ramp from left to right: its middle third, or all of it with its ends as the border."""
    ramp = torch.linspace(0, 1, 192).expand(64, 192)[None, :, :, None].expand(-1, -1, -1, 3)
    cropped = fit_image(ramp, placement(64, 192, (64, 64), "crop"))
    assert torch.equal(cropped, ramp[:, :, 64:128])
    padded = fit_image(ramp.transpose(1, 2), placement(192, 64, (192, 128), "pad"))
    assert torch.equal(padded[:, :, 32:96], ramp.transpose(1, 2))
    assert torch.equal(padded[:, :, :32], padded[:, :, 32:33].expand(-1, -1, 32, -1))
    assert torch.equal(padded[:, :, 96:], padded[:, :, 95:96].expand(-1, -1, 32, -1))


def test_large_pictures_are_averaged_not_sampled():
    """Noise, shrunk eightfold, is grey: a mean of 64 pixels deviates by an eighth of what one does, 0.29."""
    small = fit_image(torch.rand(1, 512, 512, 3), placement(512, 512, (64, 64), "crop"))
    assert small.std() < 2 * 0.29 / 8


def test_channels():
    place = placement(20, 20, (32, 32), "crop")
    picture, alpha = torch.rand(1, 20, 20, 3), torch.rand(1, 20, 20, 1)
    assert torch.equal(fit_image(torch.cat([picture, alpha], -1), place), fit_image(picture, place))
    assert torch.equal(fit_image(alpha, place), fit_image(alpha.expand(-1, -1, -1, 3), place))
    with pytest.raises(SettingError, match=r"got \[1, 20, 20, 2\]"):
        fit_image(torch.rand(1, 20, 20, 2), place)


def test_a_mask_goes_where_its_picture_goes():
    """In all fits, and in another size than the picture's."""
    mask = torch.zeros(1, 100, 300)
    mask[:, 20:60, 100:180] = 1
    for fit in ("crop", "pad", "stretch"):
        place = placement(100, 300, (64, 128), fit)
        red = mask[..., None] * torch.tensor([1.0, 0, 0])
        inner = fit_mask(mask, (100, 300), place) * (1 - fit_mask(None, (100, 300), place))
        assert ((inner > 0.5) == (fit_image(red, place)[..., 0] > 0.5)).float().mean() > 0.99
        half = torch.nn.functional.avg_pool2d(mask, 2)
        assert (fit_mask(half, (100, 300), place) - fit_mask(mask, (100, 300), place)).abs().mean() < 0.01
        assert torch.equal(fit_mask(mask[0], (100, 300), place), fit_mask(mask, (100, 300), place))


def test_no_token_under_the_mask_is_kept():
    mask = torch.zeros(2, 64, 48)
    mask[0, 16, 31] = 1
    mask[1, 63, 0] = 0.3
    want = torch.zeros(2, 1, 4, 3)
    want[0, 0, 1, 1], want[1, 0, 3, 0] = 1, 0.3
    assert torch.equal(mask_of_tokens(mask), want)
    pixels = pixels_of_tokens(want)
    assert pixels.shape == mask.shape and torch.equal(mask_of_tokens(pixels), want.ceil())
    assert pixels.sum() == 2 * 256
