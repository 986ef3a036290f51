"""GUIDERs: one that shows the picture while it samples, and one that also guides in a part of the steps and
leaves the negative out of the others."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from torch import Tensor

from ...lens_core.interval import Interval
from ...lens_core.sampling import scale_at
from .preview import with_previews


class PreviewGuider(comfy.samplers.CFGGuider):
    """ComfyUI's own, with live previews by default."""

    def sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Any = None,
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> Tensor:
        """Latents [B, C, h, w] of noise and a picture's latents of the same shape."""
        callback = with_previews(callback, self.model_patcher, len(sigmas) - 1)
        return super().sample(
            noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed
        )


class IntervalGuider(PreviewGuider):
    """At cfg 1 outside its steps.

    At cfg 1 ComfyUI itself leaves the negative out, unless a node on the MODEL asked for it at any cfg, and
    calls what nodes put around the guidance as ever; so nothing else is needed here.
    """

    def __init__(self, model_patcher: Any, guided: Interval) -> None:
        super().__init__(model_patcher)
        self.guided = guided

    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Denoised latents [B, C, h, w] of x at noise level timestep [B]."""
        options = model_options or {}
        positive, negative = (self.conds.get(which) for which in ("positive", "negative"))
        scale = self._scale(timestep, options.get("transformer_options", {}).get("sample_sigmas"))
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, negative, positive, scale, model_options=options, seed=seed
        )

    def _scale(self, timestep: Tensor, sigmas: Tensor | None) -> float:
        """cfg for this noise level of a run over ``sigmas``."""
        if sigmas is None or len(sigmas) < 2:
            return self.cfg
        return scale_at(timestep.max().item(), sigmas.tolist(), self.cfg, self.guided)
