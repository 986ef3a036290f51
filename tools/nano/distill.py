"""Distils Lens into a 4-step Turbo: ``python -m tools.nano.distill --out RUN``, after ``train``.

The student walks from noise by itself. From wherever it stands, the teacher, with guidance and in small
steps, walks to the next of the student's noise levels; the student learns to get there in one step. So it is
taught on its own path, and guidance becomes part of it: Turbo runs at cfg 1.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lens_core.config import LENS_TURBO
from lens_core.denoiser import DenoiserRun, LensDenoiser
from lens_core.ops import sdpa
from lens_core.sampling import norm_rescaled_guidance, sigmas, token_grid
from lens_core.sampling.schedule import empirical_mu, shifted

from .configs import DENOISER, GUIDANCE
from .denoiser import TrainedDenoiser
from .export import export
from .feed import batches
from .models import Models, clear
from .scenes import SIZES, Size
from .team import Team
from .training import (
    Clock,
    Curves,
    Masters,
    Recorded,
    clock_flags,
    four_bits_flag,
    rate_at,
    run_flags,
    save_checkpoint,
)

NAMES = ("step 1", "step 2", "step 3", "step 4", "gradient")
STEPS = LENS_TURBO.steps


def levels_between(first: int, tokens: int, parts: int) -> Tensor:
    """Noise levels [parts + 1] from the student's ``first`` to its next, even in the schedule's time."""
    times = torch.linspace(1 - first / STEPS, 1 - (first + 1) / STEPS, parts + 1, dtype=torch.float64)
    return shifted(times, empirical_mu(tokens, STEPS)).float()


class Distillation:
    """Teacher and student for pictures of one size."""

    def __init__(
        self,
        teacher: LensDenoiser,
        student: LensDenoiser,
        walker: LensDenoiser,
        masters: Masters,
        size: Size,
        parts: int,
        scale: float,
    ) -> None:
        """``walker`` is the student's ``twin``; it and the teacher are frozen. ``parts`` of the teacher's
        steps make one of the student's, with guidance of ``scale``."""
        self.teacher, self.student, self.walker, self.masters = teacher, student, walker, masters
        self.grid, self.scale = token_grid(*size), scale
        tokens, device = self.grid[0] * self.grid[1], next(teacher.parameters()).device
        self.levels = sigmas(STEPS, tokens).to(device)
        self.between = [levels_between(first, tokens, parts).to(device) for first in range(STEPS)]
        # Kept: what it finds out about a model once would be read back in the midst of recording.
        self.run = DenoiserRun()
        self._recorded = [Recorded(partial(self.teach, first)) for first in range(STEPS)]

    def __call__(self, first: int, text: Tensor, real: Tensor) -> Tensor:
        """``teach``, recorded."""
        return self._recorded[first](text, real)

    def teach(self, first: int, text: Tensor, real: Tensor) -> Tensor:
        """Teach the student's step ``first`` -> its error and the gradient's norm [2]."""
        shape = (len(text), self.grid[0] * self.grid[1], self.student.config.in_channels)
        x = self.start(first, torch.randn(shape, device=text.device), text, real)
        target = self.target(first, x, text, real)
        sigma = self.levels[first].expand(len(x))
        learnt = self.student(x.bfloat16(), sigma, text, self.grid, text_real=real, attention=sdpa)
        error = F.mse_loss(learnt.float(), target)
        error.backward()
        return torch.stack([error.detach(), self.masters.step()])

    def start(self, first: int, x: Tensor, text: Tensor, real: Tensor) -> Tensor:
        """Where the student, from noise, stands before its step ``first``."""
        for level, following in zip(self.levels[:first], self.levels[1 : first + 1], strict=True):
            sigma = level.expand(len(x))
            x = x + (following - level) * self._velocity(self.walker, x, sigma, text, real)
        return x

    def target(self, first: int, x: Tensor, text: Tensor, real: Tensor) -> Tensor:
        """The mean velocity of the teacher's way from there to the student's next level."""
        begin, between = x, self.between[first]
        shown = torch.cat([real, torch.zeros_like(real)])
        text = text.repeat(2, 1, 1, 1)
        for level, following in pairwise(between):
            sigma = level.expand(2 * len(x))
            both = self._velocity(self.teacher, x.repeat(2, 1, 1), sigma, text, shown)
            wanted, unwanted = both.chunk(2)
            x = x + (following - level) * norm_rescaled_guidance(wanted, unwanted, self.scale)
        return (x - begin) / (between[-1] - between[0])

    def _velocity(self, model: LensDenoiser, x: Tensor, sigma: Tensor, text: Tensor, real: Tensor) -> Tensor:
        """Of a frozen model. Not under no_grad: there, modulation is kept by noise level and looked up."""
        found = model(x.bfloat16(), sigma, text, self.grid, text_real=real, attention=sdpa, run=self.run)
        return found.float()


