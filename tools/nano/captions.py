"""What a picture of the data set is called: the same facts in several phrasings.

Every caption states count, shape, colour, relation, background and text. Sizes, fonts and textures are
stated in most; where they are not, a picture may have any.
"""

from __future__ import annotations

import random

from .scenes import Background, Group, Scene, Word

_NUMBERS = {1: "one", 2: "two", 3: "three"}
_PLURALS = {"cross": "crosses"}
_SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_TEXTURES = {
    "stripes": ("striped {}", "{} striped"),
    "dots": ("dotted {}", "{} dotted"),
    "checks": ("checkered {}", "{} checkered"),
}
_OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_RELATIONS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
# {scene} is the phrase of the shapes or the word; {ground} that of the background, with its article.
_PATTERNS = (
    "{scene} on {ground}",
    "{Scene} on {ground}.",
    "On {ground}: {scene}.",
    "Picture of {scene} on {ground}",
    "A picture of {scene} on {ground}.",
    "{Scene}. The background is {bare}.",
    "{scene}, {bare} background",
    "{Ground} with {scene}.",
    "{is_are} {scene} on {ground}.",
    "{scene} in front of {ground}",
)


def plain_caption(scene: Scene) -> str:
    """The one canonical phrasing; it states all that a picture can be judged by."""
    return f"{_subject(scene, None)} on {_article(_ground(scene.background, None))}"


def caption(scene: Scene, rng: random.Random) -> str:
    """A random phrasing."""
    subject = _subject(scene, rng)
    ground = _ground(scene.background, rng)
    return rng.choice(_PATTERNS).format(
        scene=subject,
        Scene=_capital(subject),
        ground=_article(ground),
        Ground=_capital(_article(ground)),
        bare=ground.removesuffix(" background").replace("background ", ""),
        is_are="There are" if isinstance(scene.main, Group) and scene.main.count > 1 else "There is",
    )


def _subject(scene: Scene, rng: random.Random | None) -> str:
    """All that stands on the background; with a generator in one of its wordings."""
    main = _part(scene.main, rng)
    if scene.other is None or scene.relation is None:
        return main
    other = _part(scene.other, rng)
    if rng is None:
        return f"{main} {scene.relation} {other}"
    if rng.random() < 0.25:
        return f"{other} {rng.choice(_RELATIONS[_OPPOSITES[scene.relation]])} {main}"
    return f"{main} {rng.choice(_RELATIONS[scene.relation])} {other}"


def _part(part: Group | Word, rng: random.Random | None) -> str:
    return _word(part, rng) if isinstance(part, Word) else _group(part, rng)


def _group(group: Group, rng: random.Random | None) -> str:
    """Say, ``two small blue squares``."""
    if rng is None:
        size = group.size
    else:
        size = rng.choice(_SIZES[group.size]) if rng.random() < 0.7 else ""
    words = f"{size} {group.colour} {group.shape}".lstrip()
    if group.count == 1:
        return f"one {words}" if rng is not None and rng.random() < 0.2 else f"a {words}"
    number = str(group.count) if rng is not None and rng.random() < 0.2 else _NUMBERS[group.count]
    return f"{number} {words.removesuffix(group.shape)}{_PLURALS.get(group.shape, group.shape + 's')}"


def _word(word: Word, rng: random.Random | None) -> str:
    """Say, ``the word "OPEN" in red serif letters``."""
    number = word.text.isdigit()
    kind, signs = ("number", "digits") if number else ("word", "letters")
    if rng is None:
        return f'the {kind} "{word.text}" in {word.colour} {word.font} {signs}'
    look = f"{word.colour} {word.font}" if rng.random() < 0.7 else word.colour
    pattern = rng.choice(
        (
            'the {kind} "{text}" in {look} {signs}',
            '"{text}" written in {look} {signs}',
            'the text "{text}" in {look}',
            '{look} {signs} that say "{text}"',
            'the {look} {kind} "{text}"',
        )
    )
    return pattern.format(kind=kind, text=word.text, look=look, signs=signs)


def _ground(background: Background, rng: random.Random | None) -> str:
    """Say, ``striped blue background``, without an article."""
    if background.second is not None:
        return _fade(background, rng)
    if background.texture == "plain":
        plain = rng is not None and rng.random() < 0.15
        return f"{'plain ' if plain else ''}{background.colour} background"
    forms = _TEXTURES[background.texture]
    if rng is None:
        return f"{forms[0].format(background.colour)} background"
    return f"{rng.choice(forms).format(background.colour)} background"


def _fade(background: Background, rng: random.Random | None) -> str:
    """A gradient; always named from its first colour, which is at the top or on the left."""
    first, second = background.colour, background.second
    start, end = ("top", "bottom") if background.downwards else ("left", "right")
    plain = f"background fading from {first} at the {start} to {second} at the {end}"
    if rng is None:
        return plain
    return rng.choice(
        (
            plain,
            f"background that goes from {first} ({start}) to {second} ({end})",
            f"gradient from {first} at the {start} to {second} at the {end}",
        )
    )


def _article(ground: str) -> str:
    """With ``a`` or ``an``."""
    return f"{'an' if ground[0] in 'aeiou' else 'a'} {ground}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
