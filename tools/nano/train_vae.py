"""Trains the nano VAE: ``python -m tools.nano.train_vae --out RUN``; an interrupted training goes on.

Reconstruction in L1 and L2, of the pictures and of their edges, and a little KL, which keeps latents smooth
enough for a small denoiser. The running average of the weights is kept; its latents' statistics become the
batch norm that lies between VAE and denoiser.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lens_core.vae import LensVAE
from lens_core.vae.autoencoder import pack

from .configs import LATENT_DEVIATION, VAE
from .feed import Batch, batches
from .render import collate, render
from .scenes import SIZES, sample_scene
from .training import Curves, Masters, Recorded, rate_at, run_flags, save_checkpoint

NAMES = ("L1", "edges", "KL", "gradient")
_KL = 5e-3
# Of the windows that the VAE is trained on.
_SIDE = 128


def pictures(batch: Batch, device: torch.device) -> Tensor:
    """[B, 3, H, W] in [-1, 1]."""
    return render({name: value.to(device) for name, value in batch.scenes.items()}, *batch.size)


def cut(images: Tensor, side: int, rng: random.Random) -> Tensor:
    """A square window [B, 3, side, side], somewhere: convolutions learn from parts as well, in less time."""
    top, left = (rng.randrange((length - side) // 8 + 1) * 8 for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side].contiguous()


def losses(vae: LensVAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and its parts L1, edges and KL for the curves; images in the weights' dtype."""
    posterior = vae.model.encode(images, return_dict=False)[0]
    drawn = vae.model.decode(posterior.sample(), return_dict=False)[0].float()
    error = drawn - images.float()
    flat = error.abs().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    mean, spread = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
    total = flat + error.square().mean() + 0.5 * edges + _KL * divergence
    return total, torch.stack([flat, edges, divergence]).detach()


@torch.no_grad()
def set_statistics(vae: LensVAE, feed: Iterator[Batch], device: torch.device, count: int = 64) -> None:
    """Mean and variance of every packed channel over ``count`` batches, into the batch norm: normalised
    latents have a deviation of ``LATENT_DEVIATION``."""
    rows = []
    for _ in range(count):
        images = pictures(next(feed), device).to(vae.model.dtype)
        packed = pack(vae.model.encode(images, return_dict=False)[0].mode())
        rows.append(packed.transpose(0, 1).flatten(1).float())
    variance, mean = torch.var_mean(torch.cat(rows, dim=1), dim=1)
    vae.model.bn.running_mean.copy_(mean)
    vae.model.bn.running_var.copy_(variance / LATENT_DEVIATION**2)


@torch.no_grad()
def reconstruction(vae: LensVAE, device: torch.device, count: int = 180) -> float:
    """Mean PSNR in dB over held-out scenes of all sizes."""
    rng, results = random.Random(12345), []
    for size in SIZES:
        scenes = [sample_scene(rng, held_out=True, size=size) for _ in range(count // len(SIZES))]
        images = render({name: value.to(device) for name, value in collate(scenes).items()}, *size)
        drawn = vae.decode(vae.encode(images.to(vae.model.dtype))).float().clamp(-1, 1)
        error = F.mse_loss((drawn + 1) / 2, (images.float() + 1) / 2, reduction="none").mean((1, 2, 3))
        results.append(-10 * error.log10())
    return torch.cat(results).mean().item()


def train(args: argparse.Namespace) -> None:
    """Train, and write ``vae.pt`` (weights and statistics) and ``vae.json`` (curves)."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    vae = LensVAE(VAE).to(device, torch.bfloat16)
    masters = Masters(vae.model.parameters(), decay=0.0)
    curves, path, first = Curves(args.out / "vae.json"), args.out / "vae_resume.pt", 0
    if path.exists():
        kept = torch.load(path, map_location=device)
        masters.load(kept["masters"])
        first = kept["step"]

    def step(images: Tensor) -> Tensor:
        total, parts = losses(vae, images)
        total.backward()
        return torch.cat([parts, masters.step().reshape(1)])

    recorded, rng = Recorded(step), random.Random(args.seed + first)
    feed = batches(None, args.batch, args.workers, args.seed + first)
    for index in range(first, args.steps):
        batch = next(feed)
        masters.rate.fill_(rate_at(index, index / args.steps, args.rate))
        images = cut(pictures(batch, device), _SIDE, rng).to(torch.bfloat16)
        curves.add(index, NAMES, recorded(images))
        if (index + 1) % args.keep == 0:
            save_checkpoint(path, {"masters": masters.state(), "step": index + 1})
            curves.save()
    masters.show(masters.average)
    set_statistics(vae, feed, device)
    print(f"PSNR of held-out scenes: {reconstruction(vae, device):.2f} dB", flush=True)
    state = vae.model.state_dict()
    average = {name: value.float() for name, value in zip(_names(vae), masters.average, strict=True)}
    save_checkpoint(args.out / "vae.pt", {**state, **average})
    curves.save()


def _names(vae: LensVAE) -> list[str]:
    return [name for name, _ in vae.model.named_parameters()]


def main() -> None:
    """Read the flags and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    run_flags(parser, "folder of the run", steps=10_000, batch=64, rate=3e-3, workers=8)
    parser.add_argument("--keep", type=int, default=2000, help="steps between checkpoints")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
