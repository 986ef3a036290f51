"""Flow matching as Lens was trained: which noise levels, which target, and the step that learns from them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens_core.denoiser import LensDenoiser
from lens_core.ops import sdpa
from lens_core.sampling import grid_to_tokens, token_grid

from .scenes import SIZES
from .training import Masters

# Of the paper: the mean of the logit-normal noise levels grows with the number of tokens.
_MU = (1.0, 1.3)
_TOKENS = tuple(sorted(math.prod(token_grid(*size)) for size in SIZES))
# Of the captions, so many are left out for guidance.
DROPPED = 0.1
NAMES = ("flow", "gradient")


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
        self.mu = training_mu(grid[0] * grid[1])

    def __call__(self, latents: Tensor, real: Tensor, features: Tensor) -> Tensor:
        """Learn from packed latents [B, C, h, w] and features [B, S, L, H], of which tokens ``real`` [B, S]
        are -> loss and gradient's norm [2]."""
        loss = self.loss(latents, real, features)
        loss.backward()
        return torch.stack([loss.detach(), self.masters.step()])

    def loss(self, latents: Tensor, real: Tensor, features: Tensor) -> Tensor:
        """Mean squared error of the velocity from data to noise."""
        clean = grid_to_tokens(latents).float()
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(self.mu + torch.randn(len(clean), device=clean.device))
        mixed = torch.lerp(clean, noise, sigma[:, None, None])
        shown = real & (torch.rand(len(clean), 1, device=clean.device) >= DROPPED)
        velocity = self.denoiser(
            mixed.to(latents.dtype), sigma, features, self.grid, text_real=shown, attention=sdpa
        )
        return F.mse_loss(velocity.float(), noise - clean)