def twin(student: LensDenoiser) -> LensDenoiser:
    """A frozen model with the student's own memory: it walks as the student does now, without gradients."""
    found = TrainedDenoiser(student.config).requires_grad_(False)
    for mine, own in zip(found.parameters(), student.parameters(), strict=True):
        mine.data = own.data
    return found


class Distilling:
    """A run's state: teacher, student, the lessons of each size, and at which step it is."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.team, self.step = args, Team(), 0
        device = torch.device(args.device)
        self.models = Models(args.out, device)
        teacher = self.models.denoiser
        teacher.load_state_dict(torch.load(args.out / "trained.pt", map_location=device))
        self.student = TrainedDenoiser(DENOISER).to(device, torch.bfloat16)
        self.student.load_state_dict(teacher.state_dict())
        self.masters = Masters(
            self.student.parameters(), 300, rounded=self.student.hidden(), four_bits=args.four_bits
        )
        self.path, self.curves = args.out / "distill_resume.pt", Curves(args.out / "distill.json")
        if self.path.exists():
            kept = torch.load(self.path, map_location=device)
            self.masters.load(kept["masters"])
            self.step = kept["step"]
        teacher.requires_grad_(False)
        shared = teacher, self.student, twin(self.student), self.masters
        self.lessons = {size: Distillation(*shared, size, args.parts, args.scale) for size in SIZES}

    def run(self, clock: Clock) -> None:
        """Steps to the end, or until the clock is over."""
        args, device = self.args, self.models.device
        seed = self.team.seed(args.seed + self.step)
        torch.manual_seed(seed)
        rng = random.Random(seed)
        feed = batches(self.models.tokenizer_json, args.batch, args.workers, seed + 77)
        while self.team.goes_on(self.step, lambda: clock.ended(self.step, args.steps), self.masters):
            batch, part = next(feed), rng.randrange(STEPS)
            share = clock.share(self.step, args.steps)
            self.masters.rate.fill_(rate_at(self.step, share, args.rate, warm_up=100))
            text = self.models.features(batch.tails.to(device))
            error, norm = self.lessons[batch.size](part, text, batch.real.to(device))
            # Each step's own error; a hundred of them hold each part some 25 times.
            values = torch.zeros(len(NAMES), device=device)
            values[part], values[-1] = error * STEPS, norm
            if self.team.leads:
                self.curves.add(self.step, NAMES, values)
            self.step += 1

    def finish(self) -> None:
        """Checkpoint, curves and the folder with the averaged weights, by a team's first process."""
        if not self.team.leads:
            return
        save_checkpoint(self.path, {"masters": self.masters.state(), "step": self.step})
        self.curves.save()
        self.masters.show(self.masters.average)
        folder = self.args.out / "lens-turbo"
        clear(folder)
        weights = {name: value.detach().cpu() for name, value in self.student.state_dict().items()}
        export(folder, weights, None, None, None, LENS_TURBO)


def distil(args: argparse.Namespace) -> bool:
    """Teach for so many minutes at most; True once all steps are done and ``lens-turbo/`` is exported."""
    distilling, clock = Distilling(args), Clock(args.minutes, args.finish)
    distilling.run(clock)
    distilling.finish()
    return clock.share(distilling.step, args.steps) >= 1


def main() -> None:
    """Read the flags and distil."""
    parser = argparse.ArgumentParser(description=__doc__)
    run_flags(parser, "folder of the run, trained", steps=4000, batch=256, rate=1e-3, workers=12)
    clock_flags(parser)
    four_bits_flag(parser)
    parser.add_argument("--parts", type=int, default=5, help="the teacher's steps in one of the student's")
    parser.add_argument("--scale", type=float, default=GUIDANCE, help="the teacher's guidance")
    args = parser.parse_args()
    print("done" if distil(args) else "to be continued")


if __name__ == "__main__":
    main()
