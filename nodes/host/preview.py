"""Live previews while Lens samples, where nobody has chosen a method: ComfyUI's own default shows none."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from typing import Any

import comfy.options
import comfy.utils
import latent_preview
from comfy.cli_args import LatentPreviewMethod, args
from server import PromptServer
from torch import Tensor

# (step, denoised latents, latents, steps), as ComfyUI's samplers call it after every step.
Callback = Callable[[int, Tensor, Tensor, int], Any]


def with_previews(callback: Callback | None, patcher: Any, steps: int) -> Callback | None:
    """A sampling callback that shows the picture after each step as well, by ComfyUI's linear map of latents
    to colours; the same one where ComfyUI shows previews itself, or the user wants none, or nobody looks."""
    latents = patcher.model.latent_format
    if callback is None or _chosen() or latents.latent_rgb_factors is None:
        return callback
    previewer = latent_preview.Latent2RGBPreviewer(
        latents.latent_rgb_factors, latents.latent_rgb_factors_bias, latents.latent_rgb_factors_reshape
    )
    bar = comfy.utils.ProgressBar(steps)

    def show(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        callback(step, denoised, x, total)
        bar.update_absolute(step + 1, total, previewer.decode_latent_to_preview_image("JPEG", denoised))

    return show


def _chosen() -> bool:
    """Whether somebody chose a preview method, "none" included, for the server or in the page's settings."""
    if args.preview_method != LatentPreviewMethod.NoPreviews or _chosen_at_start():
        return True
    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    running = [] if queue is None else queue.get_current_queue_volatile()[0]
    return any(extra.get("preview_method") == "none" for _, _, _, extra, *_ in running)


@cache
def _chosen_at_start() -> bool:
    """ComfyUI's parsed arguments do not tell its default from the same method by name."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--preview-method")
    return comfy.options.args_parsing and parser.parse_known_args()[0].preview_method is not None
