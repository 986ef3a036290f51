"""Trains encoder and denoiser: ``python -m tools.nano.train --out RUN``, after ``train_vae``.

First both together; then the encoder stays as it is, as GPT-OSS does for Lens, its features are kept with the
pictures, and the denoiser goes on alone, several times as fast. An interrupted training goes on where its
last checkpoint was. ``--minutes`` ends this run, not the training.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

from lens_core.sampling import token_grid

from .feed import batches
from .flow import NAMES, FlowStep
from .models import Models, write
from .pool import Pool
from .scenes import SIZES, Size
from .training import Clock, Curves, Masters, Recorded, rate_at, save_checkpoint

# Pictures that are drawn together.
_NEW = 256


class Training:
    """A run's state: what learns, from which pictures, and at which step it is."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.step = args, 0
        self.models = Models(args.out, torch.device(args.device))
        self.encoder = Masters(self.models.encoder.parameters(), average_over=1000)
        denoiser = self.models.denoiser
        self.denoiser = Masters(denoiser.parameters(), average_over=2000, hidden=denoiser.hidden())
        self.path, self.curves = args.out / "train_resume.pt", Curves(args.out / "train.json")
        if self.path.exists():
            kept = torch.load(self.path, map_location=args.device)
            self.step = kept["step"]
            self.encoder.load(kept["encoder"])
            self.denoiser.load(kept["denoiser"])
        torch.manual_seed(args.seed + self.step)
        self.feed = batches(self.models.tokenizer_json, _NEW, args.workers, args.seed + self.step)

    def together(self, clock: Clock) -> None:
        """Both learn, for the first ``joint`` steps."""
        self._run(clock, self.args.joint, (self.encoder, self.denoiser), self.args.renew, copies=2)

    def alone(self, clock: Clock) -> None:
        """The denoiser learns, to the end."""
        self.encoder.show(self.encoder.average)
        self._run(clock, self.args.steps, (self.denoiser,), 4 * self.args.renew, copies=1)

    def _run(self, clock: Clock, end: int, masters: tuple[Masters, ...], renew: int, copies: int) -> None:
        if self.step >= end or clock.over():
            return
        args, models, joint = self.args, self.models, len(masters) == 2
        pool, rng = (
            Pool(models, self.feed, args.pool, features=not joint),
            random.Random(args.seed + self.step),
        )

        def recorded(size: Size) -> Recorded:
            grid = token_grid(*size)
            step = FlowStep(models.encoder, models.denoiser, masters, models.prefix, grid, copies)
            return Recorded(step.together if joint else step.alone)

        steps = {size: recorded(size) for size in SIZES}
        while self.step < end and clock.share(self.step, args.steps) < 1 and not clock.over():
            for learning in masters:
                learning.rate.fill_(rate_at(self.step, clock.share(self.step, args.steps), args.rate))
            size = rng.choice(SIZES)
            self.curves.add(self.step, NAMES, steps[size](*pool.draw(size, args.batch // copies)))
            self.step += 1
            if self.step % renew == 0:
                pool.add()
            if self.step % args.keep == 0:
                self.save()

    def save(self) -> None:
        """A checkpoint and the curves."""
        states = {"encoder": self.encoder.state(), "denoiser": self.denoiser.state()}
        save_checkpoint(self.path, {**states, "step": self.step})
        self.curves.save()

    def finish(self) -> None:
        """Checkpoint, the averaged weights, and the folder in diffusers' layout."""
        self.save()
        models = self.models
        self.encoder.show(self.encoder.average)
        self.denoiser.show(self.denoiser.average)
        weights = {"encoder": models.encoder.state_dict(), "denoiser": models.denoiser.state_dict()}
        save_checkpoint(self.args.out / "trained.pt", weights)
        write(self.args.out / "lens", models)


def train(args: argparse.Namespace) -> bool:
    """Train for so many minutes at most; whether all steps are done."""
    training, clock = Training(args), Clock(args.minutes, args.finish)
    training.together(clock)
    training.alone(clock)
    training.finish()
    return clock.share(training.step, args.steps) >= 1


def main() -> None:
    """Read the flags and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run, with vae.pt")
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--joint", type=int, default=8000, help="of these, with the encoder")
    parser.add_argument("--minutes", type=float, default=1e9, help="of this run")
    parser.add_argument("--finish", action="store_true", help="the training ends when the minutes do")
    parser.add_argument("--batch", type=int, default=256, help="noised pictures a step")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--keep", type=int, default=5000, help="steps between checkpoints")
    parser.add_argument("--pool", type=int, default=8192, help="pictures of each size that are kept")
    parser.add_argument("--renew", type=int, default=8, help="steps between new pictures; alone, four times")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print("done" if train(args) else "to be continued")


if __name__ == "__main__":
    main()
