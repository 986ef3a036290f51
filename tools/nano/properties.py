"""What a caption says, as classes: what the encoder is taught to gather in the template's last tokens."""

from __future__ import annotations

from collections.abc import Sequence

from .glyphs import FONTS
from .scenes import COLOURS, RELATIONS, SHAPES, TEXTURES, Background, Group, Scene, Word

_COLOURS = tuple(COLOURS)
_SIGNS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_KINDS = (*SHAPES, "word")
_COUNTS = (1, 2, 3)
_SIZES = ("small", "large")
_LETTERS = 5

# Classes of each property, by the token that tells it: the main part, the other and how it stands to it, the
# background, the letters. Class 0 is "there is none".
PROPERTIES: tuple[tuple[int, ...], ...] = (
    (len(_KINDS) + 1, len(_COLOURS) + 1, len(_COUNTS) + 1, len(_SIZES) + 1),
    (len(SHAPES) + 1, len(_COLOURS) + 1, len(_COUNTS) + 1, len(_SIZES) + 1, len(RELATIONS) + 1),
    (len(_COLOURS) + 1, len(_COLOURS) + 1, len(TEXTURES) + 1, 3),
    (len(FONTS) + 1, *[len(_SIGNS) + 1] * _LETTERS),
)


def properties(scene: Scene) -> list[int]:
    """The class of each property, in PROPERTIES' order."""
    word = scene.main if isinstance(scene.main, Word) else None
    relation = _class(RELATIONS, scene.relation)
    return [*_part(scene.main), *_part(scene.other), relation, *_ground(scene.background), *_letters(word)]


def _class(names: Sequence[object], name: object) -> int:
    return 0 if name is None else 1 + names.index(name)


def _part(part: Group | Word | None) -> list[int]:
    """Kind, colour, count and size."""
    if part is None:
        return [0, 0, 0, 0]
    if isinstance(part, Word):
        return [_class(_KINDS, "word"), _class(_COLOURS, part.colour), 0, 0]
    of = (_KINDS, part.shape), (_COLOURS, part.colour), (_COUNTS, part.count), (_SIZES, part.size)
    return [_class(names, name) for names, name in of]


def _ground(ground: Background) -> list[int]:
    """Colour, the colour it fades to, texture, and the way of the fade."""
    way = 0 if ground.second is None else 1 + ground.downwards
    colours = _class(_COLOURS, ground.colour), _class(_COLOURS, ground.second)
    return [*colours, _class(TEXTURES, ground.texture), way]


def _letters(word: Word | None) -> list[int]:
    """Font, then each sign."""
    if word is None:
        return [0] * (1 + _LETTERS)
    signs = [_class(_SIGNS, sign) for sign in word.text]
    return [_class(FONTS, word.font), *signs, *[0] * (_LETTERS - len(signs))]
