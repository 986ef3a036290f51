"""Prompts written by the encoder of a Lens CLIP, with the growing text on the node."""

from __future__ import annotations

import time
from typing import Any

import comfy.model_management

from ...lens_core.errors import SettingError
from ...lens_core.harmony import FINAL, Reply
from ...lens_core.reasoner.local import LocalOptions, OnText, rewrite_locally, working_bytes
from .clip import LensClip
from .progress import on_progress, say

# Of a long analysis the page shows the end; it is told as often as a reader can follow.
_SHOWN = 600
_INTERVAL = 0.1


def write_prompt(clip: Any, prompt: str, preset: str, options: LocalOptions, node_id: str | None) -> str:
    """``prompt`` rewritten, which the node shows, with a warning if there is one.

    Raises SettingError where a link brought no Lens CLIP or no text, and CheckpointError for a file without
    lm_head.
    """
    if not isinstance(clip, LensClip):
        raise SettingError(
            f"LensReasoner got a {type(clip).__name__}; expected the CLIP of LensEncoderLoader, whose "
            "weights write the prompt. Connect that, or use LensReasonerAPI."
        )
    if not isinstance(prompt, str):
        raise SettingError(f"The prompt is a {type(prompt).__name__}; expected text. Connect a STRING.")
    text = clip.cond_stage_model.text
    text.file.check_head()

    def run() -> Any:
        comfy.model_management.throw_exception_if_processing_interrupted()
        step, move = _interruptible, on_progress()
        return rewrite_locally(
            text,
            prompt,
            preset,
            clip.patcher.load_device,
            options,
            on_text=_shown(node_id, options.max_new_tokens, move),
            on_layer=step,
            on_piece=step,
        )

    working = working_bytes(text, prompt, preset, options) if prompt.strip() else None
    result = clip.generating(run, working)
    say("\n\n".join(part for part in (result.warning, result.prompt) if part), node_id)
    return result.prompt


def _interruptible(done: int, total: int) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def _shown(node_id: str | None, most: int, move: Any) -> OnText:
    """Moves the bar and shows the text so far; raises if the user cancelled."""
    told = 0.0

    def show(reply: Reply, count: int) -> None:
        nonlocal told
        move(count, most)
        if time.monotonic() - told >= _INTERVAL:
            told = time.monotonic()
            start = "" if reply.channel == FINAL else f"Thinking, {count} tokens: "
            say(start + reply.text[-_SHOWN:], node_id)

    return show
