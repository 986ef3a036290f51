"""What a picture needs of the GPU, from the models of a graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_management

from ...lens_core.config import PIXELS_PER_TOKEN
from ...lens_core.errors import SettingError
from ...lens_core.memory.plan import Components, Plan, choose
from ...lens_core.memory.recovery import OutOfMemory
from ...lens_core.needs import Picture, picture_needs
from .clip import LensClip
from .model import LensModel
from .quantized import free_for_models
from .sampling import Latent, latent_grid
from .vae import LensHostVAE


def estimate(
    model: Any, clip: Any, vae: Any, latent: Latent, steps: int, text_tokens: int, vram_gb: float
) -> str:
    """Peaks of three ways to place the models, and what fits in ``vram_gb`` (0: what this GPU can give).

    Raises SettingError for models that other nodes loaded.
    """
    height, width = (size * PIXELS_PER_TOKEN for size in latent_grid(latent))
    picture = Picture(height, width, len(latent["samples"]), text_tokens, steps)
    parts = components(model, clip, vae, picture)
    layers = len(parts.encoder.layers), len(parts.denoiser.layers)
    whole = Plan(*layers, modulation=True, keep_encoder=True, keep_denoiser=True)
    leaving = replace(whole, keep_encoder=False, keep_denoiser=False)
    ways = {
        "All models stay": whole,
        "Each leaves when it is done": leaving,
        "Layers are streamed": replace(leaving, encoder_layers=0, denoiser_layers=0, modulation=False),
    }
    lines = [f"{picture.batch} x {width}x{height}, {steps} steps, {text_tokens} text tokens"]
    lines += [f"{name}: {_figures(plan, parts)}" for name, plan in ways.items()]
    budget = vram_gb * 1e9 or free_for_models(model.load_device)
    if budget:
        lines.append(f"In {budget / 1e9:.1f} GB: {_fitting(parts, budget)}")
    return "\n".join(lines)


def components(model: Any, clip: Any, vae: Any, picture: Picture) -> Components:
    """Sizes of the three models for a picture."""
    ours = ((model.model, LensModel), (clip, LensClip), (vae, LensHostVAE))
    for found, wanted in ours:
        if not isinstance(found, wanted):
            raise SettingError(
                f"{type(found).__name__} is not this pack's. Connect LensModelLoader, LensEncoderLoader and "
                "LensVAELoader; of other loaders' models the memory is not known."
            )
    network, encoder = model.model, clip.cond_stage_model
    return picture_needs(
        encoder.text,
        encoder.placement,
        network.diffusion_model,
        vae.first_stage_model,
        picture,
        model.load_device,
        network.get_dtype_inference(),
        network.quantized,
    )


def _figures(plan: Plan, parts: Components) -> str:
    peaks = ", ".join(f"{phase} {size / 1e9:.2f}" for phase, size in plan.peaks(parts).items())
    return f"{plan.peak(parts) / 1e9:.2f} GB ({peaks})"


def _fitting(parts: Components, budget: float) -> str:
    reserve = comfy.model_management.extra_reserved_memory()
    try:
        return choose(parts, budget - reserve).describe(parts)
    except OutOfMemory as error:
        return str(error)
