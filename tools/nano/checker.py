"""Reads a picture back by plain image analysis: background, shapes with colours and places, the word.

``read`` knows the palette, the shapes and the fonts, not what was asked for; ``judge`` compares what was read
with a scene. A drawn picture is a little soft and noisy: a background is fitted to the picture's margin, what
is far from it belongs to the nearest pixel that is surely of one colour, and silhouettes are compared whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy
from scipy import ndimage

from .glyphs import FONTS
from .outlines import Likeness, compare, coverage
from .scenes import COLOURS, SMALL_BELOW, Background, Group, Scene, Word

Picture = numpy.ndarray
UNCLEAR = "unclear"
# Where no shape is.
_MARGIN = 6
# CIELAB distances: the palette's nearest two are 31 apart, a texture's marks at most 15 from their ground.
_FAR = 21.0
_NEAR_RGB = 12.0
# Steps of a byte within 3 x 3 pixels; more is an edge.
_STEEP = 40.0
# Of a silhouette's most frequent colour.
_RARE = 0.2
# A fade's ends are further apart than this.
_FADES = 25.0
# CIELAB from a palette's colour to a corner of the background that has it, slightly tinted.
_TINTED = 10.0
# Fewer pixels are a speck; a letter's thinnest is 290, a small triangle 500.
_SPECK = 130
# What a silhouette and its template have in common; in soft pictures small stars 0.83, letters mostly 0.87.
_CLEAR = 0.7
# Rings, the shapes most like a letter, are 0.06 to 0.14 less like any.
_RATHER = 0.03
# In cap heights.
_LETTER_GAP = 0.75


@dataclass(frozen=True)
class Found:
    """A shape (or UNCLEAR): its centre and, by its area, its width, in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    across: float


@dataclass(frozen=True)
class Line:
    """A word or number and its centre."""

    text: str
    font: str
    colour: str
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """All that a picture shows; ``background`` without its texture."""

    background: Background
    shapes: tuple[Found, ...]
    line: Line | None


