"""One prompt rewritten, by whichever model answers: quoted texts are checked, and asked for once more."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ReasonerError, first_of
from ..harmony import Conversation
from .presets import insist, request
from .quotes import missing

_BREAK = re.compile(r"\s*[\n\v\f\r\u0085\u2028\u2029]+\s*")


@dataclass(frozen=True)
class Rewritten:
    """The prompt to draw, and a warning where it is not quite what was asked for (or is the original)."""

    prompt: str
    warning: str = ""


def rewrite(prompt: str, preset: str, answer: Callable[[Conversation], str]) -> Rewritten:
    """``prompt`` rewritten by ``answer``, which is asked a second time where quoted text got lost.

    A blank prompt is nothing to rewrite and comes back as it is, as does a prompt to which the answer is
    empty. Raises SettingError for an unknown preset, and what ``answer`` raises.
    """
    conversation = request(preset, prompt)
    if not prompt.strip():
        return Rewritten(prompt, "The prompt is blank: there is nothing to rewrite.")
    text = _paragraph(answer(conversation))
    lost = missing(prompt, text)
    if lost:
        again = _once_more(answer, insist(conversation, lost))
        still = missing(prompt, again)
        if again and len(still) < len(lost):
            text, lost = again, still
    if not text:
        return Rewritten(prompt, "The answer is empty: the prompt stays as it was.")
    if lost:
        listed = first_of([f'"{text}"' for text in lost])
        return Rewritten(text, f"Quoted text of the prompt is not in the answer: {listed}.")
    return Rewritten(text)


def _once_more(answer: Callable[[Conversation], str], conversation: Conversation) -> str:
    """The second answer; empty where there is none, for the first is not lost with it."""
    try:
        return _paragraph(answer(conversation))
    except ReasonerError:
        return ""


def _paragraph(text: str) -> str:
    """In one line, as a prompt that may stand in a list of prompts has to be."""
    return _BREAK.sub(" ", text.strip())
