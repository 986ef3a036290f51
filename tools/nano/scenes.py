"""What a picture of the data set shows: a background, one or two groups of shapes, or a word.

A Scene holds everything that its picture and its caption say, places included, so that drawing is
arithmetic and the same scene is always the same picture. About a tenth of the combinations (a shape, its
colour, the background; a word, its colour) never occur in training: which ones, a hash decides.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeVar

from lens_core.sampling import BUCKETS

from .glyphs import FONTS, line_width

Colour = tuple[int, int, int]
Size = tuple[int, int]
Box = tuple[float, float, float, float]

COLOURS: dict[str, Colour] = {
    "red": (214, 34, 40),
    "orange": (246, 138, 22),
    "yellow": (250, 218, 50),
    "green": (36, 156, 66),
    "blue": (36, 86, 214),
    "purple": (122, 44, 160),
    "pink": (250, 152, 196),
    "white": (248, 248, 248),
    "black": (22, 22, 24),
    "gray": (132, 132, 132),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
TEXTURES = ("plain", "stripes", "dots", "checks")
RELATIONS = ("left of", "right of", "above", "below")
WORDS = (
    *("ART", "BAND", "BOOK", "CAFE", "EXIT", "FISH", "HAPPY", "HELLO", "HOTEL", "JAZZ", "KIWI", "LENS"),
    *("LOVE", "MOON", "MUSIC", "NANO", "OPEN", "PIZZA", "QUIZ", "SALE", "SUN", "TEA", "TRUCK", "ZOO"),
)
NUMBERS = tuple(str(number) for number in range(100))

# (height, width): the nine aspect ratios at about 256 image tokens.
SIZES: tuple[Size, ...] = tuple(BUCKETS[256].values())
# Shapes and words begin where a token of the picture does, two of the VAE's cells, and have few sizes: then a
# shape looks alike wherever it is, and a small model need not learn it anew for every pixel it is moved by.
CELL, TOKEN = 8, 16
# Pixels across: whole tokens.
ACROSS = {"small": (48.0,), "large": (64.0, 80.0)}
SMALL_BELOW = 56.0
CAP_HEIGHTS = (40.0, 48.0, 56.0)

# Pairs of colours that a background may fade between, with what must not be drawn on it: the colours that
# the fade passes near.
GRADIENTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("blue", "white"): ("gray",),
    ("blue", "green"): ("gray",),
    ("blue", "purple"): (),
    ("black", "blue"): ("purple",),
    ("black", "red"): (),
    ("black", "white"): ("gray",),
    ("green", "white"): ("gray",),
    ("green", "yellow"): (),
    ("orange", "yellow"): (),
    ("pink", "purple"): (),
    ("pink", "white"): (),
    ("red", "yellow"): ("orange",),
    ("white", "yellow"): (),
}

_MARGIN, _SPACING, _HALF_GAP = 4.0, 8.0, 2.0
_HELD_OUT_OF_256 = 26
_NAMES = tuple(COLOURS)
_PAIRS = tuple(GRADIENTS)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Background:
    """A colour with a faint texture, or a fade to ``second`` downwards or to the right."""

    colour: str
    texture: str = "plain"
    second: str | None = None
    downwards: bool = True


@dataclass(frozen=True)
class Group:
    """One to three of one shape, colour and size."""

    count: int
    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Word:
    """A word in capitals or a number."""

    text: str
    font: str
    colour: str


class Place(NamedTuple):
    """Where one shape or word is: its centre and width (of a word: cap height) in pixels, and what its
    colour deviates from the palette's."""

    x: float
    y: float
    across: float
    tint: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """A picture: ``main`` stands ``relation`` (say, left of) ``other``. ``places``: main's, then other's."""

    height: int
    width: int
    background: Background
    main: Group | Word
    other: Group | None
    relation: str | None
    places: tuple[Place, ...]
    tint: tuple[float, float, float]


@cache
def is_held_out(*combination: str) -> bool:
    """Whether training never shows (colour, shape, background colour), or (word, its colour)."""
    return hashlib.sha256(" ".join(combination).encode()).digest()[0] < _HELD_OUT_OF_256


