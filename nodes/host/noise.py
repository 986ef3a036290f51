"""Starting noise of seeds as ComfyUI's NOISE."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sample
import torch
from torch import Tensor

from ...lens_core.sampling import reference_noise, slerp, tokens_to_grid

HOST, REFERENCE = "host", "reference"
KINDS = (HOST, REFERENCE)
TOGETHER, SEEDS, VARIATIONS = "together", "consecutive seeds", "consecutive variations"
BATCHES = (TOGETHER, SEEDS, VARIATIONS)
_SEEDS = 2**64


class SeededNoise:
    """A NOISE: one seed's, moved by ``strength`` towards ``variation_seed``'s.

    ``kind`` says how it is drawn: as ComfyUI does, or as the reference, token by token in bf16 on the device
    that computes. ``batch`` says where pictures of a batch differ: drawn together from one seed, each from a
    seed of its own, or each with a variation seed of its own.
    """

    def __init__(
        self,
        seed: int,
        kind: str,
        variation_seed: int = 0,
        strength: float = 0.0,
        batch: str = TOGETHER,
    ) -> None:
        self.seed, self.kind = seed, kind
        self.variation_seed, self.strength, self.batch = variation_seed, strength, batch

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """Noise [B, C, h, w] in fp32 on the CPU; ``batch_index`` picks pictures of a larger batch."""
        noise = self._drawn(self.seed, latent, self.batch == SEEDS)
        if self.strength == 0:
            return noise
        other = self._drawn(self.variation_seed, latent, self.batch == VARIATIONS)
        return slerp(noise, other, self.strength)

    def _drawn(self, seed: int, latent: dict[str, Any], counts: bool) -> Tensor:
        """Of one seed, which ``counts`` up from picture to picture if they are not drawn together."""
        draw = _of_reference if self.kind == REFERENCE else comfy.sample.prepare_noise
        samples, rows = latent["samples"], latent.get("batch_index")
        if self.batch == TOGETHER:
            return draw(samples, seed, rows)
        rows = rows or range(samples.shape[0])
        return torch.cat([draw(samples[:1], (seed + row * counts) % _SEEDS) for row in rows])


def _of_reference(samples: Tensor, seed: int, batch_index: list[int] | None = None) -> Tensor:
    batch, channels, height, width = samples.shape
    rows = list(batch_index or range(batch))
    device = comfy.model_management.get_torch_device()
    noise = reference_noise(seed, max(rows) + 1, height * width, channels, torch.bfloat16, device)
    return tokens_to_grid(noise[rows], (height, width)).float().cpu().contiguous()
