"""The story: prompt to features, noise to latents along the velocity, latents to a picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from .config import CAPTURED_LAYERS, ENCODER_OPTIONS, EncoderOptions
from .denoiser import LensDenoiser
from .encoder import GptOssEncoder, encode_prompt, no_features
from .feature_cache import FeatureCache, feature_key
from .loading import load_denoiser, load_encoder, load_vae
from .prompt import PromptTokenizer, PromptTokens
from .sampling import (
    euler,
    norm_rescaled_guidance,
    reference_noise,
    sigmas,
    token_grid,
    tokens_to_grid,
)
from .sampling.loop import OnStep
from .vae import LensVAE, to_uint8
from .weights.loader import OnTensor


@dataclass
class LensPipeline:
    """The four components of a Lens folder on one device."""

    tokenizer: PromptTokenizer
    encoder: GptOssEncoder
    denoiser: LensDenoiser
    vae: LensVAE
    device: torch.device
    dtype: torch.dtype
    options: EncoderOptions = ENCODER_OPTIONS
    # Stands for the encoder's weights in the feature cache's keys; "": its features are not kept.
    encoder_identity: str = ""

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        device: torch.device,
        dtype: torch.dtype,
        on_tensor: OnTensor | None = None,
        options: EncoderOptions = ENCODER_OPTIONS,
    ) -> LensPipeline:
        """Load a folder in diffusers' layout; ``on_tensor(done, total)`` counts in each component."""
        encoder, tokenizer = load_encoder(folder, dtype, on_tensor=on_tensor)
        denoiser = load_denoiser(folder, dtype, on_tensor=on_tensor)
        vae = load_vae(folder, dtype, on_tensor)
        parts = (tokenizer, encoder.to(device), denoiser.to(device), vae.to(device))
        return cls(*parts, device, dtype, options)

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
    ) -> Tensor:
        """Pictures [B, H, W, 3] in bytes from starting noise [B, N, C]; ``size`` is (height, width)."""
        grid = token_grid(*size)
        positive = self.features(prompt)
        used = negative.strip() and cfg != 1
        unwanted = self.features(negative) if used else self.empty_features()
        velocity = partial(self.velocity, positive=positive, negative=unwanted, cfg=cfg, grid=grid)
        latents = euler(velocity, noise, sigmas(steps, noise.shape[1]).to(self.device), on_step)
        return to_uint8(self.vae.decode(tokens_to_grid(latents, grid)))

    def features(self, prompt: str) -> Tensor:
        """Text features [1, S, L, H], out of the feature cache if it has them."""
        tokens = self.tokenizer(prompt, extended=self.options.extended, date=self.options.date)
        if self._cache is None or not self.encoder_identity:
            return self._encode(tokens)
        precision = f"{self.dtype}, {'dense' if self.options.dense else 'packed'} experts"
        key = feature_key(self.encoder_identity, precision, tokens.ids, CAPTURED_LAYERS)
        features = self._cache.get(key)
        if features is None:
            features = self._encode(tokens)
            self._cache.put(key, features)
        return features.to(self.device)

    @cached_property
    def _cache(self) -> FeatureCache | None:
        folder = self.options.feature_cache
        return None if folder is None else FeatureCache(folder)

    def _encode(self, tokens: PromptTokens) -> Tensor:
        return encode_prompt(self.encoder, tokens.ids, tokens.prefix_length, self.device, self.dtype)

    def empty_features(self) -> Tensor:
        """Text features [1, 0, L, H] of no prompt at all."""
        layers = self.denoiser.config.num_text_layers
        return no_features(self.encoder, layers, self.dtype).to(self.device)

    def velocity(
        self,
        x: Tensor,
        sigma: Tensor,
        positive: Tensor,
        negative: Tensor,
        cfg: float,
        grid: tuple[int, int],
    ) -> Tensor:
        """Guided velocity [B, N, C]; at cfg 1 the negative prompt is not evaluated."""
        batch = x.shape[0]
        level = sigma.expand(batch)
        cond = self.denoiser(x, level, positive.expand(batch, -1, -1, -1), grid)
        if cfg == 1:
            return cond
        uncond = self.denoiser(x, level, negative.expand(batch, -1, -1, -1), grid)
        return norm_rescaled_guidance(cond, uncond, cfg)

    def noise(self, seed: int, batch: int, size: tuple[int, int]) -> Tensor:
        """The reference's starting noise [B, N, C] for pictures of ``size`` (height, width)."""
        height, width = token_grid(*size)
        channels = self.denoiser.config.in_channels
        return reference_noise(seed, batch, height * width, channels, self.dtype, self.device)
