"""Which pictures a grid has, and where each of them lies on its sheet.

Pictures are counted by model first, then prompt, then seed: so each model is loaded once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import product

from ..errors import SettingError

MODELS, PROMPTS, SEEDS = "models", "prompts", "seeds"
AUTO = "auto"
COLUMNS = (AUTO, MODELS, PROMPTS, SEEDS)
# At 1440 x 1440 so many pictures are 2.5 GB of RAM.
MOST_PICTURES = 100
_MOST_SEED = 2**64 - 1
_SEEDS_EXPECTED = "Expected whole numbers and ranges such as 1, 2, 10-13"


@dataclass(frozen=True)
class Axes:
    """What differs between the pictures: labels of the models, prompts and seeds, none of them empty."""

    models: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.count > MOST_PICTURES:
            raise SettingError(
                f"{len(self.models)} models x {len(self.prompts)} prompts x {len(self.seeds)} seeds are "
                f"{self.count} pictures; a grid has at most {MOST_PICTURES}. Leave some out."
            )

    @property
    def count(self) -> int:
        """Number of pictures."""
        return len(self.models) * len(self.prompts) * len(self.seeds)


@dataclass(frozen=True)
class Arrangement:
    """A sheet: ``cells`` are the pictures' numbers by row and column, ``captions`` the text above each cell,
    ``rows`` the text left of each row; "" where there is none. ``title`` is what all pictures share."""

    title: str
    rows: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    cells: tuple[tuple[int, ...], ...]


def parse_prompts(text: str) -> tuple[str, ...]:
    """One prompt a line; blank lines are none. Raises SettingError where there is no other."""
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise SettingError("There is no prompt. Expected one a line: write at least one.")
    return prompts


def parse_seeds(text: str) -> tuple[int, ...]:
    """Numbers and ranges, each seed once: "1, 5-7" -> 1, 5, 6, 7. Raises SettingError for anything else."""
    seeds: list[int] = []
    for part in re.split(r"[\s,;]+", re.sub(r"\s*-\s*", "-", text.strip())):
        match = re.fullmatch(r"([0-9]{1,20})(?:-([0-9]{1,20}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last <= _MOST_SEED:
            raise SettingError(f"The seeds are {text!r}. {_SEEDS_EXPECTED}, each below 2^64.")
        if last - first >= MOST_PICTURES:
            raise SettingError(
                f"The seeds {part} are {last - first + 1}; a grid has at most {MOST_PICTURES} pictures. "
                "Take fewer."
            )
        seeds += range(first, last + 1)
    return tuple(dict.fromkeys(seeds))


def as_labels(axes: Axes) -> list[str]:
    """One line a picture, in their order."""
    return [
        f"{model}, seed {seed}: {prompt}"
        for model, prompt, seed in product(axes.models, axes.prompts, axes.seeds)
    ]


def arrange(axes: Axes, columns: str = AUTO, common: str = "") -> Arrangement:
    """Where the pictures go: ``columns`` (of COLUMNS) side by side, all else in rows.

    AUTO takes the first of models, seeds, prompts that has several, and where only one has, fills rows and
    columns with it, each picture with its own caption. ``common`` comes last in the title. Raises
    SettingError for an unknown ``columns``.
    """
    if columns not in COLUMNS:
        raise SettingError(f"columns is {columns!r}; expected one of {', '.join(COLUMNS)}. Choose one.")
    labels = {
        PROMPTS: axes.prompts,
        MODELS: axes.models,
        SEEDS: tuple(f"seed {seed}" for seed in axes.seeds),
    }
    several = [name for name, texts in labels.items() if len(texts) > 1]
    shared = [texts[0] for name, texts in labels.items() if name not in several]
    title = ", ".join([*shared, common] if common else shared)
    if columns == AUTO and len(several) < 2:
        return _filled(title, labels[several[0]] if several else ("",))
    across = next(name for name in (MODELS, SEEDS) if name in several) if columns == AUTO else columns
    down = [name for name in several if name != across]
    rows = list(product(*(range(len(labels[name])) for name in down)))
    cells = tuple(
        tuple(
            _number(axes, dict(zip(down, row, strict=True)) | {across: column})
            for column in range(len(labels[across]))
        )
        for row in rows
    )
    heads = labels[across] if across in several else ("",)
    texts = ["\n".join(labels[name][at] for name, at in zip(down, row, strict=True)) for row in rows]
    blank = ("",) * len(heads)
    return Arrangement(title, tuple(texts), (heads, *(blank for _ in rows[1:])), cells)


def _filled(title: str, texts: tuple[str, ...]) -> Arrangement:
    """All pictures in order, in about as many rows as columns."""
    width = math.ceil(math.sqrt(len(texts)))
    starts = range(0, len(texts), width)
    numbers = range(len(texts))
    return Arrangement(
        title,
        ("",) * len(starts),
        tuple(texts[start : start + width] for start in starts),
        tuple(tuple(numbers[start : start + width]) for start in starts),
    )


def _number(axes: Axes, at: dict[str, int]) -> int:
    """The picture's number at these places on the axes; 0 on those that are not named."""
    model, prompt, seed = (at.get(name, 0) for name in (MODELS, PROMPTS, SEEDS))
    return (model * len(axes.prompts) + prompt) * len(axes.seeds) + seed
