"""Prompts to ComfyUI conditioning, through whichever Lens CLIP is connected."""

from __future__ import annotations

import logging
from typing import Any

from ...lens_core.config import TEMPLATE_DATE
from ...lens_core.errors import SettingError
from ...lens_core.prompt.template import today
from .clip import HostTokenizer
from .progress import say
from .settings import one_of

log = logging.getLogger(__name__)

DATES = ("pinned", "today")


def date_of(choice: str) -> str:
    """The template's date for an option of DATES."""
    return today() if one_of("template_date", choice, DATES) == "today" else TEMPLATE_DATE


def encode_pair(
    clip: Any, prompt: str, negative: str, *, extended: bool, date: str, node_id: str | None
) -> tuple[list, list]:
    """Positive and negative conditioning, and the token count on the node; raises SettingError where a
    link brought no CLIP or no text."""
    if clip is None:
        raise SettingError(
            "No text encoder arrived: the loader before gave none. Expected a CLIP from "
            "LensEncoderLoader, or from CLIPLoader with type 'lens'."
        )
    for name, text in (("prompt", prompt), ("negative", negative)):
        if not isinstance(text, str):
            raise SettingError(f"The {name} is a {type(text).__name__}; expected text. Connect a STRING.")
    if not prompt.strip():
        log.warning("The prompt is empty: the picture will follow no description.")
    options = {"extended": extended, "date": date}
    say(report(clip, prompt, negative, **options), node_id)
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(prompt, keep_empty=True, **options))
    return positive, clip.encode_from_tokens_scheduled(clip.tokenize(negative, **options))


def report(clip: Any, prompt: str, negative: str, *, extended: bool, date: str) -> str:
    """What the node shows: the prompt's tokens, and what is cut from prompt and negative."""
    if not isinstance(getattr(clip, "tokenizer", None), HostTokenizer):
        changed = extended or date != TEMPLATE_DATE
        return "This CLIP knows neither extended nor template_date: they do nothing." if changed else ""
    lines = [_token_report(clip.tokenizer, prompt, extended=extended, date=date)]
    if clip.tokenizer.tokens(negative, extended=extended, date=date).cut:
        lines.append("Negative: " + _token_report(clip.tokenizer, negative, extended=extended, date=date))
    return "\n".join(lines)


def _token_report(tokenizer: HostTokenizer, prompt: str, *, extended: bool, date: str) -> str:
    """How many tokens the prompt has, of how many; which words are left out of a longer one."""
    tokens, most = (
        tokenizer.tokens(prompt, extended=extended, date=date),
        tokenizer.tokenizer.max_prompt_tokens,
    )
    if tokens.cut:
        words = " ".join(tokens.dropped.split()[:6])
        return f"Cut: {tokens.cut} of {tokens.cut + tokens.prompt_length} tokens left out, from “{words} …”"
    beyond = " (beyond what Lens was trained with)" if tokens.prompt_length > most else ""
    return f"{tokens.prompt_length} of {most} tokens{beyond}"
