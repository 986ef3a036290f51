"""The step cache: share of forwards skipped, time and distance by threshold. Full size, random weights.

    python benchmarks/step_cache.py [--out FOLDER]

Needs a CUDA GPU with 30 GB. 1024 x 1024, cfg 5 with an empty negative, Euler steps over Lens' schedule,
denoiser alone (no encoder, no VAE); start, end and max_consecutive at their defaults.

What it shows is how time follows the share of forwards skipped, and that the distance grows with the
threshold. Which threshold keeps a picture it cannot show: that is trained weights' to say. One thing is made
like them, or nothing would be skipped at all: random weights mix the fast sinusoids of the time embedding,
so that two neighbouring steps have nothing in common; here it takes those alone that turn once at most.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, write
from lens_core.config import DenoiserConfig
from lens_core.denoiser import DenoiserRun, LensDenoiser, StepCache, StepCacheOptions
from lens_core.sampling import euler, norm_rescaled_guidance, sigmas
from lens_core.tiny.models import random_weights

DEVICE = torch.device("cuda")
GRID = (64, 64)
TEXT = 200
CFG = 5.0
STEPS = (20, 50)
THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.4)


def load(config: DenoiserConfig, generator: torch.Generator) -> LensDenoiser:
    """The denoiser with random weights in bf16, its time embedding as slow as a trained one's."""
    model = LensDenoiser(config, dtype=torch.bfloat16, device="meta")
    weights = random_weights(model, generator)
    embedding = weights["time_text_embed.timestep_embedder.linear_1.weight"]
    half = config.time_channels // 2
    turns = 1000 * 10000 ** (-torch.arange(half, device=embedding.device) / half) / (2 * math.pi)
    slow = (turns <= 1).repeat(2)
    embedding *= slow * (config.time_channels / slow.sum()).sqrt()
    model.load_state_dict({name: value.bfloat16() for name, value in weights.items()}, assign=True)
    return model.to(DEVICE).eval().requires_grad_(False)


class Picture:
    """One noise and one prompt, drawn with any number of steps and any threshold."""

    def __init__(self, model: LensDenoiser, generator: torch.Generator) -> None:
        random = {"generator": generator, "device": DEVICE}
        config = model.config
        text = torch.randn(1, TEXT, config.num_text_layers, config.enc_hidden_dim, **random)
        self.model = model
        self.noise = torch.randn(1, GRID[0] * GRID[1], config.in_channels, **random).bfloat16()
        self.positive = model.embed_text(text.bfloat16())
        self.negative = self.positive[:, :0]

    def draw(self, steps: int, threshold: float) -> tuple[Tensor, float, float]:
        """Latents [1, N, C], seconds, and the share of forwards that were skipped."""
        levels = sigmas(steps, self.noise.shape[1])
        cache = StepCache.of(StepCacheOptions(threshold), levels.tolist())
        run = DenoiserRun(levels[:-1].tolist(), cache=cache)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            level = sigma.expand(1)
            cond = self.model(x, level, self.positive, GRID, run=run, entry="positive")
            uncond = self.model(x, level, self.negative, GRID, run=run, entry="negative")
            return norm_rescaled_guidance(cond, uncond, CFG)

        torch.cuda.synchronize()
        start = time.perf_counter()
        latents = euler(velocity, self.noise, levels.to(DEVICE))
        torch.cuda.synchronize()
        return latents, time.perf_counter() - start, cache.skipped / cache.forwards if cache else 0.0


def distances(got: Tensor, want: Tensor) -> dict[str, float | None]:
    """Relative L2, and PSNR in dB against the range of ``want`` (None where both are equal)."""
    if torch.equal(got, want):
        return {"relative L2": 0.0, "PSNR dB": None}
    error, reference = (got - want).double(), want.double()
    peak = reference.max() - reference.min()
    rms = error.square().mean().sqrt()
    return {
        "relative L2": (error.norm() / reference.norm()).item(),
        "PSNR dB": (20 * torch.log10(peak / rms)).item(),
    }


def measure(picture: Picture, steps: int) -> list[dict[str, Any]]:
    """One entry a threshold, the first without a cache."""
    results: list[dict[str, Any]] = []
    want = picture.noise
    for threshold in (0.0, *THRESHOLDS):
        latents, seconds, share = picture.draw(steps, threshold)
        entry = {"steps": steps, "threshold": threshold, "share skipped": share, "seconds": seconds}
        if threshold:
            entry |= distances(latents, want)
        else:
            want = latents
        entry["times as fast"] = results[0]["seconds"] / seconds if results else 1.0
        results.append(entry)
        print(entry, flush=True)
    return results


def row(entry: dict[str, Any]) -> list[str]:
    """A result as a line of the table."""
    off = not entry["threshold"]
    return [
        str(entry["steps"]),
        "off" if off else f"{entry['threshold']:g}",
        f"{100 * entry['share skipped']:.0f} %",
        f"{entry['seconds']:.2f}",
        f"{entry['times as fast']:.2f}",
        "" if off else f"{entry['relative L2']:.3f}",
        "" if off or entry["PSNR dB"] is None else f"{entry['PSNR dB']:.1f}",
    ]


@torch.inference_mode()
def main() -> None:
    """Measure all, write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for step_cache.json and .md")
    args = parser.parse_args()
    generator = torch.Generator(DEVICE).manual_seed(0)
    picture = Picture(load(DenoiserConfig(), generator), generator)
    torch.cuda.empty_cache()
    picture.draw(4, THRESHOLDS[-1])  # kernels are compiled and chosen
    results = [entry for steps in STEPS for entry in measure(picture, steps)]
    head = ["steps", "threshold", "forwards skipped", "seconds", "times as fast", "relative L2", "PSNR, dB"]
    write("step_cache", args.out, {"results": results}, [head, *(row(entry) for entry in results)])


if __name__ == "__main__":
    main()
