"""Flow matching as Lens was trained: which noise levels, which target, and the step that learns from them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens_core.config import LENS
from lens_core.denoiser import LensDenoiser
from lens_core.ops import sdpa
from lens_core.sampling import grid_to_tokens, token_grid
from lens_core.sampling.schedule import empirical_mu, shifted

from .scenes import SIZES
from .training import Masters

# Of the paper: the mean of the logit-normal noise levels grows with the number of tokens.
_MU = (1.0, 1.3)
_TOKENS = tuple(sorted(math.prod(token_grid(*size)) for size in SIZES))
# Of the captions, so many are left out for guidance.
DROPPED = 0.1
# Of the pictures, so many learn at the noise levels of the sampler's own schedule instead. A third of its 20
# steps lie above 0.95, where the paper's levels have one picture in thirty, and there counts are decided.
SCHEDULED = 0.5
NAMES = ("flow", "scheduled", "gradient")


def training_mu(tokens: int) -> float:
    """From 1.0 for the smallest pictures to 1.3 for the largest."""
    share = (tokens - _TOKENS[0]) / (_TOKENS[-1] - _TOKENS[0])
    return _MU[0] + share * (_MU[1] - _MU[0])


def initialise(denoiser: LensDenoiser) -> None:
    """Modulation and output begin at zero, so that every block begins as the identity."""
    zero: list[nn.Module] = [denoiser.norm_out.linear, denoiser.proj_out]
    for block in denoiser.blocks:
        zero += [block.img_mod[1], block.txt_mod[1]]
    for layer in zero:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


class FlowStep:
    """A step for pictures of one size (h, w in tokens)."""

    def __init__(self, denoiser: LensDenoiser, masters: Masters, grid: tuple[int, int]) -> None:
        self.denoiser, self.masters, self.grid = denoiser, masters, grid
        tokens = grid[0] * grid[1]
        self.mu, self.sampled_mu = training_mu(tokens), empirical_mu(tokens, LENS.steps)

    def __call__(self, latents: Tensor, real: Tensor, features: Tensor) -> Tensor:
        """Learn from packed latents [B, C, h, w] and features [B, S, L, H], of which tokens ``real`` [B, S]
        are -> losses and gradient's norm [3]."""
        losses = self.losses(latents, real, features)
        losses.mean().backward()
        scheduled = self._scheduled(len(losses))
        means = [losses[scheduled:].mean(), losses[:scheduled].mean()]
        return torch.stack([*(mean.detach() for mean in means), self.masters.step()])

    def losses(self, latents: Tensor, real: Tensor, features: Tensor) -> Tensor:
        """Mean squared error of the velocity from data to noise, [B]."""
        clean = grid_to_tokens(latents).float()
        noise, sigma = torch.randn_like(clean), self.noise_levels(len(clean), clean.device)
        mixed = torch.lerp(clean, noise, sigma[:, None, None])
        shown = real & (torch.rand(len(clean), 1, device=clean.device) >= DROPPED)
        velocity = self.denoiser(
            mixed.to(latents.dtype), sigma, features, self.grid, text_real=shown, attention=sdpa
        )
        return F.mse_loss(velocity.float(), noise - clean, reduction="none").mean(dim=(1, 2))

    def noise_levels(self, count: int, device: torch.device) -> Tensor:
        """[count]: first those of the schedule, then logit-normal ones."""
        scheduled = self._scheduled(count)
        times = torch.rand(scheduled, device=device).clamp(min=1e-3)
        normal = torch.sigmoid(self.mu + torch.randn(count - scheduled, device=device))
        return torch.cat([shifted(times, self.sampled_mu), normal])

    def _scheduled(self, count: int) -> int:
        return int(SCHEDULED * count)
