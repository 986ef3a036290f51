"""The chat text around a prompt, exactly as Lens was trained with it (GPT-OSS harmony format).

A prompt is fenced by special tokens on both sides, so the token ids of the whole are those of the
three parts in a row: only the prompt needs tokenising again. Never take a tokenizer folder's own
chat template: copies in circulation differ in a blank line and in the closing token.

The reference puts today's date into the system message, so its features change every day; the date
is pinned instead, to the day that ComfyUI's own encoder uses.
"""

from __future__ import annotations

import datetime

from .. import harmony
from ..config import TEMPLATE_DATE
from ..errors import SettingError
from ..harmony import CHANNEL, END, FINAL, MESSAGE, START

INSTRUCTIONS = (
    "Describe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background."
)
THOUGHT = "Need to generate one image according to the description."
# How many <|message|> tokens the prefix has; the prompt begins right after the last of them.
PREFIX_MESSAGES = 3


def today() -> str:
    """The local date as YYYY-MM-DD: what the reference writes into the system message."""
    return datetime.date.today().isoformat()


def check_date(date: str) -> None:
    """Raises SettingError unless ``date`` is a day of the calendar written YYYY-MM-DD."""
    try:
        # fromisoformat reads other spellings too (20260523), but the template has only this one.
        written = datetime.date.fromisoformat(date).isoformat()
    except ValueError:
        written = None
    if written != date:
        raise SettingError(
            f"The template's date must be a day written YYYY-MM-DD, got {date!r}. "
            f"The pinned one is {TEMPLATE_DATE}."
        )


def prefix(date: str = TEMPLATE_DATE) -> list[str]:
    """Everything before the prompt, in harmony's pieces; its features are cropped away (97 tokens)."""
    check_date(date)
    return [
        *harmony.message("system", harmony.system("medium", date)),
        *harmony.message("developer", harmony.DEVELOPER.format(instructions=INSTRUCTIONS)),
        *(START, "user", MESSAGE),
    ]


def suffix() -> list[str]:
    """Everything after the prompt; its features are kept (22 tokens)."""
    return [
        END,
        *harmony.message("assistant", THOUGHT, "analysis"),
        *(START, "assistant", CHANNEL, FINAL, MESSAGE),
    ]


def prefix_text(date: str = TEMPLATE_DATE) -> str:
    """The prefix with its control tokens written out."""
    return "".join(prefix(date))


def suffix_text() -> str:
    """The suffix with its control tokens written out."""
    return "".join(suffix())
