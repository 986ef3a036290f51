"""Flow matching as Lens was trained: which noise levels, which target, and the step that learns from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens_core.denoiser import LensDenoiser
from lens_core.ops import sdpa
from lens_core.sampling import grid_to_tokens, token_grid

from .encoder import TrainedEncoder
from .scenes import SIZES
from .training import Masters

# Of the paper: the mean of the logit-normal noise levels grows with the number of tokens.
_MU = (1.0, 1.3)
_TOKENS = tuple(sorted(math.prod(token_grid(*size)) for size in SIZES))
# Of the captions, so many are left out for guidance.
DROPPED = 0.1
_LANGUAGE = 0.05
NAMES = ("flow", "language", "gradient")


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
    """A step for pictures of one size (h, w in tokens): of encoder and denoiser, or of the denoiser alone."""

    def __init__(
        self,
        encoder: TrainedEncoder,
        denoiser: LensDenoiser,
        masters: Sequence[Masters],
        prefix: Tensor,
        grid: tuple[int, int],
        copies: int = 1,
    ) -> None:
        """``masters`` of what learns; ``copies``: noise levels that each picture is shown at in a step."""
        self.encoder, self.denoiser, self.masters, self.prefix = encoder, denoiser, masters, prefix
        self.grid, self.copies, self.mu = grid, copies, training_mu(grid[0] * grid[1])

    def together(self, latents: Tensor, real: Tensor, tails: Tensor) -> Tensor:
        """Packed latents [B, C, h, w], ids and which are real [B, S] -> losses and gradients' norm [3]."""
        features, logits = self.encoder(self.prefix, tails)
        spoken = _language_loss(logits, tails, real)
        return self._learn(self.flow_loss(latents, features, real), spoken)

    def alone(self, latents: Tensor, real: Tensor, features: Tensor) -> Tensor:
        """The same with features [B, S, L, H] of an encoder that learns no more."""
        flow = self.flow_loss(latents, features, real)
        return self._learn(flow, torch.zeros_like(flow))

    def _learn(self, flow: Tensor, spoken: Tensor) -> Tensor:
        (flow + _LANGUAGE * spoken).backward()
        norms = [masters.step() for masters in self.masters]
        return torch.stack([flow.detach(), spoken.detach(), norms[-1]])

    def flow_loss(self, latents: Tensor, features: Tensor, real: Tensor) -> Tensor:
        """Mean squared error of the velocity from data to noise."""
        clean = grid_to_tokens(latents).float().repeat(self.copies, 1, 1)
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(self.mu + torch.randn(len(clean), device=clean.device))
        mixed = torch.lerp(clean, noise, sigma[:, None, None])
        shown = real.repeat(self.copies, 1)
        shown = shown & (torch.rand(len(clean), 1, device=clean.device) >= DROPPED)
        velocity = self.denoiser(
            mixed.to(latents.dtype),
            sigma,
            features.repeat(self.copies, 1, 1, 1),
            self.grid,
            text_real=shown,
            attention=sdpa,
        )
        return F.mse_loss(velocity.float(), noise - clean)


def _language_loss(logits: Tensor, tails: Tensor, real: Tensor) -> Tensor:
    """Cross-entropy of each next token of the captions and the template's end."""
    wanted = tails[:, 1:].masked_fill(~real[:, 1:], -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten())
