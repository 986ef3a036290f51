"""Draws many scenes at once: captions encoded together, pictures of one size denoised together.

The parts are the product's; only the batching is of here. Each picture has its own noise, whatever it is
drawn with, so numbers do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lens_core.denoiser import DenoiserRun, LensDenoiser
from lens_core.loading import load_denoiser, load_vae, open_encoder
from lens_core.sampling import (
    euler,
    norm_rescaled_guidance,
    reference_noise,
    sigmas,
    token_grid,
    tokens_to_grid,
)
from lens_core.text_encoder import TextEncoder
from lens_core.vae import LensVAE, to_uint8

from .captions import plain_caption
from .scenes import Scene, Size

# (steps, tokens) -> noise levels [steps + 1]
Schedule = Callable[[int, int], Tensor]
# (latents, noise level, conditional, unconditional, scale) -> guided velocity, all [B, N, C]
Guide = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


@dataclass
class Parts:
    """A whole nano model on one device."""

    denoiser: LensDenoiser
    text: TextEncoder
    vae: LensVAE
    device: torch.device

    @classmethod
    def load(
        cls,
        folder: Path,
        device: torch.device,
        shared: Path | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Parts:
        """The denoiser of ``folder``; encoder and VAE too, or those of ``shared`` (Turbo has none)."""
        rest = shared or folder
        return cls(
            load_denoiser(folder, dtype).to(device).requires_grad_(False),
            TextEncoder(open_encoder(rest), dtype),
            load_vae(rest, dtype).to(device).requires_grad_(False),
            device,
        )

    def encode(self, prompts: Sequence[str], batch: int = 128) -> list[Tensor]:
        """Features [S, L, H] of each prompt, on the device."""
        tokenizer, found = self.text.file.tokenizer, []
        for start in range(0, len(prompts), batch):
            ids = [tokenizer(prompt).ids for prompt in prompts[start : start + batch]]
            found += [features[0].to(self.device) for features in self.text.encode(ids, self.device)]
        return found


def product_guidance(
    latents: Tensor, sigma: Tensor, wanted: Tensor, unwanted: Tensor, scale: float
) -> Tensor:
    """Lens' own, on the velocity."""
    return norm_rescaled_guidance(wanted, unwanted, scale)


@torch.inference_mode()
def draw(
    parts: Parts,
    scenes: Sequence[Scene],
    steps: int,
    cfg: float,
    *,
    features: Sequence[Tensor] | None = None,
    seed: int = 0,
    batch: int = 64,
    schedule: Schedule = sigmas,
    guide: Guide = product_guidance,
) -> list[Tensor]:
    """Pictures, bytes [H, W, 3] on the CPU, in the scenes' order.

    ``features`` are of the scenes' prompts, by default of their plain captions; picture number i starts from
    the noise of ``seed`` + i.
    """
    if features is None:
        features = parts.encode([plain_caption(scene) for scene in scenes])
    pictures: dict[int, Tensor] = {}
    for size, chosen in _batches(scenes, batch):
        grid = token_grid(*size)
        texts, real = padded([features[index] for index in chosen])
        noise = torch.cat([_noise(parts, seed + index, grid) for index in chosen]).to(parts.device)
        levels = schedule(steps, grid[0] * grid[1])
        latents = _denoise(parts.denoiser, noise, levels, texts, real, grid, cfg, guide)
        # Whole: in strips each picture of a batch would be decoded alone.
        drawn = to_uint8(parts.vae.decode_whole(tokens_to_grid(latents, grid))).cpu()
        pictures.update(zip(chosen, drawn, strict=True))
    return [pictures[index] for index in range(len(scenes))]


def padded(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Features [S, L, H] of several lengths -> [B, longest S, L, H], zeros behind, and which are real."""
    texts = torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True)
    lengths = torch.tensor([len(one) for one in features], device=texts.device)
    return texts, torch.arange(texts.shape[1], device=texts.device) < lengths[:, None]


def _batches(scenes: Sequence[Scene], batch: int) -> Iterator[tuple[Size, list[int]]]:
    """Numbers of scenes of one size, at most so many at once."""
    by_size: dict[Size, list[int]] = {}
    for index, scene in enumerate(scenes):
        by_size.setdefault((scene.height, scene.width), []).append(index)
    for size, indices in by_size.items():
        for start in range(0, len(indices), batch):
            yield size, indices[start : start + batch]


def _noise(parts: Parts, seed: int, grid: Size) -> Tensor:
    """On the CPU, so that every device draws the same pictures."""
    weight = parts.denoiser.img_in.weight
    return reference_noise(seed, 1, grid[0] * grid[1], weight.shape[1], weight.dtype, "cpu")


def _denoise(
    denoiser: LensDenoiser,
    noise: Tensor,
    levels: Tensor,
    texts: Tensor,
    real: Tensor,
    grid: Size,
    cfg: float,
    guide: Guide,
) -> Tensor:
    """Latents [B, N, C]."""
    embedded = denoiser.embed_text(texts)
    mask = None if real.all() else real
    run = DenoiserRun(levels[:-1].tolist())

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.expand(len(x))
        wanted = denoiser(x, level, embedded, grid, text_real=mask, run=run)
        if cfg == 1:
            return wanted
        unwanted = denoiser(x, level, embedded[:, :0], grid, run=run)
        return guide(x, sigma, wanted, unwanted, cfg)

    return euler(velocity, noise, levels.to(noise.device))
