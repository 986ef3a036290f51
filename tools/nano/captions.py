"""What is said about a scene: one canonical sentence, or one of many phrasings."""

from __future__ import annotations

import random

from .scenes import Background, Group, Scene, Word

_COUNTS = ("", "one", "two", "three")
_PLURALS = {"cross": "crosses"}
_OPENINGS = ("", "", "", "a picture of ", "Picture of ", "an image with ", "A drawing of ")


def plain_caption(scene: Scene) -> str:
    """The canonical phrasing: everything, in one order."""
    text = _part(scene.main, article="a")
    if scene.other is not None:
        text += f" {scene.relation} {_part(scene.other, article='a')}"
    return f"{text} on {_background(scene.background)}"


def caption(scene: Scene, rng: random.Random) -> str:
    """A random phrasing; sizes, textures and fonts are sometimes left out, everything else is always said."""
    article = rng.choice(("a", "one"))
    brief = rng.random() < 0.35
    main = _part(scene.main, article, brief, rng)
    ground = _background(scene.background, rng.random() < 0.3)
    if scene.other is not None:
        main = _related(scene, main, _part(scene.other, article, brief, rng), rng)
    text = _with_background(main, ground, rng)
    return text[0].upper() + text[1:] + rng.choice(("", ".")) if rng.random() < 0.4 else text


def _part(
    part: Group | Word, article: str = "a", brief: bool = False, rng: random.Random | None = None
) -> str:
    if isinstance(part, Group):
        number = article if part.count == 1 else _COUNTS[part.count]
        if part.count > 1 and rng is not None and rng.random() < 0.2:
            number = str(part.count)
        words = [number, "" if brief else part.size, part.colour, _noun(part)]
        return _articles(" ".join(word for word in words if word))
    what = "number" if part.text.isdigit() else "word"
    lead = f"the {what} " if rng is None or rng.random() < 0.7 else ""
    style = f"{part.colour} letters" if brief else f"{part.colour} {part.font} letters"
    return f'{lead}"{part.text}" in {style}'


def _noun(group: Group) -> str:
    return group.shape if group.count == 1 else _PLURALS.get(group.shape, group.shape + "s")


def _background(background: Background, brief: bool = False) -> str:
    if background.second is not None:
        way = "from top to bottom" if background.downwards else "from left to right"
        blend = f"a background fading from {background.colour} to {background.second}"
        return blend if brief else f"{blend} {way}"
    ground = _articles(f"a {background.colour} background")
    return ground if background.texture == "plain" or brief else f"{ground} with {background.texture}"


def _articles(text: str) -> str:
    """ "an" where a colour asks for it."""
    return text.replace("a orange", "an orange") if text.startswith("a orange") else text


def _related(scene: Scene, main: str, other: str, rng: random.Random) -> str:
    relation = scene.relation
    if relation in ("left of", "right of") and rng.random() < 0.5:
        relation = f"to the {relation}"
    return rng.choice(
        (
            f"{main} {relation} {other}",
            f"{main} {relation} {other}",
            f"{main}, {relation} {other}",
            f"{main} placed {relation} {other}",
        )
    )


def _with_background(main: str, ground: str, rng: random.Random) -> str:
    kind = rng.randrange(6)
    if kind < 3:
        return f"{rng.choice(_OPENINGS)}{main} on {ground}"
    if kind == 3:
        return f"on {ground}: {main}"
    if kind == 4:
        return f"{main}, {ground.removeprefix('a ').removeprefix('an ')}"
    return f"{ground} with {main}" if "with" not in ground else f"{ground} and {main}"
