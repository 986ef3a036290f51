"""Trains encoder and denoiser together: ``python -m tools.nano.train --out RUN``, after ``train_vae``.

An interrupted training goes on where its last checkpoint was. ``--minutes`` ends this run, not the training.
"""

from __future__ import annotations

import argparse
import shutil
import time
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
from .feed import batches
from .flow import NAMES, FlowStep, initialise
from .scenes import SIZES
from .tokenizer import train_tokenizer
from .train_vae import pictures
from .training import Curves, Masters, Recorded, rate_at, save_checkpoint


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
    feed = batches(models.tokenizer_json, args.batch, args.workers, args.seed + first)
    end, index = time.monotonic() + 60 * args.minutes, first
    while index < args.steps and time.monotonic() < end:
        batch = next(feed)
        masters.rate.fill_(rate_at(index, args.steps, args.rate))
        latents = models.latents(pictures(batch, device))
        losses = steps[batch.size](latents, batch.tails.to(device), batch.real.to(device))
        curves.add(index, NAMES, losses)
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
    return index >= args.steps


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
    parser.add_argument("--batch", type=int, default=256, help="pictures a step")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--keep", type=int, default=5000, help="steps between checkpoints")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print("done" if train(args) else "to be continued")


if __name__ == "__main__":
    main()
