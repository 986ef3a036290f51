"""Draws scenes: parameters of a batch as tensors, then every picture at once, on any device.

Shapes are signed distances in pixels, so edges are smooth at any size; letters are looked up in the bitmap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .glyphs import CAP, CELL_HEIGHT, CELL_WIDTH, FONTS, GLYPHS, PAD, advances, atlas, ink_widths
from .scenes import COLOURS, SHAPES, TEXTURES, Group, Place, Scene, Word

# Shapes and letters a picture has at most.
_SHAPES, _LETTERS = 6, 5
_NO_LETTER = len(FONTS) * len(GLYPHS)
_FAINT = 0.1
_PERIOD = 32.0


def collate(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Parameters of scenes of one size, B first: ``ground`` [B, 6] two colours, ``texture`` and ``fade`` [B],
    ``shapes`` [B, 6, 7] (kind or -1, x, y, half width, colour), ``letters`` [B, 5, 7] (cell, left, top,
    scale, colour)."""
    grounds, textures, fades, shapes, letters = [], [], [], [], []
    for scene in scenes:
        back = scene.background
        first = _tinted(back.colour, scene.tint)
        grounds.append(first + (first if back.second is None else _tinted(back.second, scene.tint)))
        textures.append(TEXTURES.index(back.texture))
        fades.append(0 if back.second is None else 1 if back.downwards else 2)
        drawn, places = [], list(scene.places)
        word: list[tuple[float, ...]] = []
        if isinstance(scene.main, Word):
            word = _letters(scene.main, places.pop(0))
        else:
            drawn += [_shape(scene.main, place) for place in places[: scene.main.count]]
            del places[: scene.main.count]
        if scene.other is not None:
            drawn += [_shape(scene.other, place) for place in places]
        shapes.append(drawn + [(-1.0,) * 7] * (_SHAPES - len(drawn)))
        letters.append(word + [(float(_NO_LETTER), 0, 0, 1, 0, 0, 0)] * (_LETTERS - len(word)))
    return {
        "ground": torch.tensor(grounds),
        "texture": torch.tensor(textures),
        "fade": torch.tensor(fades),
        "shapes": torch.tensor(shapes),
        "letters": torch.tensor(letters),
    }


def render(batch: dict[str, Tensor], height: int, width: int) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] on the parameters' device."""
    place: dict[str, Any] = {"device": batch["ground"].device, "dtype": torch.float32}
    y = torch.arange(height, **place)[None, :, None] + 0.5
    x = torch.arange(width, **place)[None, None, :] + 0.5
    picture = _background(batch, x, y)
    for shape in batch["shapes"].unbind(1):
        cover = _cover(shape, x, y).unsqueeze(1)
        picture = torch.lerp(picture, shape[:, 4:, None, None], cover)
    if (batch["letters"][..., 0] < _NO_LETTER).any():
        for letter in batch["letters"].unbind(1):
            picture = torch.lerp(picture, letter[:, 4:, None, None], _letter_cover(letter, x, y))
    return picture


def _tinted(colour: str, tint: tuple[float, float, float]) -> tuple[float, ...]:
    return tuple(
        min(max((value + change) / 127.5 - 1, -1.0), 1.0)
        for value, change in zip(COLOURS[colour], tint, strict=True)
    )


def _shape(group: Group, place: Place) -> tuple[float, ...]:
    kind = float(SHAPES.index(group.shape))
    return kind, place.x, place.y, place.across / 2, *_tinted(group.colour, place.tint)


def _letters(word: Word, place: Place) -> list[tuple[float, ...]]:
    """Each letter's cell, and where that begins."""
    scale, widths = place.across / CAP, ink_widths()[word.font]
    room = advances(word.text, word.font, place.across)
    left = place.x - sum(room) / 2
    row, colour, result = FONTS.index(word.font), _tinted(word.colour, place.tint), []
    for glyph, advance in zip(word.text, room, strict=True):
        before = (advance - place.across * widths[glyph]) / 2
        cell = float(row * len(GLYPHS) + GLYPHS.index(glyph))
        top = place.y - place.across / 2 - (PAD + 3) * scale
        result.append((cell, left + before - PAD * scale, top, scale, *colour))
        left += advance
    return result


