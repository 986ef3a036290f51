"""What the VAE's decoder does between its convolutions, strip by strip: the definitions, in plain PyTorch.

A strip is some rows of a picture, [1, C, n, width]. Its moments [P, 3, C] are those of P parts of it: every
channel's count of pixels, mean, and sum of squared distances from that mean. Parts of several strips are
concatenated, and combined when a norm needs them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Parts of a strip at most: two for each of a large GPU's multiprocessors. More would take longer to combine,
# and 6 bytes for each of their channels' 4 at the most.
PARTS = 256


def wide(value: Tensor) -> Tensor:
    """In fp32, or in fp64 if it is: what statistics are computed in."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def add_moments(strip: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Add a bias [C] and a residual [1, C, n, width] to a strip, in place; the moments of what it is then.

    Faster kernels round the sum once.
    """
    if bias is not None:
        strip.add_(bias.view(1, -1, 1, 1))
    if residual is not None:
        strip.add_(residual)
    variance, mean = torch.var_mean(wide(strip), dim=(0, 2, 3), correction=0)
    count = torch.full_like(mean, strip[0, 0].numel())
    return torch.stack([count, mean, count * variance])[None]


def affine(moments: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """GroupNorm of a picture with these moments [P, 3, C] as scale and shift, [1, C, 1, 1] each, in fp32.

    Chan's formula: a group's sum of squares is that of its channels' and parts' own and of their means'
    distances from its mean. Summing x and x^2 instead would lose a small variance beside a large mean. For
    the same reason the means are summed as distances from one of them.
    """
    weight, bias = (wide(value).unflatten(0, (groups, -1)) for value in (weight, bias))
    count, means, squares = moments.unflatten(2, (groups, -1)).unbind(1)
    total = count.sum((0, 2))
    reference = means[0, :, 0]
    distances = means - reference[:, None]
    distance = (count * distances).sum((0, 2)) / total
    variance = (squares + count * (distances - distance[:, None]).square()).sum((0, 2)) / total
    scale = weight * torch.rsqrt(variance + eps)[:, None]
    shift = bias - scale * (reference + distance)[:, None]
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)


def normalise_silu(window: Tensor, piece: Tensor, scale: Tensor, shift: Tensor) -> None:
    """silu(piece * scale + shift) into ``window``, both [1, C, n, width].

    Computed in fp32; norm and SiLU round once each, as diffusers' two layers do.
    """
    F.silu(torch.addcmul(shift, piece, scale, out=window), inplace=True)


def double(window: Tensor, piece: Tensor) -> None:
    """Nearest neighbour: every pixel of [1, C, n, width] twice in its row, and every row twice unless
    ``window``, [1, C, 2n or n, 2 width], has room for one."""
    cells = window.unflatten(2, (piece.shape[2], -1)).unflatten(-1, (piece.shape[3], 2))
    cells.copy_(piece[:, :, :, None, :, None])
