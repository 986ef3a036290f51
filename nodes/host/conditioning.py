"""Prompts to ComfyUI conditioning, through whichever Lens CLIP is connected."""

from __future__ import annotations

import logging
from typing import Any

from ...lens_core.config import TEMPLATE_DATE
from ...lens_core.errors import SettingError
from ...lens_core.prompt.template import today
from .clip import HostTokenizer
from .progress import say

log = logging.getLogger(__name__)

DATES = ("pinned", "today")


def date_of(choice: str) -> str:
    """The template's date for an option of DATES."""
    return today() if choice == "today" else TEMPLATE_DATE


def encode_pair(
    clip: Any, prompt: str, negative: str, *, extended: bool, date: str, node_id: str | None
) -> tuple[list, list]:
    """Positive and negative conditioning, and the token count on the node; raises SettingError where no
    CLIP is connected."""
    if clip is None:
        raise SettingError(
            "No text encoder arrived: the loader before gave none. Expected a CLIP from "
            "LensEncoderLoader, or from CLIPLoader with type 'lens'."
        )
    if not prompt.strip():
        log.warning("The prompt is empty: the picture will follow no description.")
    options = {"extended": extended, "date": date}
    say(token_report(clip, prompt, extended), node_id)
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(prompt, keep_empty=True, **options))
    return positive, clip.encode_from_tokens_scheduled(clip.tokenize(negative, **options))


def token_report(clip: Any, prompt: str, extended: bool) -> str:
    """How many tokens the prompt has, of how many; which words are left out of a longer one."""
    if not isinstance(clip.tokenizer, HostTokenizer):
        return ""
    tokenizer = clip.tokenizer.tokenizer
    tokens, most = tokenizer(prompt, extended=extended), tokenizer.max_prompt_tokens
    if tokens.cut:
        words = " ".join(tokens.dropped.split()[:6])
        return f"Cut: {tokens.cut} of {tokens.cut + tokens.prompt_length} tokens left out, from “{words} …”"
    beyond = " (beyond what Lens was trained with)" if tokens.prompt_length > most else ""
    return f"{tokens.prompt_length} of {most} tokens{beyond}"
