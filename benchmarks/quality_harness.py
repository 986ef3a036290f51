"""Comparing a quantised denoiser with the bf16 one: velocities, latents, pictures, and grids in these."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.fidelity import common_share, per_token, psnr, ssim
from benchmarks.grid_energy import border_contrast, comb, grid_energy, mean_tile
from benchmarks.quality_models import Mode, Subject
from lens_core.denoiser import DenoiserRun, LensDenoiser
from lens_core.sampling import euler, norm_rescaled_guidance, reference_noise, sigmas, token_grid
from lens_core.sampling.loop import Velocity

# A mode draws a grid if its pictures have this much more of one than bf16's.
TOLERANCE = 1.1
FLAGS = ("grid energy", "border contrast")
_COMMON = "error common to all tokens"


@dataclass(frozen=True)
class Settings:
    """What is drawn: ``size`` is (height, width)."""

    seeds: int = 4
    steps: int = 8
    size: tuple[int, int] = (1024, 1024)
    cfg: float = 1.0


@dataclass(frozen=True)
class Drawn:
    """One seed: latents [1, N, C], noise level and velocity of each step; the end, and its picture."""

    steps: list[tuple[Tensor, Tensor, Tensor]]
    latents: Tensor
    picture: Tensor


class Harness:
    """What bf16 draws, computed once, and comparisons with it."""

    def __init__(
        self,
        subject: Subject,
        settings: Settings,
        perceptual: Callable[[Tensor, Tensor], float] | None = None,
    ) -> None:
        """``perceptual`` is another distance of two pictures, LPIPS."""
        self.subject, self.settings, self.perceptual = subject, settings, perceptual
        self.grid = token_grid(*settings.size)
        self.levels = sigmas(settings.steps, self.grid[0] * self.grid[1])
        self.wanted = [self._draw(subject.model, seed) for seed in range(settings.seeds)]
        self.reference = grid_of(_pictures(self.wanted).cpu())

    def compare(self, mode: Mode) -> dict[str, Any]:
        """All that is measured of a mode."""
        model = copy.deepcopy(self.subject.model)
        mode(model)
        drawn = [self._draw(model, seed) for seed in range(self.settings.seeds)]
        got, want = _pictures(drawn), _pictures(self.wanted)
        ends = [torch.cat([one.latents for one in side]) for side in (drawn, self.wanted)]
        grid = grid_of(got.cpu())
        ratios = {f"{name}, ratio": grid[name] / self.reference[name] for name in FLAGS}
        return {
            "velocity": self._velocities(model),
            "final latents": per_token(*ends),
            "picture": self._seen(got, want),
            "grid": {**grid, **ratios, **error_grid(got.cpu() - want.cpu())},
            "draws a grid": any(ratios[f"{name}, ratio"] > TOLERANCE for name in FLAGS),
        }

    def _velocity(self, model: LensDenoiser, seed: int) -> Velocity:
        """The velocity along which ``model`` goes for a seed's text."""
        text = model.embed_text(self.subject.texts[seed % len(self.subject.texts)])
        run = DenoiserRun(self.levels[:-1].tolist())

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            level = sigma.expand(1)
            cond = model(x, level, text, self.grid, run=run)
            if self.settings.cfg == 1:
                return cond
            uncond = model(x, level, text[:, :0], self.grid, run=run)
            return norm_rescaled_guidance(cond, uncond, self.settings.cfg)

        return velocity

    def _draw(self, model: LensDenoiser, seed: int) -> Drawn:
        """By ``model`` alone, from the noise that a seed gives on the CPU."""
        device, velocity = self.subject.device, self._velocity(model, seed)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []

        def noted(x: Tensor, sigma: Tensor) -> Tensor:
            steps.append((x, sigma, velocity(x, sigma)))
            return steps[-1][-1]

        tokens, channels = self.grid[0] * self.grid[1], model.config.in_channels
        noise = reference_noise(seed, 1, tokens, channels, torch.bfloat16, "cpu").to(device)
        latents = euler(noted, noise, self.levels.to(device))
        return Drawn(steps, latents, self.subject.decode(latents, self.grid))

    def _velocities(self, model: LensDenoiser) -> dict[str, Any]:
        """Of each step, all seeds together, with bf16's latents put in; and over the steps."""
        ways = [self._velocity(model, seed) for seed in range(self.settings.seeds)]
        steps = []
        for taken in zip(*(one.steps for one in self.wanted), strict=True):
            got = torch.cat([way(x, sigma) for way, (x, sigma, _) in zip(ways, taken, strict=True)])
            want = torch.cat([velocity for *_, velocity in taken])
            common = common_share((got.float() - want.float()).flatten(0, 1))
            steps.append({"sigma": taken[0][1].item(), **per_token(got, want), _COMMON: common})
        over: dict[str, Any] = {
            name: sum(step[name] for step in steps) / len(steps)
            for name in ("cosine", "relative L2", _COMMON)
        }
        over["cosine, worst"] = min(step["cosine, worst"] for step in steps)
        over["relative L2, worst"] = max(step["relative L2, worst"] for step in steps)
        return {**over, "steps": steps}

    def _seen(self, got: Tensor, want: Tensor) -> dict[str, list[float]]:
        """Distances of pictures [S, H, W, 3], one a seed."""
        measures = {"PSNR dB": psnr, "SSIM": ssim}
        if self.perceptual is not None:
            measures["LPIPS"] = self.perceptual
        return {
            name: [measure(*pair) for pair in zip(got, want, strict=True)]
            for name, measure in measures.items()
        }


def centre(subject: Subject, settings: Settings, rounds: int = 3) -> None:
    """Give random weights' final latents a mean of 0 in every channel, by the output's bias.

    Trained ones have it, because the VAE's batch norm gives it to what they were trained on. Random ones do
    not: they add the same vector to all tokens, a strong grid, which hides one that a mode adds. The noise
    levels go from 1 to 0, so the bias moves the final latents by as much the other way, but for what the
    model makes of the latents on the way; hence the rounds.
    """
    for _ in range(rounds):
        ends = torch.cat([one.latents for one in Harness(subject, settings).wanted])
        subject.model.proj_out.bias.add_(ends.float().mean((0, 1)))


def grid_of(pictures: Tensor) -> dict[str, float]:
    """What repeats with the tokens in pictures [S, H, W, 3], on average.

    Each picture by itself: random weights are centred over all seeds together, so that what these have in
    common is less than chance would have it.
    """
    measures = {
        "grid energy": grid_energy,
        "border contrast": border_contrast,
        "comb": lambda picture: comb(picture[None]),
    }
    return {name: sum(map(measure, pictures)) / len(pictures) for name, measure in measures.items()}


def error_grid(error: Tensor) -> dict[str, float]:
    """What repeats in pictures' errors [S, H, W, 3]. The comb says whether chance explains it; the RMS of the
    mean tile, in steps of a byte, whether it can be seen."""
    return {
        "comb of the error": comb(error),
        "RMS of its mean tile / 255": 255 * mean_tile(error).square().mean().sqrt().item(),
    }


def _pictures(drawn: list[Drawn]) -> Tensor:
    return torch.stack([one.picture for one in drawn])
