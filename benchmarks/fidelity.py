"""How near one result is to another: velocities token by token, pictures as numbers and as seen."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Equal pictures have no PSNR; rounding to bytes alone is 59 dB, so nothing is told apart up here.
PSNR_MAX = 100.0
# The SSIM of Wang et al. 2004: an 11 x 11 Gaussian window with these constants.
_WINDOW, _SIGMA, _C1, _C2 = 11, 1.5, 0.01**2, 0.03**2
# Where torchvision keeps the network below lpips' own weights.
_ALEXNET = "checkpoints/alexnet-owt-7be5be79.pth"


def per_token(got: Tensor, want: Tensor) -> dict[str, float]:
    """Cosine and relative L2 of each token's vector in [..., N, C], as mean and worst over all of them."""
    got, want = got.double(), want.double()
    cosine = torch.cosine_similarity(got, want, dim=-1)
    distance = (got - want).norm(dim=-1) / want.norm(dim=-1)
    return {
        "cosine": cosine.mean().item(),
        "cosine, worst": cosine.min().item(),
        "relative L2": distance.mean().item(),
        "relative L2, worst": distance.max().item(),
    }


def common_share(error: Tensor) -> float:
    """Share of an error's energy [N, C] that is the same vector in all N tokens; 1 / N by chance."""
    total = error.double().square().sum(-1).mean()
    return (error.double().mean(0).square().sum() / total).item() if total else 0.0


def psnr(got: Tensor, want: Tensor) -> float:
    """Peak signal to noise of pictures in 0..1, dB; ``PSNR_MAX`` at most."""
    error = (got.double() - want.double()).square().mean()
    return min(PSNR_MAX, (-10 * torch.log10(error)).item())


def ssim(got: Tensor, want: Tensor) -> float:
    """Structural similarity of pictures [H, W, 3] in 0..1: the mean over windows that fit, and channels."""
    x, y = (image.double().movedim(-1, 0)[:, None] for image in (got, want))  # [3, 1, H, W]
    offset = torch.arange(_WINDOW, dtype=torch.float64, device=x.device) - _WINDOW // 2
    line = torch.exp(-offset.square() / (2 * _SIGMA**2))
    line /= line.sum()

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, line[None, None, None]), line[None, None, :, None])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    shape = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return (light * shape).mean().item()


def lpips(device: torch.device | str) -> Callable[[Tensor, Tensor], float] | None:
    """LPIPS (AlexNet) of two pictures [H, W, 3] in 0..1, if the package and its weights are here already.

    Nothing is downloaded for it: None where anything is missing.
    """
    if importlib.util.find_spec("lpips") is None or not Path(torch.hub.get_dir(), _ALEXNET).is_file():
        return None
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False).to(device)

    def distance(got: Tensor, want: Tensor) -> float:
        pictures = (image.movedim(-1, 0)[None].float().to(device) for image in (got, want))
        return network(*pictures, normalize=True).item()

    return distance
