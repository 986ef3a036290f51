"""Sampling through ComfyUI's own machinery: sizes from latents, guider and the run."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...lens_core.config import LATENT_CHANNELS, PIXELS_PER_TOKEN
from ...lens_core.denoiser import NAG_OFF, NagOptions, warn_without_effect
from ...lens_core.errors import SettingError
from ...lens_core.interval import WHOLE, Interval
from ...lens_core.sampling import BY_STEPS, check_size, partial_sigmas
from .guider import IntervalGuider, PreviewGuider
from .model import LensModel, require_lens, require_text, with_guidance
from .noise import SeededNoise

Latent = dict[str, Any]
_CHANNELS = LATENT_CHANNELS[0]


def empty_latent(height: int, width: int, batch_size: int) -> Latent:
    """Zeros [B, 128, h, w] for a size in pixels; samplers give them the model's channels."""
    device = comfy.model_management.intermediate_device()
    shape = (batch_size, _CHANNELS, height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
    return {"samples": torch.zeros(shape, device=device)}


def latent_grid(latent: Latent) -> tuple[int, int]:
    """(h, w) in image tokens of a latent, also of an empty one made for another model.

    Raises SizeError for ratios beyond 1:2, SettingError for another model's latents.
    """
    samples = latent["samples"]
    height, width = samples.shape[-2:]
    if samples.ndim == 4 and samples.shape[1] in LATENT_CHANNELS:
        ratio = PIXELS_PER_TOKEN
    else:
        ratio = latent.get("downscale_ratio_spacial")
        if samples.ndim != 4 or ratio is None or torch.count_nonzero(samples):
            raise SettingError(
                f"The latent has shape {list(samples.shape)}; Lens expects [batch, {_CHANNELS}, "
                "height / 16, width / 16]. Use LensEmptyLatent, or encode with FLUX.2's VAE."
            )
    check_size(height * ratio, width * ratio)
    return height * ratio // PIXELS_PER_TOKEN, width * ratio // PIXELS_PER_TOKEN


def sigmas_for(latent: Latent, steps: int, denoise: float, denoise_by: str = BY_STEPS) -> Tensor:
    """Noise levels for a latent's size; empty at denoise 0."""
    height, width = latent_grid(latent)
    return partial_sigmas(steps, height * width, denoise, denoise_by)


def make_guider(
    model,
    positive,
    negative,
    cfg: float,
    guided: tuple[float, float] = (WHOLE.start, WHOLE.end),
    nag: NagOptions = NAG_OFF,
) -> PreviewGuider:
    """A GUIDER with Lens' guidance in the ``guided`` part of the steps (shares: start, end), cfg 1 outside;
    at cfg 1 the negative is avoided there by ``nag``.

    Raises SettingError for another model or its conditioning, and for ``nag`` on another loader's.
    """
    interval = Interval(*guided)
    require_lens(model)
    if nag.scale and not isinstance(model.model, LensModel):
        raise SettingError(
            f"nag_scale is {nag.scale:g}, and the model's network is ComfyUI's own, which cannot do that. "
            "Load the file with LensModelLoader, or set nag_scale to 0."
        )
    for which, conditioning in (("positive", positive), ("negative", negative)):
        for text, _ in conditioning:
            if text is not None:
                require_text(model.model.model_config, text, which)
    given = any(text is not None and text.shape[1] for text, _ in negative)
    warn_without_effect(cfg, nag, given)
    model = with_guidance(model)
    usual = interval.whole and not nag.scale
    guider = PreviewGuider(model) if usual else IntervalGuider(model, interval, nag)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def sample(
    model,
    positive,
    negative,
    latent: Latent,
    *,
    seed: int,
    steps: int,
    cfg: float,
    noise: str,
    denoise: float,
    denoise_by: str = BY_STEPS,
    guided: tuple[float, float] = (WHOLE.start, WHOLE.end),
    nag: NagOptions = NAG_OFF,
    custom_noise: Any = None,
    part_of: tuple[int, int] | None = None,
) -> Latent:
    """Euler steps over Lens' schedule. ``noise`` is a kind of ``SeededNoise``; ``custom_noise``, a NOISE,
    takes the place of it and of the seed. ``guided`` and ``nag`` are as in make_guider, ``part_of`` as in
    PreviewGuider."""
    guider = make_guider(model, positive, negative, cfg, guided, nag)
    guider.part_of = part_of
    sigmas = sigmas_for(latent, steps, denoise, denoise_by)
    samples = samples_for(model, latent)
    out = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    out["samples"] = samples
    if not len(sigmas):
        return out
    source = SeededNoise(seed, noise) if custom_noise is None else custom_noise
    result = guider.sample(
        source.generate_noise(out),
        samples,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=source.seed,
    )
    return {**out, "samples": result.to(comfy.model_management.intermediate_device())}


def samples_for(model, latent: Latent) -> Tensor:
    """The latent [B, C, h, w], an empty one with the model's channels; raises SettingError for a picture's
    with others."""
    samples = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial")
    )
    channels = model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != channels:
        raise SettingError(
            f"The latent has shape {list(samples.shape)}, and the model draws with {channels} channels. "
            "Encode the picture with the VAE that belongs to the model."
        )
    return samples


def require_vae(vae: Any) -> None:
    """Raise SettingError for none, which loaders of whole checkpoints may give."""
    if vae is None:
        raise SettingError(
            "No VAE arrived: the loader before gave none. Connect LensVAELoader, or VAELoader with flux2-vae."
        )


def require_fitting_vae(vae: Any, samples: Tensor) -> None:
    """Raise SettingError for none, and for one that decodes other latents than these [B, C, h, w]."""
    require_vae(vae)
    channels = getattr(vae, "latent_channels", _CHANNELS)
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise SettingError(
            f"The latent has shape {list(samples.shape)} and the VAE decodes {channels} channels. "
            f"Lens' latents have {_CHANNELS}, which FLUX.2's VAE decodes: use LensVAELoader, or "
            f"VAELoader with flux2-vae. Nano Lens' have {LATENT_CHANNELS[1]}: use the VAE in its folder."
        )


def decode(latent: Latent, vae) -> Tensor:
    """Pictures [B, H, W, 3] of latents; a VAE with other latents is named before it is run."""
    require_fitting_vae(vae, latent["samples"])
    return vae.decode(latent["samples"])