def _background(batch: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """[B, 3, H, W]: a colour, fading or with a faint texture."""
    first, second = (colour[:, :, None, None] for colour in batch["ground"].chunk(2, dim=1))
    fade, texture = (batch[name][:, None, None] for name in ("fade", "texture"))
    share = torch.where(fade == 2, x / x.shape[-1], y / y.shape[-2])
    stripes = ((x + y) % _PERIOD) < _PERIOD / 2
    dots = ((x % _PERIOD) - _PERIOD / 2).square() + ((y % _PERIOD) - _PERIOD / 2).square() < 25
    checks = ((x % (2 * _PERIOD)) < _PERIOD) ^ ((y % (2 * _PERIOD)) < _PERIOD)
    marked = ((texture == 1) & stripes) | ((texture == 2) & dots) | ((texture == 3) & checks)
    plain = torch.lerp(first, second, (share * (fade > 0)).unsqueeze(1))
    # Light colours get darker marks, dark ones lighter.
    towards = torch.where(first.mean(1, keepdim=True) > 0.3, -1.0, 1.0)
    return torch.lerp(plain, towards.expand_as(plain), _FAINT * marked.unsqueeze(1).float())


def _cover(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """How much of each pixel [B, H, W] a shape [B, 7] covers."""
    kind, at_x, at_y, half = (shape[:, index, None, None] for index in range(4))
    u, v = (x - at_x).expand(-1, y.shape[1], -1), (y - at_y).expand(-1, -1, x.shape[2])
    radius = torch.hypot(u, v)
    side, flat = u.abs(), v.abs()
    bar = 0.34 * half
    # From the tip down each side, and the base: an equilateral triangle as wide as the shape.
    low = 0.866 * half
    triangle = torch.maximum(v - low, (side - (v + low) * 0.57735) * 0.866)
    distances = (
        radius - half,
        torch.maximum(side, flat) - half,
        triangle,
        _star(u, v, half),
        torch.minimum(torch.maximum(side - bar, flat - half), torch.maximum(side - half, flat - bar)),
        (radius - 0.74 * half).abs() - 0.26 * half,
    )
    distance = torch.full_like(radius, 1.0)
    for index, found in enumerate(distances):
        distance = torch.where(kind == index, found, distance)
    return (0.5 - distance).clamp(0, 1)


def _star(u: Tensor, v: Tensor, half: Tensor) -> Tensor:
    """Distance to a five-pointed star, a tip upwards: the fold to one half tip, then one straight edge."""
    sector = math.pi / 5
    angle = (torch.atan2(u, -v) + sector) % (2 * sector) - sector
    radius = torch.hypot(u, v)
    across, along = radius * angle.abs().sin(), radius * angle.cos()
    inner = 0.45
    edge_x, edge_y = inner * math.sin(sector), inner * math.cos(sector) - 1
    length = math.hypot(edge_x, edge_y)
    return (-edge_y * across + edge_x * (along - half)) / length


def _letter_cover(letter: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """How much of each pixel [B, 1, H, W] a letter [B, 7] covers."""
    cell, left, top, scale = (letter[:, index, None, None] for index in range(4))
    u = ((x - left) / scale / CELL_WIDTH * 2 - 1).expand(-1, y.shape[1], -1)
    v = ((y - top) / scale / CELL_HEIGHT * 2 - 1).expand(-1, -1, x.shape[2])
    cells = _cells(x.device)[cell.flatten().long()]
    return F.grid_sample(cells, torch.stack([u, v], dim=-1), align_corners=False)


@cache
def _cells(device: torch.device) -> Tensor:
    """The bitmap's cells [fonts * glyphs + 1, 1, h, w], the last one empty."""
    cells = torch.from_numpy(atlas().copy()).view(len(FONTS), CELL_HEIGHT, len(GLYPHS), CELL_WIDTH)
    cells = cells.permute(0, 2, 1, 3).reshape(-1, 1, CELL_HEIGHT, CELL_WIDTH).float() / 255
    return torch.cat([cells, torch.zeros_like(cells[:1])]).to(device)