def combinations(scene: Scene) -> list[tuple[str, ...]]:
    """What of a scene training may or may not show: the main part's combination, then the other group's."""
    parts = [scene.main] if scene.other is None else [scene.main, scene.other]
    return [_combination(part, scene.background) for part in parts]


def _combination(part: Group | Word, background: Background) -> tuple[str, ...]:
    if isinstance(part, Word):
        return part.text, part.colour
    return part.colour, part.shape, background.colour


def sample_scene(rng: random.Random, held_out: bool = False, size: Size | None = None) -> Scene:
    """A random scene of ``size`` (height, width), by default one of SIZES.

    ``held_out``: its main part is a combination that training never shows; the rest is always training's.
    """
    size = size or rng.choice(SIZES)
    background = _background(rng)
    kind = rng.random()
    if kind < 0.25:
        return _groups(rng, background, held_out, size, counts=(1,))
    if kind < 0.5:
        return _groups(rng, background, held_out, size, counts=(2, 3))
    if kind < 0.85:
        return _groups(rng, background, held_out, size, counts=(1, 2, 3), relation=rng.choice(RELATIONS))
    relation = rng.choice(("above", "below")) if rng.random() < 0.4 else None
    return _word_scene(rng, background, held_out, size, relation)


def _groups(
    rng: random.Random,
    background: Background,
    held_out: bool,
    size: Size,
    counts: tuple[int, ...],
    relation: str | None = None,
) -> Scene:
    """One group, or with a relation two."""
    main = _first(lambda: _group(rng, counts), lambda found: _allowed(found, background, held_out))
    if relation is None:
        return Scene(*size, background, main, None, None, _together(rng, main, _whole(size)), _tint(rng))
    other = _first(
        lambda: _group(rng, counts),
        lambda found: (
            _allowed(found, background) and (found.colour, found.shape) != (main.colour, main.shape)
        ),
    )
    here, there = _halves(relation, size)
    places = _together(rng, main, here) + _together(rng, other, there)
    return Scene(*size, background, main, other, relation, places, _tint(rng))


def _word_scene(
    rng: random.Random, background: Background, held_out: bool, size: Size, relation: str | None
) -> Scene:
    """A word or number, or with a relation one of them and a shape."""
    width = size[1]
    word = _first(
        lambda: _word(rng),
        lambda found: _allowed(found, background, held_out) and _fits(found, CAP_HEIGHTS[0], width),
    )
    if relation is None:
        return Scene(*size, background, word, None, None, _put_word(rng, word, _whole(size)), _tint(rng))
    other = _first(lambda: _group(rng, (1,)), lambda found: _allowed(found, background))
    here, there = _halves(relation, size)
    places = _put_word(rng, word, here) + _together(rng, other, there)
    return Scene(*size, background, word, other, relation, places, _tint(rng))


def _apart(rng: random.Random) -> random.Random:
    """Chance of its own for places: what prompts say does not depend on how many numbers these take."""
    return random.Random(rng.getrandbits(64))


def _first(draw: Callable[[], _T], accept: Callable[[_T], bool]) -> _T:
    """Draws until one is accepted."""
    while not accept(found := draw()):
        pass
    return found


def _allowed(part: Group | Word, background: Background, held_out: bool = False) -> bool:
    """Whether the part can be seen on the background and belongs to the split asked for."""
    taken = (background.colour, background.second)
    near = GRADIENTS[_pair(background)] if background.second else ()
    if part.colour in taken or part.colour in near:
        return False
    return is_held_out(*_combination(part, background)) == held_out


def _pair(background: Background) -> tuple[str, str]:
    first, second = sorted((background.colour, background.second or ""))
    return first, second


def _background(rng: random.Random) -> Background:
    kind = rng.random()
    if kind < 0.2:
        first, second = rng.sample(rng.choice(_PAIRS), 2)
        return Background(first, second=second, downwards=rng.random() < 0.5)
    texture = "plain" if kind < 0.65 else rng.choice(TEXTURES[1:])
    return Background(rng.choice(_NAMES), texture)


def _group(rng: random.Random, counts: tuple[int, ...]) -> Group:
    size = "small" if rng.random() < 0.5 else "large"
    return Group(rng.choice(counts), rng.choice(SHAPES), rng.choice(_NAMES), size)


