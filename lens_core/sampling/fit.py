"""A picture of any size brought to one of Lens' sizes, and its mask with it.

Letters: B pictures, C channels, H x W the picture given, h x w the one that comes out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import PIXELS_PER_TOKEN
from ..errors import SettingError
from .resolution import Size

CROP, PAD, STRETCH = "crop", "pad", "stretch"
FITS = (CROP, PAD, STRETCH)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int

    @classmethod
    def centred(cls, size: Size, within: Size) -> Box:
        """A rectangle of ``size`` in the middle of a picture of size ``within``."""
        return cls((within[0] - size[0]) // 2, (within[1] - size[1]) // 2, *size)


@dataclass(frozen=True)
class Placement:
    """The part ``taken`` of a picture is resized into the part ``filled`` of one of ``size``."""

    taken: Box
    filled: Box
    size: Size


def placement(height: int, width: int, size: Size, fit: str) -> Placement:
    """Where a picture of height x width goes in one of ``size``; centred, in its own proportions but for
    "stretch". Raises SettingError for a ``fit`` not in ``FITS``."""
    if fit not in FITS:
        raise SettingError(f"fit must be one of {', '.join(FITS)}, got {fit!r}.")
    given, (h, w) = (height, width), size
    taken = filled = None
    if fit == CROP:
        within = min(height, round(width * h / w)), min(width, round(height * w / h))
        taken = (max(1, within[0]), max(1, within[1]))
    if fit == PAD:
        within = min(h, round(height * w / width)), min(w, round(width * h / height))
        filled = (max(1, within[0]), max(1, within[1]))
    return Placement(Box.centred(taken or given, given), Box.centred(filled or size, size), size)


def fit_image(image: Tensor, place: Placement) -> Tensor:
    """Pictures [B, H, W, C] in 0..1 -> [B, h, w, 3]; padding repeats the outermost pixels.

    One channel is taken for all three; a fourth, alpha, is left out. Raises SettingError for another shape.
    """
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise SettingError(f"Expected pictures [batch, height, width, 3], got {list(image.shape)}.")
    pixels = image[..., :3].movedim(-1, 1).float()
    resized = _resized(pixels.expand(-1, 3, -1, -1), place, "bicubic").clamp(0, 1)
    return F.pad(resized, _border(place), mode="replicate").movedim(1, -1).contiguous()


def fit_mask(mask: Tensor | None, given: Size, place: Placement) -> Tensor:
    """What is to be redrawn of the pictures of ``fit_image``, [B, h, w] in 0..1: ``mask`` and the padding.

    ``mask`` [B, H, W] or [H, W] may have another size than the pictures' ``given`` one; None covers nothing.
    """
    if mask is None:
        mask = torch.zeros(given)
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if mask.shape[-2:] != given:
        mask = F.interpolate(mask, size=given, mode="bilinear", antialias=True)
    return F.pad(_resized(mask, place, "bilinear").clamp(0, 1), _border(place), value=1.0)[:, 0]


def mask_of_tokens(mask: Tensor) -> Tensor:
    """A mask [B, h, w] of pixels as one of image tokens [B, 1, h / 16, w / 16]: the most that it is anywhere
    in the token, so that nothing under the mask is kept."""
    return F.max_pool2d(mask[:, None], PIXELS_PER_TOKEN)


def pixels_of_tokens(mask: Tensor) -> Tensor:
    """Where a mask [B, 1, h / 16, w / 16] of image tokens covers anything, 1 or 0 a pixel: [B, h, w]."""
    covered = (mask[:, 0] > 0).float()
    return covered.repeat_interleave(PIXELS_PER_TOKEN, 1).repeat_interleave(PIXELS_PER_TOKEN, 2)


def _resized(x: Tensor, place: Placement, mode: str) -> Tensor:
    """The taken part of x [B, C, H, W] in the filled part's size."""
    taken, filled = place.taken, place.filled
    part = x[..., taken.top : taken.top + taken.height, taken.left : taken.left + taken.width]
    size = (filled.height, filled.width)
    return part if part.shape[-2:] == size else F.interpolate(part, size=size, mode=mode, antialias=True)


def _border(place: Placement) -> tuple[int, int, int, int]:
    """Left, right, top and bottom of the filled part, as ``F.pad`` takes them."""
    (height, width), box = place.size, place.filled
    return box.left, width - box.left - box.width, box.top, height - box.top - box.height
