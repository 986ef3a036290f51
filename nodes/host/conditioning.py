"""Prompts to ComfyUI conditioning, through whichever Lens CLIP is connected."""

from __future__ import annotations

import logging

from ...lens_core.errors import SettingError

log = logging.getLogger(__name__)


def encode_pair(clip, prompt: str, negative: str) -> tuple[list, list]:
    """Positive and negative conditioning; raises SettingError where no CLIP is connected."""
    if clip is None:
        raise SettingError(
            "No text encoder arrived: the loader before gave none. Expected a CLIP from "
            "LensEncoderLoader, or from CLIPLoader with type 'lens'."
        )
    if not prompt.strip():
        log.warning("The prompt is empty: the picture will follow no description.")
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(prompt, keep_empty=True))
    return positive, clip.encode_from_tokens_scheduled(clip.tokenize(negative))
