"""Trains encoder and denoiser together: ``python -m tools.nano.train --out RUN``, after ``train_vae``.

An interrupted training goes on where its last checkpoint was. ``--minutes`` ends this run, not the training.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lens_core.config import LENS
from lens_core.denoiser import LensDenoiser
from lens_core.prompt.tokenizer import PromptTokenizer
from lens_core.vae import LensVAE

from .configs import DENOISER, VAE, encoder_config
from .encoder import TrainedEncoder
from .export import export
from .feed import Batch, batches
from .flow import NAMES, FlowStep, initialise
from .scenes import SIZES, Size
from .tokenizer import train_tokenizer
from .train_vae import pictures
from .training import Clock, Curves, Masters, Recorded, rate_at, save_checkpoint

# Pictures that are drawn together, and the steps between two such batches.
_NEW = 256
_RENEW = 8


class Models:
    """What is trained, and the frozen VAE and tokenizer before it, on one device."""

    def __init__(self, run: Path, device: torch.device) -> None:
        tokenizer = run / "tokenizer.json"
        if not tokenizer.exists():
            tokenizer.write_text(train_tokenizer().to_str(), encoding="utf-8")
        self.tokenizer_json = tokenizer.read_text(encoding="utf-8")
        self.tokenizer = PromptTokenizer.from_json(self.tokenizer_json)
        self.device = device
        self.prefix = torch.tensor(self.tokenizer.prefix, device=device)
        self.vae = LensVAE(VAE)
        self.vae.model.load_state_dict(torch.load(run / "vae.pt", map_location="cpu"))
        self.vae.to(device, torch.bfloat16).requires_grad_(False)
        vocabulary = self.tokenizer.tokenizer.get_vocab_size()
        self.encoder = TrainedEncoder(encoder_config(vocabulary)).to(device)
        self.denoiser = LensDenoiser(DENOISER)
        initialise(self.denoiser)
        self.denoiser.to(device, torch.bfloat16)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [*self.encoder.parameters(), *self.denoiser.parameters()]

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Packed and normalised, [B, C, h, w]."""
        return self.vae.encode(images.to(torch.bfloat16))


class Pool:
    """Pictures as latents, and their captions' tokens, on the device and by size.

    Drawing and encoding a picture takes as long as learning from it: each is used several times, at other
    noise levels, until newer ones take its place.
    """

    def __init__(self, models: Models, feed: Iterator[Batch], room: int) -> None:
        """``room``: pictures of each size; it is filled at once."""
        self.models, self.feed, self.room = models, feed, room
        self._kept: dict[Size, tuple[Tensor, Tensor, Tensor]] = {}
        self._count = dict.fromkeys(SIZES, 0)
        while min(self._count.values()) < room:
            self.add()

    def add(self) -> None:
        """A new batch in place of the oldest of its size."""
        batch = next(self.feed)
        device = self.models.device
        new = (self.models.latents(pictures(batch, device)), batch.tails.to(device), batch.real.to(device))
        if batch.size not in self._kept:
            shapes = [(self.room, *part.shape[1:]) for part in new]
            self._kept[batch.size] = tuple(  # type: ignore[assignment]
                part.new_zeros(shape) for part, shape in zip(new, shapes, strict=True)
            )
        start = self._count[batch.size] % self.room
        for kept, part in zip(self._kept[batch.size], new, strict=True):
            kept[start : start + len(part)] = part[: self.room - start]
        self._count[batch.size] += len(new[0])

    def draw(self, size: Size, count: int) -> tuple[Tensor, ...]:
        """Latents [B, C, h, w], ids and which are real [B, S], of ``count`` pictures by chance."""
        rows = torch.randint(self.room, (count,), device=self.models.device)
        return tuple(part[rows] for part in self._kept[size])


def train(args: argparse.Namespace) -> bool:
    """Train for so many minutes at most; True once all steps are done and ``lens/`` is exported."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    models = Models(args.out, device)
    masters = Masters(models.parameters(), average_over=2000)
    curves, path, first = Curves(args.out / "train.json"), args.out / "train_resume.pt", 0
    if path.exists():
        kept = torch.load(path, map_location=device)
        masters.load(kept["masters"])
        first = kept["step"]
        torch.manual_seed(args.seed + first)
    steps = {
        size: Recorded(
            FlowStep(models.encoder, models.denoiser, masters, models.prefix, (size[0] // 16, size[1] // 16))
        )
        for size in SIZES
    }
    feed = batches(models.tokenizer_json, _NEW, args.workers, args.seed + first)
    pool, rng = Pool(models, feed, args.pool), random.Random(args.seed + first)
    clock, index = Clock(args.minutes, args.finish), first
    while clock.share(index, args.steps) < 1 and not clock.over():
        masters.rate.fill_(rate_at(index, clock.share(index, args.steps), args.rate))
        size = rng.choice(SIZES)
        curves.add(index, NAMES, steps[size](*pool.draw(size, args.batch)))
        if index % _RENEW == 0:
            pool.add()
        index += 1
        if index % args.keep == 0:
            save_checkpoint(path, {"masters": masters.state(), "step": index})
            curves.save()
    save_checkpoint(path, {"masters": masters.state(), "step": index})
    curves.save()
    masters.show(masters.average)
    trained = {"encoder": models.encoder.state_dict(), "denoiser": models.denoiser.state_dict()}
    save_checkpoint(args.out / "trained.pt", trained)
    write(args.out / "lens", models)
    return clock.share(index, args.steps) >= 1


def write(folder: Path, models: Models) -> None:
    """The folder in diffusers' layout, with the weights as they are now."""
    clear(folder)
    encoder, denoiser, vae = (
        {name: value.detach().cpu() for name, value in state.items()}
        for state in (models.encoder.state(), models.denoiser.state_dict(), models.vae.model.state_dict())
    )
    export(folder, denoiser, encoder, vae, models.tokenizer_json, LENS)


def clear(folder: Path) -> None:
    """Remove what an earlier run exported."""
    if folder.exists():
        shutil.rmtree(folder)


def main() -> None:
    """Read the flags and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run, with vae.pt")
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--minutes", type=float, default=1e9, help="of this run")
    parser.add_argument("--finish", action="store_true", help="the training ends when the minutes do")
    parser.add_argument("--batch", type=int, default=128, help="pictures a step, each at two noise levels")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--keep", type=int, default=5000, help="steps between checkpoints")
    parser.add_argument("--pool", type=int, default=8192, help="pictures of each size that are kept")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print("done" if train(args) else "to be continued")


if __name__ == "__main__":
    main()