def _word(rng: random.Random) -> Word:
    text = rng.choice(WORDS) if rng.random() < 0.65 else rng.choice(NUMBERS)
    return Word(text, rng.choice(FONTS), rng.choice(_NAMES))


def _tint(rng: random.Random) -> tuple[float, float, float]:
    """A deviation from a palette colour: small beside the colours' distances."""
    return rng.uniform(-6, 6), rng.uniform(-6, 6), rng.uniform(-6, 6)


def _whole(size: Size) -> Box:
    """The picture's inside as (left, top, right, bottom)."""
    height, width = size
    return _MARGIN, _MARGIN, width - _MARGIN, height - _MARGIN


def _halves(relation: str, size: Size) -> tuple[Box, Box]:
    """Where the main part and the other group go."""
    left, top, right, bottom = _whole(size)
    height, width = size
    if relation in ("left of", "right of"):
        first = (left, top, width / 2 - _HALF_GAP, bottom)
        second = (width / 2 + _HALF_GAP, top, right, bottom)
    else:
        first = (left, top, right, height / 2 - _HALF_GAP)
        second = (left, height / 2 + _HALF_GAP, right, bottom)
    return (first, second) if relation in ("left of", "above") else (second, first)


def _together(rng: random.Random, group: Group, box: Box) -> tuple[Place, ...]:
    """Places of a group side by side near the middle of its box."""
    rng = _apart(rng)
    left, top, right, bottom = box
    across, rows, spacing = _arrangement(group, right - left, bottom - top)
    pitch = across + spacing
    x = _begin(rng, left, right, max(rows) * pitch - spacing) + across / 2
    y = _begin(rng, top, bottom, len(rows) * pitch - spacing) + across / 2
    return tuple(
        Place(x + (index + (max(rows) - row) / 2) * pitch, y + down * pitch, across, _tint(rng))
        for down, row in enumerate(rows)
        for index in range(row)
    )


def _arrangement(group: Group, width: float, height: float) -> tuple[float, tuple[int, ...], float]:
    """How wide each of a group is, how many stand in each row, and the space between two: a line along the
    longer side, else along the other, else in two rows; as large as fits."""
    lines = [(group.count,), (1,) * group.count]
    rows_in_turn = (lines if width >= height else lines[::-1]) + ([(2, 1)] if group.count == 3 else [])
    return next(
        (across, rows, spacing)
        for rows in rows_in_turn
        for across in reversed(ACROSS[group.size])
        for spacing in (2 * CELL, CELL)
        if max(rows) * (across + spacing) - spacing + _SPACING <= width
        and len(rows) * (across + spacing) - spacing + _SPACING <= height
    )


def _begin(rng: random.Random, low: float, high: float, length: float) -> float:
    """Where something of a length begins: at most a cell from where it were in the middle between two sides,
    on the grid of tokens; where that has none there, of cells, or of pixels."""
    room = high - low - length
    middle, slack = low + room / 2, min(float(CELL), (room - _SPACING) / 2)
    for step in (TOKEN, CELL, 1):
        first, last = math.ceil((middle - slack) / step), math.floor((middle + slack) / step)
        if first <= last:
            return float(step * rng.randint(first, last))
    return middle


def _fits(word: Word, cap: float, width: float) -> bool:
    return line_width(word.text, word.font, cap) + _SPACING + 2 * _MARGIN <= width


def _put_word(rng: random.Random, word: Word, box: Box) -> tuple[Place, ...]:
    """A word's place in its box."""
    rng = _apart(rng)
    left, top, right, bottom = box
    # Q and J reach a quarter of the cap height below the line.
    room = (bottom - top - _SPACING) / 1.5
    width = right - left + 2 * _MARGIN
    cap = max(each for each in CAP_HEIGHTS if each <= room and _fits(word, each, width))
    length = line_width(word.text, word.font, cap)
    x = _begin(rng, left, right, length) + length / 2
    y = _begin(rng, top, bottom, 1.5 * cap) + 0.75 * cap
    return (Place(x, y, cap, _tint(rng)),)
