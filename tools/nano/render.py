"""Scenes -> pictures, on any device, hundreds at once: signed distances for shapes, a bitmap for letters.

``collate`` turns scenes into a few rows of numbers, cheaply enough for a data loader's workers; ``render``
draws them all with large operations. Letters: B pictures, K places of shapes in a picture (SLOTS), G glyphs
of a word (LETTERS); places that a picture does not use have shape or glyph -1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from .glyphs import CAP, CELL_HEIGHT, CELL_WIDTH, FONTS, GLYPHS, PAD, TRACKING, atlas, ink_widths, line_width
from .scenes import COLOURS, SHAPES, TEXTURES, Background, Place, Scene, Word

SLOTS, LETTERS = 6, 5
Batch = dict[str, Tensor]

# Pixels of a texture's period: two tokens, so that every texture meets the token grid in the same way.
_PERIOD = 32
# How much of white, or on light colours of black, a texture adds.
_FAINT = {"white": 0.09, "yellow": 0.1, "pink": 0.12}
_FAINT_ON_DARK = 0.15
# A pattern's edge is about this sharp per unit of its cosines.
_TEXTURE_SHARPNESS = 4.0
# Fields of a scene's row: name -> numbers a scene.
_FIELDS = {
    "ground": 3,
    "second": 3,
    "shade": 3,
    "direction": 2,
    "texture": 1,
    "shape": SLOTS,
    "place": SLOTS * 4,
    "colour": SLOTS * 3,
    "glyph": LETTERS,
    "left": LETTERS,
    "line": 3,
    "ink": 3,
}
# By shape: is it round; ring's mid radius or the polygon's folds; two edges (normal x, y, distance), all for
# radius 1. A polygon is what lies within both edges of each of its like sectors. Shifts centre the box.
_STAR_INNER = 0.46


def _edge(x1: float, y1: float, x2: float, y2: float) -> tuple[float, float, float]:
    """The outward normal and distance of the line through two points, seen from the origin."""
    nx, ny = y1 - y2, x2 - x1
    sign = math.copysign(1 / math.hypot(nx, ny), nx * x1 + ny * y1)
    return nx * sign, ny * sign, sign * (nx * x1 + ny * y1)
