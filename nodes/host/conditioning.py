"""Prompts to ComfyUI conditioning, through whichever Lens CLIP is connected."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...lens_core.config import TEMPLATE_DATE
from ...lens_core.errors import SettingError
from ...lens_core.prompt.template import today
from .clip import HostTokenizer
from .progress import say
from .settings import one_of

log = logging.getLogger(__name__)

DATES = ("pinned", "today")
ONE, LINES, BARS = "one prompt", "one a line", "split at |"
SEVERAL = (ONE, LINES, BARS)


def date_of(choice: str) -> str:
    """The template's date for an option of DATES."""
    return today() if one_of("template_date", choice, DATES) == "today" else TEMPLATE_DATE


def split_prompts(prompt: str, several: str) -> list[str]:
    """The prompts in a text by an option of SEVERAL; blank parts are none, but a blank text is one prompt."""
    if one_of("several", several, SEVERAL) == ONE:
        return [prompt]
    parts = prompt.splitlines() if several == LINES else prompt.split("|")
    return [part.strip() for part in parts if part.strip()] or [prompt]


def encode_pair(
    clip: Any, prompt: str, negative: str, *, several: str, extended: bool, date: str, node_id: str | None
) -> tuple[list, list]:
    """Positive and negative conditioning, and the token count on the node; raises SettingError where a
    link brought no CLIP or no text. Of several prompts the positive is a batch."""
    require_clip(clip)
    for name, text in (("prompt", prompt), ("negative", negative)):
        if not isinstance(text, str):
            raise SettingError(f"The {name} is a {type(text).__name__}; expected text. Connect a STRING.")
    if not prompt.strip():
        log.warning("The prompt is empty: the picture will follow no description.")
    options = {"extended": extended, "date": date}
    prompts = split_prompts(prompt, several)
    say(report(clip, prompts, negative, **options), node_id)
    encoded, avoided = encode_each(clip, prompts, negative, **options)
    return as_batch(encoded), avoided


def require_clip(clip: Any) -> None:
    """Raise SettingError for none, which loaders of whole checkpoints may give."""
    if clip is None:
        raise SettingError(
            "No text encoder arrived: the loader before gave none. Expected a CLIP from "
            "LensEncoderLoader, or from CLIPLoader with type 'lens'."
        )


def encode_each(
    clip: Any, prompts: Sequence[str], negative: str, *, extended: bool = False, date: str = TEMPLATE_DATE
) -> tuple[list[list], list]:
    """A conditioning for each prompt, and one for the negative, all from one use of the encoder."""
    options = {"extended": extended, "date": date}
    encoded = [
        clip.encode_from_tokens_scheduled(clip.tokenize(text, keep_empty=True, **options)) for text in prompts
    ]
    return encoded, clip.encode_from_tokens_scheduled(clip.tokenize(negative, **options))


def as_batch(encoded: Sequence[list]) -> list:
    """Conditionings of one prompt each as one whose rows are the prompts, the shorter ones padded at the end
    and masked there; hooks on the CLIP may have made a schedule of entries, the same for all."""
    if len(encoded) == 1:
        return encoded[0]
    return [_stacked([tuple(entry) for entry in entries]) for entries in zip(*encoded, strict=True)]


def _stacked(entries: Sequence[tuple[Tensor, dict[str, Any]]]) -> list:
    """One entry [B, S, L * H] of entries [1, S_i, L * H]; a mask [B, S] only where lengths differ."""
    lengths = [features.shape[1] for features, _ in entries]
    longest = max(lengths)
    rows = [pad(features, (0, 0, 0, longest - features.shape[1])) for features, _ in entries]
    details = {name: value for name, value in entries[0][1].items() if name != "attention_mask"}
    masks = [details_of.get("attention_mask") for _, details_of in entries]
    if len(set(lengths)) > 1 or any(mask is not None for mask in masks):
        real = [
            torch.ones(1, length, dtype=torch.long) if mask is None else mask.cpu()
            for mask, length in zip(masks, lengths, strict=True)
        ]
        details["attention_mask"] = torch.cat([pad(row, (0, longest - row.shape[1])) for row in real])
    return [torch.cat(rows), details]


def report(clip: Any, prompts: Sequence[str], negative: str, *, extended: bool, date: str) -> str:
    """What the node shows: the prompts' tokens, and what is cut from them and the negative."""
    if not isinstance(getattr(clip, "tokenizer", None), HostTokenizer):
        changed = extended or date != TEMPLATE_DATE
        return "This CLIP knows neither extended nor template_date: they do nothing." if changed else ""
    lines = [_token_report(clip.tokenizer, prompt, extended=extended, date=date) for prompt in prompts]
    if len(prompts) > 1:
        lines.insert(0, f"{len(prompts)} prompts: set the latent's batch_size to {len(prompts)}.")
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
