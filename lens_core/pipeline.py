"""The story: prompt to features, noise to latents along the velocity, latents to a picture."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .config import ENCODER_OPTIONS, EncoderOptions
from .denoiser import (
    NAG_OFF,
    STEP_CACHE_OFF,
    BlockGraphs,
    DenoiserRun,
    LensDenoiser,
    NagOptions,
    Negative,
    StepCache,
    StepCacheOptions,
    warn_without_effect,
)
from .encoder import no_features
from .feature_cache import FeatureCache
from .interval import WHOLE, Interval
from .loading import build_denoiser, load_vae, open_denoiser, open_encoder
from .lora.merge import Choice, open_loras
from .memory.plan import Plan
from .memory.recovery import OutOfMemory, recovering, shortage
from .needs import Picture
from .ops import Attention
from .quant.policy import NONE
from .reasoner.local import LocalOptions, OnText, rewrite_locally, working_bytes
from .reasoner.rewrite import Rewritten
from .residence import Residence
from .sampling import (
    euler,
    is_guided,
    norm_rescaled_guidance,
    reference_noise,
    sigmas,
    token_grid,
    tokens_to_grid,
)
from .sampling.loop import OnStep
from .text_encoder import TextEncoder
from .vae import LensVAE, to_uint8
from .weights.loader import OnTensor

log = logging.getLogger(__name__)


@dataclass
class LensPipeline:
    """The components of a Lens folder on one device; the text encoder is read when a prompt needs it.

    ``residence`` says where each is; ``attention`` and ``graphs`` are the denoiser's; ``quantization`` is
    what its weights were quantised by.
    """

    residence: Residence
    dtype: torch.dtype
    options: EncoderOptions = ENCODER_OPTIONS
    attention: Attention | None = None
    graphs: BlockGraphs | None = None
    quantization: str = NONE
    _tokens: dict[str, Sequence[int]] = field(default_factory=dict)
    _encoded: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        device: torch.device,
        dtype: torch.dtype,
        on_tensor: OnTensor | None = None,
        options: EncoderOptions = ENCODER_OPTIONS,
        quantization: str = NONE,
        offload: str = "auto",
        budget: float | None = None,
        loras: Sequence[Choice] = (),
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
    ) -> LensPipeline:
        """Load a folder in diffusers' layout; ``on_tensor(done, total)`` counts in each component.

        ``text_encoder`` and ``vae`` are files or folders to take these from instead.

        ``quantization`` is one of ``policy.CHOICES``, for the denoiser; ``offload`` one of
        ``memory.plan.OFFLOADS``, within ``budget`` bytes of the device (None: all that is free); ``loras``
        are merged into the denoiser's weights before they are quantised.
        """
        file = open_encoder(text_encoder or folder)
        kept = None if options.feature_cache is None else FeatureCache(options.feature_cache)
        text = TextEncoder(file, dtype, dense=options.dense, features=kept)
        opened = open_denoiser(folder)
        merge = open_loras(loras, opened.sizes)
        mode = opened.mode(quantization, device)
        denoiser = build_denoiser(opened, dtype, on_tensor=on_tensor, mode=mode, device=device, loras=merge)
        residence = Residence(
            text,
            denoiser,
            load_vae(vae or folder, dtype, on_tensor),
            device,
            offload=offload,
            placement=options.placement,
            budget=budget,
        )
        return cls(residence, dtype, options, quantization=mode)

    @property
    def text(self) -> TextEncoder:
        return self.residence.text

    @property
    def denoiser(self) -> LensDenoiser:
        return self.residence.denoiser

    @property
    def vae(self) -> LensVAE:
        return self.residence.vae

    @property
    def device(self) -> torch.device:
        return self.residence.device

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
        nag: NagOptions = NAG_OFF,
        later: Sequence[str] = (),
    ) -> Tensor:
        """Pictures [B, H, W, 3] in bytes from starting noise [B, N, C]; ``size`` is (height, width).

        Outside the ``guided`` steps cfg is 1; ``step_cache`` says which steps may be skipped, ``nag`` how the
        negative is avoided in the guided steps at cfg 1. ``later`` are
        the prompts to come, encoded too while the encoder is there. Where memory runs out after all, once
        more with everything streamed; raises OutOfMemory if that fails too.
        """
        warn_without_effect(cfg, nag, bool(negative.strip()))
        asked = [prompt, *([negative] if negative.strip() and (cfg != 1 or nag.scale) else ())]
        split = self.text.file.tokenizer.split
        tokens = max(len(split(self._ids(text))[1]) for text in (*asked, *later))
        both = 2 if cfg == 1 and nag.scale else 1  # prompt and negative in one forward
        picture = Picture(*size, noise.shape[0], both * tokens, steps)
        draw = partial(
            self._draw,
            asked,
            later,
            noise,
            size,
            steps,
            cfg,
            on_step=on_step,
            guided=guided,
            step_cache=step_cache,
            nag=nag,
        )
        return recovering(
            lambda: draw(self.residence.plan(picture)),
            lambda: draw(self.residence.smaller(picture)),
            what="while drawing",
            free=self._free,
            explain=lambda: self._shortage(picture),
        )

    def _draw(
        self,
        asked: list[str],
        later: Sequence[str],
        noise: Tensor,
        size: tuple[int, int],
        steps: int,
        cfg: float,
        plan: Plan | None,
        *,
        on_step: OnStep | None,
        guided: Interval,
        step_cache: StepCacheOptions,
        nag: NagOptions,
    ) -> Tensor:
        for text in (*asked, *later):
            if text not in self._encoded:
                self._encoded[text] = self.features(text, plan).cpu()
        features = [self._encoded[text].to(self.device) for text in asked]
        self._encoded = {text: self._encoded[text] for text in (*asked[1:], *later)}
        self.residence.for_sampling(plan)
        prompts = [self.denoiser.embed_text(part) for part in (*features, self.empty_features())[:2]]
        del features
        latents = self._sample(prompts, noise, size, steps, cfg, on_step, guided, step_cache, nag)
        self.residence.for_decoding(plan)
        return to_uint8(self.vae.decode(tokens_to_grid(latents, token_grid(*size))))

    def _sample(
        self,
        prompts: Sequence[Tensor],
        noise: Tensor,
        size: tuple[int, int],
        steps: int,
        cfg: float,
        on_step: OnStep | None,
        guided: Interval,
        step_cache: StepCacheOptions,
        nag: NagOptions,
    ) -> Tensor:
        """Latents [B, N, C] by two embedded prompts [1, S, H]: the wanted, the unwanted."""
        positive, unwanted = prompts
        grid = token_grid(*size)
        levels = sigmas(steps, noise.shape[1])
        known = levels.tolist()
        cache = StepCache.of(step_cache, known)
        run = DenoiserRun(known[:-1], cache=cache)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            inside = guided.whole or is_guided(sigma.item(), known, guided)
            scale, options = (cfg, nag) if inside else (1.0, NAG_OFF)
            return self.velocity(x, sigma, positive, unwanted, scale, grid, run, options)

        latents = euler(velocity, noise, levels.to(self.device), on_step)
        if cache is not None:
            log.info("%s.", cache.summary(len(self.denoiser.blocks)))
        return latents

    def _free(self) -> None:
        """Give back all that the GPU holds of this pipeline."""
        if self.graphs is not None:
            self.graphs.clear()
        self.residence.clear()

    def _shortage(self, picture: Picture) -> OutOfMemory:
        residence = self.residence
        plan = residence.smaller(picture)
        needed = None if plan is None else plan.peak(residence.components(picture))
        fitting = residence.what_fits(picture) if plan is not None else ""
        advice = [
            f"a smaller picture ({fitting.removesuffix('.')})" if fitting else "a smaller picture",
            "fewer pictures at a time (--n)",
            "--quant_transformer int8_dynamic or uint4_sdnq",
        ]
        return shortage("while drawing", needed, residence.available(), advice)

    def rewrite(
        self, prompt: str, preset: str, options: LocalOptions, on_text: OnText | None = None
    ) -> Rewritten:
        """``prompt`` rewritten by the text encoder's own weights; parameters as in ``rewrite_locally``."""
        self.text.file.check_head()
        device = self.residence.for_writing(working_bytes(self.text, prompt, preset, options))
        try:
            return rewrite_locally(self.text, prompt, preset, device, options, on_text=on_text)
        finally:
            self.residence.clear()  # what is resident now no plan for a picture has counted

    def features(self, prompt: str, plan: Plan | None = None) -> Tensor:
        """Text features [1, S, L, H], out of the feature cache if it has them."""
        ids = self._ids(prompt)
        features = self.text.known(ids)
        if features is None:
            (features,) = self.text.encode([ids], self.residence.for_encoding(plan))
        return features.to(self.device)

    def _ids(self, prompt: str) -> Sequence[int]:
        """The prompt's tokens; one that is cut is warned of once."""
        if prompt not in self._tokens:
            tokenizer = self.text.file.tokenizer
            self._tokens[prompt] = tokenizer(
                prompt, extended=self.options.extended, date=self.options.date
            ).ids
        return self._tokens[prompt]

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
        nag: NagOptions = NAG_OFF,
    ) -> Tensor:
        """Guided velocity [B, N, C] by embedded prompts [1, S, H]; at cfg 1 the negative is not evaluated;
        ``nag`` may have it avoided."""
        batch = x.shape[0]
        level = sigma.expand(batch)
        denoiser = partial(self.denoiser, attention=self.attention, run=run, graphs=self.graphs)
        avoided = Negative(negative, nag) if cfg == 1 and nag.scale else None
        cond = denoiser(x, level, positive.expand(batch, -1, -1), grid, entry="positive", negative=avoided)
        if cfg == 1:
            return cond
        uncond = denoiser(x, level, negative.expand(batch, -1, -1), grid, entry="negative")
        return norm_rescaled_guidance(cond, uncond, cfg)

    def noise(self, seed: int, batch: int, size: tuple[int, int]) -> Tensor:
        """The reference's starting noise [B, N, C] for pictures of ``size`` (height, width)."""
        height, width = token_grid(*size)
        channels = self.denoiser.config.in_channels
        return reference_noise(seed, batch, height * width, channels, self.dtype, self.device)
