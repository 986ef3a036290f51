"""Colours of latents without decoding them: the linear map that comes nearest, for previews where nobody has
published one for the VAE. It is fitted to pictures of soft and hard patches, which the VAE encodes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from .autoencoder import LensVAE, unpack

_PICTURES, _PATCHES, _SIDE = 8, 4, 128
# Of a latent that is not packed.
_PIXELS = 8
# Keeps channels small that say nothing about colour.
_RIDGE = 1e-3


@torch.no_grad()
def linear_colours(vae: LensVAE) -> tuple[Tensor, Tensor]:
    """(factors [c, 3], bias [3]): unpacked latents [..., c] to colours from -1 to 1."""
    parameter = next(vae.parameters())
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(_PICTURES, 3, _PATCHES, _PATCHES, generator=generator) * 2 - 1
    half = _PICTURES // 2
    soft = interpolate(patches[:half], (_SIDE, _SIDE), mode="bilinear")
    pictures = torch.cat([soft, interpolate(patches[half:], (_SIDE, _SIDE), mode="nearest")])
    latents = unpack(vae.encode(pictures.to(parameter.device, parameter.dtype)).float().cpu())
    known = latents.movedim(1, -1).flatten(0, 2)
    colours = avg_pool2d(pictures, _PIXELS).movedim(1, -1).flatten(0, 2)
    known = torch.cat([known, torch.ones(len(known), 1)], dim=1)
    ridge = _RIDGE * len(known) * torch.eye(known.shape[1])
    solution = torch.linalg.solve(known.T @ known + ridge, known.T @ colours)
    return solution[:-1], solution[-1]
