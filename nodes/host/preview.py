"""Live previews while Lens samples, where nobody has chosen a method: ComfyUI's own default shows none."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import comfy.options
import comfy.utils
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from server import PromptServer
from torch import Tensor

from ...lens_core.errors import LensError
from ...lens_core.loading import SUBFOLDERS, load_vae
from ...lens_core.vae import linear_colours

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


def colours_beside(path: Path, channels: int) -> tuple[Tensor, Tensor] | None:
    """``linear_colours`` of the VAE in a model's folder, or else in a folder beside it; None where there is
    none for latents of so many channels."""
    if not path.is_dir():
        return None
    for folder in dict.fromkeys((path, *sorted(path.parent.iterdir()))):
        if not (folder / SUBFOLDERS["vae"]).is_dir():
            continue
        try:
            vae = load_vae(folder, torch.float32)
        except (LensError, OSError):  # previews are no reason to fail; its own loader says what is wrong
            continue
        if 4 * vae.model.config.latent_channels == channels:
            return linear_colours(vae)
    return None


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
