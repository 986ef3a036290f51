"""Which shape or letter a silhouette is: the template it overlaps most.

Templates are Pillow's polygons and the fonts' bitmap, not drawn by the code that draws the pictures.
Silhouettes and templates are cut at their bounds and scaled, with their proportions, to SIDE pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy
from PIL import Image, ImageDraw

from .glyphs import CELL_HEIGHT, CELL_WIDTH, FONTS, GLYPHS, atlas

# How much of each pixel is covered, 0..1.
Cover = numpy.ndarray
SIDE = 32
_CANVAS, _RADIUS = 256, 100.0
_TURNS = (-6, -3, 0, 3, 6)
_SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")


@dataclass(frozen=True)
class Likeness:
    """How much of a silhouette and each template is common, 0..1: ``shapes`` by name, ``glyphs`` by font and
    character."""

    shapes: dict[str, float]
    glyphs: dict[str, dict[str, float]]

    @property
    def shape(self) -> str:
        """The likeliest shape."""
        return max(self.shapes, key=self.shapes.__getitem__)

    @property
    def glyph(self) -> float:
        """How much it is like the likeliest glyph."""
        return max(max(font.values()) for font in self.glyphs.values())

    @property
    def lettering(self) -> float:
        """How much more it is like a letter than like a shape."""
        return self.glyph - self.shapes[self.shape]


def compare(cover: Cover) -> Likeness:
    """A silhouette [H, W], cut at its bounds, with every template."""
    names, templates = _templates()
    silhouette = normalised(cover).ravel()
    common = templates @ silhouette
    likeness = common / ((templates**2).sum(1) + (silhouette**2).sum() - common)
    shapes: dict[str, float] = {}
    glyphs: dict[str, dict[str, float]] = {font: {} for font in FONTS}
    for (kind, name), value in zip(names, likeness.tolist(), strict=True):
        found = shapes if kind == "shape" else glyphs[kind]
        found[name] = max(value, found.get(name, 0.0))
    return Likeness(shapes, glyphs)


@cache
def coverage() -> dict[str, float]:
    """Each shape's area where its width is 1."""
    return {shape: float(_drawn(shape, 0).sum()) / (2 * _RADIUS) ** 2 for shape in _SHAPES}


def normalised(cover: Cover) -> Cover:
    """[H, W] -> float32 [SIDE, SIDE]."""
    image = Image.fromarray(cover.astype(numpy.float32))
    scale = SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    result = numpy.zeros((SIDE, SIDE), numpy.float32)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    small = image.resize((width, height), Image.Resampling.BOX)
    result[top : top + height, left : left + width] = numpy.asarray(small)
    return result


def cut(cover: Cover) -> Cover:
    """Without the empty rows and columns around."""
    rows, columns = (numpy.flatnonzero((cover > 0.5).any(axis)) for axis in (1, 0))
    return cover[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@cache
def _templates() -> tuple[list[tuple[str, str]], numpy.ndarray]:
    """("shape" or the font, name) of each, and all [T, SIDE * SIDE]."""
    names, found = [], []
    for shape in _SHAPES:
        for turn in (0,) if shape in ("circle", "ring") else _TURNS:
            names.append(("shape", shape))
            found.append(normalised(cut(_drawn(shape, turn))))
    cells = atlas().reshape(len(FONTS), CELL_HEIGHT, len(GLYPHS), CELL_WIDTH)
    for row, font in enumerate(FONTS):
        for column, glyph in enumerate(GLYPHS):
            names.append((font, glyph))
            found.append(normalised(cut(cells[row, :, column] / 255)))
    return names, numpy.stack(found).reshape(len(found), -1)


def _drawn(shape: str, turn: float) -> Cover:
    """A shape [H, W], turned by so many degrees."""
    image = Image.new("L", (_CANVAS, _CANVAS))
    pen, middle = ImageDraw.Draw(image), _CANVAS / 2
    if shape in ("circle", "ring"):
        pen.ellipse([middle - _RADIUS, middle - _RADIUS, middle + _RADIUS, middle + _RADIUS], fill=255)
        if shape == "ring":
            hole = 0.48 * _RADIUS
            pen.ellipse([middle - hole, middle - hole, middle + hole, middle + hole], fill=0)
        return numpy.asarray(image) / 255
    cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    corners = [
        (
            middle + _RADIUS * (x * cosine - y * sine),
            middle + _RADIUS * (x * sine + y * cosine),
        )
        for x, y in _corners(shape)
    ]
    pen.polygon(corners, fill=255)
    return numpy.asarray(image) / 255


def _corners(shape: str) -> list[tuple[float, float]]:
    """Around (0, 0), reaching 1, y downwards."""
    if shape == "square":
        return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    if shape == "triangle":
        return [(0, -0.866), (1, 0.866), (-1, 0.866)]
    if shape == "star":
        points = [(1.0 if index % 2 == 0 else 0.45, math.pi * index / 5) for index in range(10)]
        return [(radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in points]
    arm = 0.34
    quarter = [(arm, -1), (arm, -arm), (1, -arm)]
    half = quarter + [(x, -y) for x, y in reversed(quarter)]
    return half + [(-x, -y) for x, y in half]
