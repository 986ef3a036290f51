"""GUIDERs: one that shows the picture while it samples, and one that also guides in a part of the steps and
leaves the negative out of the others; at cfg 1 it has the negative avoided by attention."""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any

import comfy.samplers
from torch import Tensor

from ...lens_core.denoiser import NAG_OFF, NagOptions, Negative
from ...lens_core.interval import Interval
from ...lens_core.sampling import is_guided
from .denoiser import NAG
from .preview import with_previews

log = logging.getLogger(__name__)


class PreviewGuider(comfy.samplers.CFGGuider):
    """ComfyUI's own, with live previews by default; ``part_of`` says how many steps of a longer bar were done
    before, and how many it has, where this run is one of several."""

    part_of: tuple[int, int] | None = None

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
        if self.part_of is not None:
            callback = _later(callback, *self.part_of)
        return super().sample(
            noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed
        )


def _later(callback: Any, before: int, of: int) -> Any:
    """A sampling callback whose steps are counted on from ``before``."""

    def later(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        callback(before + step, denoised, x, of)

    return later


class IntervalGuider(PreviewGuider):
    """At cfg 1 outside its steps; inside, where cfg is 1, with ``nag``.

    At cfg 1 ComfyUI itself leaves the negative out, unless a node on the MODEL asked for it at any cfg, and
    calls what nodes put around the guidance as ever; so nothing else is needed here.
    """

    def __init__(self, model_patcher: Any, guided: Interval, nag: NagOptions = NAG_OFF) -> None:
        super().__init__(model_patcher)
        self.guided = guided
        self.nag = nag

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
        transformer_options = options.get("transformer_options", {})
        inside = self._inside(timestep, transformer_options.get("sample_sigmas"))
        scale = self.cfg if inside else 1.0
        avoided = self._avoided(x, timestep) if inside and self.cfg == 1 and self.nag.scale else None
        if avoided is not None:
            options = {**options, "transformer_options": {**transformer_options, NAG: avoided}}
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, negative, positive, scale, model_options=options, seed=seed
        )

    def _inside(self, timestep: Tensor, sigmas: Tensor | None) -> bool:
        """Whether this noise level of a run over ``sigmas`` is guided."""
        if self.guided.whole or sigmas is None or len(sigmas) < 2:
            return True
        return is_guided(timestep.max().item(), sigmas.tolist(), self.guided)

    def _avoided(self, x: Tensor, timestep: Tensor) -> Negative | None:
        """The negative's entry for this noise level, as the run has prepared it: the first if there are more,
        None if there is none now. A negative without text is a prompt of no tokens."""
        level = timestep.max().item()
        entries = [
            entry
            for entry in self.conds.get("negative") or [{"model_conds": {}}]
            if entry.get("timestep_end", 0) <= level <= entry.get("timestep_start", math.inf)
        ]
        if not entries:
            return None
        if len(entries) > 1:
            _say_first()
        parts = {name: part.cond for name, part in entries[0]["model_conds"].items()}
        text = parts.get("c_crossattn")
        if text is None:
            text = self.inner_model.diffusion_model.text_stream(None, x[:1])
        return Negative(text, self.nag, parts.get("attention_mask"))


@cache
def _say_first() -> None:
    log.warning("Lens: the negative has several parts; nag_scale works with the first, on the whole picture.")
