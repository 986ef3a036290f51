"""The story: prompt to features, noise to latents along the velocity, latents to a picture."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .config import ENCODER_OPTIONS, EncoderOptions
from .denoiser import STEP_CACHE_OFF, BlockGraphs, DenoiserRun, LensDenoiser, StepCache, StepCacheOptions
from .encoder import no_features
from .errors import SettingError
from .feature_cache import FeatureCache
from .interval import WHOLE, Interval
from .loading import build_denoiser, load_vae, open_denoiser, open_encoder
from .ops import Attention
from .quant.policy import NONE
from .sampling import (
    euler,
    norm_rescaled_guidance,
    reference_noise,
    scale_at,
    sigmas,
    token_grid,
    tokens_to_grid,
)
from .sampling.loop import OnStep
from .text_encoder import TextEncoder
from .vae import LensVAE, to_uint8
from .weights.loader import OnTensor

log = logging.getLogger(__name__)
# GPU memory that the encoder's layers leave to sampling and decoding when placed by "auto".
_WORKING_MEMORY = 6 << 30


@dataclass
class LensPipeline:
    """The components of a Lens folder on one device; the text encoder is read when a prompt needs it.

    ``attention`` and ``graphs`` are the denoiser's; ``quantization`` is what its weights were quantised by.
    """

    text: TextEncoder
    denoiser: LensDenoiser
    vae: LensVAE
    device: torch.device
    dtype: torch.dtype
    options: EncoderOptions = ENCODER_OPTIONS
    attention: Attention | None = None
    graphs: BlockGraphs | None = None
    quantization: str = NONE

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        device: torch.device,
        dtype: torch.dtype,
        on_tensor: OnTensor | None = None,
        options: EncoderOptions = ENCODER_OPTIONS,
        quantization: str = NONE,
    ) -> LensPipeline:
        """Load a folder in diffusers' layout; ``on_tensor(done, total)`` counts in each component.

        ``quantization`` is one of ``policy.CHOICES``, for the denoiser.
        """
        file = open_encoder(folder)
        kept = None if options.feature_cache is None else FeatureCache(options.feature_cache)
        text = TextEncoder(file, dtype, dense=options.dense, features=kept)
        opened = open_denoiser(folder)
        mode = opened.mode(quantization, device)
        denoiser = build_denoiser(opened, dtype, on_tensor=on_tensor, mode=mode, device=device)
        vae = load_vae(folder, dtype, on_tensor)
        placed = denoiser.to(device), vae.to(device)
        return cls(text, *placed, device, dtype, options, quantization=mode)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str,
        *,
        noise: Tensor,
        size: tuple[int, int],
        steps: int,
        cfg: float,
        negative: str = "",
        on_step: OnStep | None = None,
        guided: Interval = WHOLE,
        step_cache: StepCacheOptions = STEP_CACHE_OFF,
    ) -> Tensor:
        """Pictures [B, H, W, 3] in bytes from starting noise [B, N, C]; ``size`` is (height, width).

        Outside the ``guided`` steps cfg is 1; ``step_cache`` says which steps may be skipped.
        """
        grid = token_grid(*size)
        used = negative.strip() and cfg != 1
        positive = self.denoiser.embed_text(self.features(prompt))
        unwanted = self.denoiser.embed_text(self.features(negative) if used else self.empty_features())
        levels = sigmas(steps, noise.shape[1])
        known = levels.tolist()
        cache = StepCache.of(step_cache, known)
        run = DenoiserRun(known[:-1], cache=cache)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            scale = cfg if guided.whole else scale_at(sigma.item(), known, cfg, guided)
            return self.velocity(x, sigma, positive, unwanted, scale, grid, run)

        latents = euler(velocity, noise, levels.to(self.device), on_step)
        if cache is not None:
            log.info("%s.", cache.summary(len(self.denoiser.blocks)))
        return to_uint8(self.vae.decode(tokens_to_grid(latents, grid)))

    def features(self, prompt: str) -> Tensor:
        """Text features [1, S, L, H], out of the feature cache if it has them."""
        tokenizer = self.text.file.tokenizer
        ids = tokenizer(prompt, extended=self.options.extended, date=self.options.date).ids
        features = self.text.known(ids)
        if features is None:
            device = torch.device("cpu") if self.options.placement == "cpu" else self.device
            if device.type == "cuda":
                self.text.load(device, self._budget(device))
            (features,) = self.text.encode([ids], device)
        return features.to(self.device)

    def _budget(self, device: torch.device) -> float:
        """Bytes that the encoder's layers may take on the GPU."""
        free = torch.cuda.mem_get_info(device)[0] + self.text.layers.loaded
        if self.options.placement == "stream":
            return 0
        if self.options.placement == "auto" and not self.options.dense:
            return free - _WORKING_MEMORY
        if self.text.total > free:
            form = "dequantised experts" if self.options.dense else "all its layers on the GPU"
            raise SettingError(
                f"The text encoder with {form} takes {self.text.total / 1e9:.1f} GB and {free / 1e9:.1f} GB "
                "are free. Use --encoder_placement auto without --disable_mxfp4."
            )
        return float("inf")

    def empty_features(self) -> Tensor:
        """Text features [1, 0, L, H] of no prompt at all."""
        layers = self.denoiser.config.num_text_layers
        return no_features(self.text.model, layers, self.dtype).to(self.device)

    def velocity(
        self,
        x: Tensor,
        sigma: Tensor,
        positive: Tensor,
        negative: Tensor,
        cfg: float,
        grid: tuple[int, int],
        run: DenoiserRun | None = None,
    ) -> Tensor:
        """Guided velocity [B, N, C] by embedded prompts [1, S, H]; at cfg 1 the negative is not evaluated."""
        batch = x.shape[0]
        level = sigma.expand(batch)
        denoiser = partial(self.denoiser, attention=self.attention, run=run, graphs=self.graphs)
        cond = denoiser(x, level, positive.expand(batch, -1, -1), grid, entry="positive")
        if cfg == 1:
            return cond
        uncond = denoiser(x, level, negative.expand(batch, -1, -1), grid, entry="negative")
        return norm_rescaled_guidance(cond, uncond, cfg)

    def noise(self, seed: int, batch: int, size: tuple[int, int]) -> Tensor:
        """The reference's starting noise [B, N, C] for pictures of ``size`` (height, width)."""
        height, width = token_grid(*size)
        channels = self.denoiser.config.in_channels
        return reference_noise(seed, batch, height * width, channels, self.dtype, self.device)
