"""Detectors of a grid in a picture: a pattern that repeats with every token of 16 x 16 pixels.

An error that is the same for all tokens, as rounded modulation makes it, repeats with the tokens. What
repeats every P pixels has all its energy at the points (i / P, j / P) of the picture's spectrum, in cycles
per pixel, and nothing else has a reason to prefer these points.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

PERIODS = (16, 32)
# Rounding to bytes leaves this much power in every bin; a pattern below it is not in the file.
_FLOOR = 1 / 255**2 / 12
# Bins from a point to its furthest neighbour at most, and at least: a Hann window takes one bin to each side.
_REACH, _NEAREST = 8, 2
# Primes and 15: they share no point of the spectrum but 0 with a period of 16.
_OTHER_PERIODS = (13, 15, 17, 19)


def grid_energy(image: Tensor) -> float:
    """How much of a picture [H, W, 3] in 0..1 repeats every 16 or 32 pixels; 1: no more than by chance.

    With S the power spectrum of the picture less its mean under a Hann window, summed over the channels, the
    score of a point p = (i / P, j / P) is S(p) over the mean of S in p and its neighbours on the ray from the
    origin through p, out to half the way to the next point. On that ray, because edges put their energy on
    one: what a picture holds is the same in p and beside it. The mean over all points but the origin is a
    period's score, the mean of the periods that the picture has room for is the result.

    The sides are cut to multiples of P, which puts every point on a bin of its own. The expectation is 1 for
    whatever spectrum is smooth along rays, since p is one of the bins it is compared with; for the same
    reason no score exceeds the number of these bins, 15. Less than 1 has a box with borders at multiples of
    16: it has no energy there. Byte rounding's power is added to S everywhere, so
    that nothing is made of nothing. Raises ValueError for a side below 64 pixels.
    """
    scores = [_score(image, period) for period in PERIODS if min(image.shape[:2]) >= 4 * period]
    if not scores:
        raise ValueError(f"a grid of 16 pixels needs 64 to show, not {image.shape[1]}x{image.shape[0]}")
    return sum(scores) / len(scores)


def _score(image: Tensor, period: int) -> float:
    counts = torch.tensor([side // period for side in image.shape[:2]])
    height, width = (counts * period).tolist()
    power = _spectrum(image[:height, :width])
    index = torch.arange(period) - period // 2
    points = torch.cartesian_prod(index, index)
    points = points[points.any(-1)] * counts  # [points, 2], bins from the origin
    reach = min(_REACH, int(counts.min()) // 2)
    along = [0, *(sign * step for step in range(_NEAREST, reach + 1) for sign in (-1, 1))]
    direction = points / points.abs().amax(-1, keepdim=True)
    bins = (points[:, None] + torch.tensor(along)[:, None] * direction[:, None]).round().long()
    around = power[bins[..., 0] % height, bins[..., 1] % width] + _FLOOR
    return (around[:, 0] / around.mean(-1)).mean().item()


def _spectrum(image: Tensor) -> Tensor:
    """Power [H, W] of a picture [H, W, 3] without its mean; white noise has its variance in every bin."""
    height, width, _ = image.shape
    window = torch.outer(*(torch.hann_window(side, dtype=torch.float64) for side in (height, width)))
    flat = image.double().cpu() - image.double().cpu().mean((0, 1))
    waves = torch.fft.fft2(flat * window[..., None], dim=(0, 1))
    return waves.abs().square().mean(-1) / window.square().sum()


def border_contrast(image: Tensor, period: int = 16) -> float:
    """How much more neighbouring pixels of a picture [H, W, 3] in 0..1 differ where two tokens meet.

    The median difference across the tokens' borders over the median of all others, on both axes; 1: borders
    are like any other place. What ``grid_energy`` cannot see, because the sign changes from token to token:
    tokens of slightly different colour have no energy at all at multiples of 1 / 16. Medians, so that the few
    edges of a picture do not count; half a byte's step is added to both.
    """
    across, elsewhere = [], []
    for axis in (0, 1):
        steps = image.movedim(axis, 0).double().diff(dim=0).abs()
        border = torch.arange(1, len(steps) + 1) % period == 0
        across.append(steps[border].flatten())
        elsewhere.append(steps[~border].flatten())
    half = 0.5 / 255
    return ((torch.cat(across).median() + half) / (torch.cat(elsewhere).median() + half)).item()


def mean_tile(images: Tensor, period: int = 16) -> Tensor:
    """What pictures [S, H, W, 3] have in common in all tiles of ``period`` pixels, less its mean: [P, P, 3].

    Rows and columns that fill no tile are left out.
    """
    height, width = (side // period * period for side in images.shape[1:3])
    whole = images[:, :height, :width].double()
    tile = whole.unflatten(2, (-1, period)).unflatten(1, (-1, period)).mean((0, 1, 3))
    return tile - tile.mean((0, 1))


def comb(images: Tensor, period: int = 16) -> float:
    """How much pictures, or errors of pictures, [S, H, W, 3] repeat every ``period`` pixels, the same in all.

    The mean tile's power against that of the mean tiles of 13, 15, 17 and 19 pixels, each by its number of
    values that are free: what falls to a period by chance, or because the picture is smooth, falls to the
    others too, and the result is about 1. The larger the picture and S, the less chance leaves. More
    sensitive than ``grid_energy`` and, unlike it, without a limit above. 1 for pictures that are constant.
    """

    def power(size: int) -> float:
        tiles = len(images) * (images.shape[1] // size) * (images.shape[2] // size)
        # A tile's values less their mean; by chance each has the error's power over the number of tiles.
        chance = mean_tile(images, size).square().sum().item() / 3 / (size * size - 1) * tiles
        return chance + _FLOOR

    return power(period) / statistics.median(power(other) for other in _OTHER_PERIODS)
