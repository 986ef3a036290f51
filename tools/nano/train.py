"""Trains the denoiser: ``python -m tools.nano.train --out RUN``, after ``train_vae`` and ``train_encoder``.

The encoder stays as it is, as GPT-OSS does for Lens, so its features are kept with the pictures. An
interrupted training goes on where its last checkpoint was. ``--minutes`` ends this run, not the training.
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
from .scenes import SIZES
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

# Pictures that are drawn together.
_NEW = 256


class Training:
    """A run's state: what learns, from which pictures, and at which step it is."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.step, self.team = args, 0, Team()
        self.models = Models(args.out, torch.device(args.device))
        denoiser = self.models.denoiser
        if args.begin is not None:
            denoiser.load_state_dict(torch.load(args.begin, map_location=args.device))
        hidden = list(denoiser.hidden())
        self.masters = Masters(
            denoiser.parameters(), 2000, hidden=hidden, rounded=hidden, four_bits=args.four_bits
        )
        self.path, self.curves = args.out / "train_resume.pt", Curves(args.out / "train.json")
        if self.path.exists():
            kept = torch.load(self.path, map_location=args.device)
            self.step = kept["step"]
            self.masters.load(kept["masters"])
        self.seed = self.team.seed(args.seed + self.step)
        torch.manual_seed(self.seed)
        feed = batches(self.models.tokenizer_json, min(_NEW, args.pool), args.workers, self.seed)
        self.pool = Pool(self.models, feed, args.pool)

    def run(self, clock: Clock) -> None:
        """Steps to the end, or until the clock is over."""
        args, rng = self.args, random.Random(self.seed)
        denoiser = self.models.denoiser
        steps = {size: Recorded(FlowStep(denoiser, self.masters, token_grid(*size))) for size in SIZES}
        while self.team.goes_on(self.step, lambda: clock.ended(self.step, args.steps), self.masters):
            self.masters.rate.fill_(rate_at(self.step, clock.share(self.step, args.steps), args.rate))
            size = rng.choice(SIZES)
            values = steps[size](*self.pool.draw(size, args.batch))
            if self.team.leads:
                self.curves.add(self.step, NAMES, values)
            self.step += 1
            if self.step % args.renew == 0:
                self.pool.add()
            if self.step % args.keep == 0:
                self.save()

    def save(self) -> None:
        """A checkpoint and the curves; a team's first process has them."""
        if not self.team.leads:
            return
        save_checkpoint(self.path, {"masters": self.masters.state(), "step": self.step})
        self.curves.save()

    def finish(self) -> None:
        """Checkpoint, the averaged weights, and the folder in diffusers' layout."""
        self.save()
        if not self.team.leads:
            return
        self.masters.show(self.masters.average)
        save_checkpoint(self.args.out / "trained.pt", self.models.denoiser.state_dict())
        write(self.args.out / "lens", self.models)


def train(args: argparse.Namespace) -> bool:
    """Train for so many minutes at most; whether all steps are done."""
    training, clock = Training(args), Clock(args.minutes, args.finish)
    training.run(clock)
    training.finish()
    return clock.share(training.step, args.steps) >= 1


def main() -> None:
    """Read the flags and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    run_flags(
        parser,
        "folder of the run, with vae.pt and encoder.pt",
        steps=60_000,
        batch=256,
        rate=3e-3,
        workers=12,
    )
    clock_flags(parser)
    four_bits_flag(parser)
    parser.add_argument("--begin", type=Path, help="weights to begin with: an earlier run's trained.pt")
    parser.add_argument("--keep", type=int, default=5000, help="steps between checkpoints")
    parser.add_argument("--pool", type=int, default=8192, help="pictures of each size that are kept")
    parser.add_argument("--renew", type=int, default=36, help="steps between new pictures")
    args = parser.parse_args()
    print("done" if train(args) else "to be continued")


if __name__ == "__main__":
    main()