@dataclass(frozen=True)
class _Piece:
    """Connected pixels of one colour: bounds, area in pixels, and what they look like."""

    colour: str
    left: float
    top: float
    right: float
    bottom: float
    area: float
    likeness: Likeness

    @property
    def height(self) -> float:
        return self.bottom - self.top

    @property
    def centre(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


def read(picture: Picture) -> Reading:
    """What a picture, bytes [H, W, 3], shows."""
    rgb = ndimage.gaussian_filter(picture.astype(numpy.float32), (0.6, 0.6, 0))
    ground = _fitted_ground(rgb)
    pieces = _pieces(rgb, ground)
    letters = _line_of_letters(pieces)
    shapes = [_shape(piece) for piece in pieces if piece not in letters]
    return Reading(_background(ground), tuple(shapes), _line(letters))


def judge(scene: Scene, picture: Picture) -> dict[str, bool]:
    """Whether a picture, bytes [H, W, 3], shows what a scene states: see ``agreement``."""
    return agreement(scene, read(picture))


def decided(picture: Picture) -> dict[str, bool]:
    """Whether a picture, bytes [H, W, 3], drawn without a prompt is like any of the pictures learnt from: a
    ``background`` in the palette's colours, and a clear ``shape`` or word before it."""
    ground, reading = _fitted_ground(picture.astype(numpy.float32)), read(picture)
    corners = lab(ground[:: len(ground) - 1, :: ground.shape[1] - 1].reshape(4, 1, 3))
    nearest = numpy.linalg.norm(corners - _palette(), axis=-1).min(axis=1)
    clear = reading.line is not None or any(one.shape != UNCLEAR for one in reading.shapes)
    return {"background": bool((nearest < _TINTED).all()), "shape": clear}


def shares(judged: Sequence[dict[str, bool]]) -> dict[str, float]:
    """How often each thing is right, 0..1, where it is stated."""
    found: dict[str, list[bool]] = {}
    for one in judged:
        for name, right in one.items():
            found.setdefault(name, []).append(right)
    return {name: sum(each) / len(each) for name, each in found.items()}


def agreement(scene: Scene, reading: Reading) -> dict[str, bool]:
    """Whether a picture read shows a scene's ``background``, ``colour`` and, of groups, ``shape``, ``count``,
    ``size``, of words ``text``, all of the main part; with two parts ``relation``."""
    drawn, wanted = reading.background, scene.background
    same_way = wanted.second is None or drawn.downwards == wanted.downwards
    result = {"background": same_way and (drawn.colour, drawn.second) == (wanted.colour, wanted.second)}
    main, other = _assigned(scene, reading.shapes)
    if isinstance(scene.main, Group):
        result |= _judge_group(scene.main, main)
        places = [(one.x, one.y) for one in main]
    else:
        line = reading.line
        result["text"] = line is not None and line.text == scene.main.text
        colours = [one.colour for one in main] if line is None else [line.colour]
        result["colour"] = _most([colour == scene.main.colour for colour in colours])
        places = [] if line is None else [(line.x, line.y)]
    if scene.relation is not None:
        result["relation"] = _stands(scene.relation, places, [(one.x, one.y) for one in other])
    return result


def _judge_group(wanted: Group, found: Sequence[Found]) -> dict[str, bool]:
    """Colour, shape and size hold if they do for most of the group."""
    return {
        "colour": _most([one.colour == wanted.colour for one in found]),
        "shape": _most([one.shape == wanted.shape for one in found]),
        "size": _most([(one.across < SMALL_BELOW) == (wanted.size == "small") for one in found]),
        "count": len(found) == wanted.count,
    }


def _most(right: Sequence[bool]) -> bool:
    return 2 * sum(right) > len(right)


def _assigned(scene: Scene, shapes: Sequence[Found]) -> tuple[list[Found], list[Found]]:
    """The shapes found, as the main part's and the other's: by colour, then shape; a stranger is main's."""
    groups: tuple[list[Found], list[Found]] = ([], [])
    for one in shapes:
        fits = [_fit(one, part) for part in (scene.main, scene.other)]
        groups[fits[1] > fits[0]].append(one)
    return groups


def _fit(found: Found, part: Group | Word | None) -> int:
    if not isinstance(part, Group):
        return 0
    return 2 * (found.colour == part.colour) + (found.shape == part.shape)


def _stands(relation: str, main: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> bool:
    """Whether everything of main stands so to everything of other."""
    axis = 0 if relation in ("left of", "right of") else 1
    first, second = [place[axis] for place in main], [place[axis] for place in other]
    if relation in ("right of", "below"):
        first, second = second, first
    return bool(first) and bool(second) and max(first) < min(second)


def _fitted_ground(rgb: Picture) -> Picture:
    """The background [H, W, 3] without its texture: a plane through the margin's pixels, strays left out."""
    height, width, _ = rgb.shape
    y, x = numpy.mgrid[:height, :width] / numpy.array([height, width])[:, None, None]
    design = numpy.stack([numpy.ones_like(x), x, y], axis=-1)
    inside = numpy.zeros((height, width), bool)
    inside[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = True
    rows, values = design[~inside], rgb[~inside]
    kept = numpy.ones(len(rows), bool)
    for _ in range(4):
        plane, *_ = numpy.linalg.lstsq(rows[kept], values[kept], rcond=None)
        error = numpy.linalg.norm(values - rows @ plane, axis=-1)
        kept = error <= max(30.0, 2.5 * float(numpy.median(error)))
    return (design @ plane).clip(0, 255).astype(numpy.float32)


def _background(ground: Picture) -> Background:
    """Its colour, or the two that it fades between."""
    ends = [ground[:, :1], ground[:, -1:], ground[:1], ground[-1:]]
    left, right, top, bottom = (lab(end.reshape(-1, 3).mean(0)) for end in ends)
    across, down = numpy.linalg.norm(right - left), numpy.linalg.norm(bottom - top)
    first, second = (top, bottom) if down > across else (left, right)
    names = nearest_colour(first), nearest_colour(second)
    if max(across, down) < _FADES or names[0] == names[1]:
        return Background(nearest_colour(lab(ground.reshape(-1, 3).mean(0))))
    return Background(names[0], second=names[1], downwards=bool(down > across))


def _pieces(rgb: Picture, ground: Picture) -> list[_Piece]:
    """Everything that is not background."""
    # What is near in RGB is near in CIELAB; that saves most pixels the conversion.
    strange = _dot(rgb - ground, rgb - ground) > _NEAR_RGB**2
    nearest = numpy.zeros(strange.shape, numpy.int64)
    colours, back = lab(rgb[strange]), lab(ground[strange])
    nearest[strange] = _nearest(colours)
    strange[strange] = (((colours - back) ** 2).sum(-1) > _FAR**2) & (_nearest(colours) != _nearest(back))
    sure = strange & (_steepness(rgb) < _STEEP)
    sure &= _common(nearest, strange, sure)
    if not sure.any():
        return []
    # An edge is of the colours in between: it belongs to the nearest pixel of a flat place, and as far as it
    # has that colour.
    at = tuple(ndimage.distance_transform_edt(~sure, return_distances=False, return_indices=True))
    nearest, share = nearest[at], _share(rgb, ground, rgb[at])
    found = []
    for index in numpy.unique(nearest):
        found += _pieces_of(tuple(COLOURS)[index], numpy.where(nearest == index, share, 0))
    return found


def _common(nearest: numpy.ndarray, strange: numpy.ndarray, sure: numpy.ndarray) -> numpy.ndarray:
    """Where a pixel's colour is no rare one among the sure pixels connected with it: a letter's narrow hole,
    half filled by blur, is of neither colour."""
    labels, count = ndimage.label(strange)
    votes = numpy.zeros((count + 1, len(COLOURS)))
    numpy.add.at(votes, (labels[sure], nearest[sure]), 1)
    common = votes >= _RARE * votes.max(axis=1, keepdims=True)
    return common[labels, nearest]


def _steepness(rgb: Picture) -> numpy.ndarray:
    """How much the colour varies around each pixel, [H, W]."""
    size = (3, 3, 1)
    red, green, blue = numpy.moveaxis(
        ndimage.maximum_filter(rgb, size) - ndimage.minimum_filter(rgb, size), -1, 0
    )
    return numpy.maximum(numpy.maximum(red, green), blue)


def _share(rgb: Picture, ground: Picture, full: Picture) -> numpy.ndarray:
    """How far each pixel is on the way from the background to its shape's colour, 0..1, [H, W]."""
    way = full - ground
    return (_dot(rgb - ground, way) / numpy.maximum(_dot(way, way), 1.0)).clip(0, 1)


def _dot(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """[..., 3] and [..., 3] -> [...]."""
    return numpy.einsum("...c,...c->...", a, b)


def _pieces_of(colour: str, cover: numpy.ndarray) -> list[_Piece]:
    """Connected parts of cover [H, W]; one within another's bounds (a zero's dot) belongs to that."""
    labels, count = ndimage.label(cover > 0.5, numpy.ones((3, 3)))
    bounds = ndimage.find_objects(labels)
    areas = ndimage.sum_labels(cover, labels, range(1, count + 1))
    pieces = []
    for area, (rows, columns) in zip(areas, bounds, strict=True):
        if area < _SPECK or any(_within((rows, columns), each) for each in bounds):
            continue
        likeness = compare(cover[rows, columns])
        pieces.append(_Piece(colour, columns.start, rows.start, columns.stop, rows.stop, area, likeness))
    return pieces


def _within(inner: tuple[slice, slice], outer: tuple[slice, slice]) -> bool:
    """Whether bounds lie in other, larger bounds."""
    return inner != outer and all(
        a.start >= b.start and a.stop <= b.stop for a, b in zip(inner, outer, strict=True)
    )


def _line_of_letters(pieces: Sequence[_Piece]) -> list[_Piece]:
    """The longest run of letters of one colour, left to right; empty if there is none. Within a run an O may
    be a little more like a ring."""
    runs: list[list[_Piece]] = []
    for piece in sorted(pieces, key=lambda piece: piece.left):
        if piece.likeness.glyph < _CLEAR or piece.likeness.lettering < -_RATHER:
            continue
        run = next((run for run in runs if _continues(run[-1], piece)), None)
        if run is None:
            runs.append([piece])
        else:
            run.append(piece)
    runs = [run for run in runs if sum(piece.likeness.lettering for piece in run) > _RATHER * len(run)]
    return max(runs, key=len, default=[])


def _continues(before: _Piece, piece: _Piece) -> bool:
    height = max(before.height, piece.height)
    return (
        piece.colour == before.colour
        and piece.left - before.right < _LETTER_GAP * height
        and abs(piece.top - before.top) < 0.3 * height
        and min(before.height, piece.height) > 0.6 * height
    )


def _line(letters: Sequence[_Piece]) -> Line | None:
    """The likeliest text in one font, all letters or all digits."""
    if not letters:
        return None
    spelt = [
        _spelt([letter.likeness.glyphs[font] for letter in letters], digits, font)
        for font in FONTS
        for digits in (False, True)
    ]
    _, text, font = max(spelt)
    x = (letters[0].left + letters[-1].right) / 2
    y = sum(letter.centre[1] for letter in letters) / len(letters)
    return Line(text, font, letters[0].colour, x, y)


def _spelt(glyphs: Sequence[dict[str, float]], digits: bool, font: str) -> tuple[float, str, str]:
    """How alike, the text, and the font."""
    total, text = 0.0, ""
    for each in glyphs:
        allowed = {glyph: value for glyph, value in each.items() if glyph.isdigit() == digits}
        best = max(allowed, key=allowed.__getitem__)
        total, text = total + allowed[best], text + best
    return total, text, font


def _shape(piece: _Piece) -> Found:
    x, y = piece.centre
    shape = piece.likeness.shape
    clear = piece.likeness.shapes[shape] >= _CLEAR
    across = math.sqrt(piece.area / coverage()[shape])
    return Found(piece.colour, shape if clear else UNCLEAR, x, y, across)


def nearest_colour(colour: numpy.ndarray) -> str:
    """The palette's nearest to a colour in CIELAB."""
    return tuple(COLOURS)[int(_nearest(colour))]


def _nearest(colours: numpy.ndarray) -> numpy.ndarray:
    """Numbers of the palette's nearest, [..., 3] -> [...]."""
    palette = _palette()
    # The colour's own square is the same for all.
    return ((palette**2).sum(-1) - 2 * colours @ palette.T).argmin(-1)


@cache
def _palette() -> numpy.ndarray:
    return lab(numpy.array(list(COLOURS.values()), numpy.float32))


def lab(rgb: numpy.ndarray) -> numpy.ndarray:
    """sRGB in 0..255 -> CIELAB (D65), [..., 3]: distances are about what is seen."""
    value = rgb / 255
    linear = numpy.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _TO_XYZ.sum(1)
    root = numpy.where(xyz > 216 / 24389, numpy.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = numpy.moveaxis(root, -1, 0)
    return numpy.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(numpy.float32)


_TO_XYZ = numpy.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]],
    numpy.float32,
)
