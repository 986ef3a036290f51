"""The models of a run, and their export."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from lens_core.prompt.tokenizer import PromptTokenizer
from lens_core.vae import LensVAE

from .configs import DENOISER, VAE, encoder_config
from .denoiser import TrainedDenoiser
from .encoder import TrainedEncoder
from .export import NANO, export
from .flow import initialise
from .tokenizer import run_tokenizer
from .training import Recorded


class Models:
    """A denoiser to be trained, and what was before it, frozen: VAE, encoder and tokenizer; on one device."""

    def __init__(self, run: Path, device: torch.device) -> None:
        self.tokenizer_json = run_tokenizer(run)
        self.tokenizer = PromptTokenizer.from_json(self.tokenizer_json)
        self.device = device
        self.prefix = torch.tensor(self.tokenizer.prefix, device=device)
        self.vae = LensVAE(VAE)
        self.vae.model.load_state_dict(torch.load(run / "vae.pt", map_location="cpu"))
        self.vae.to(device, torch.bfloat16).requires_grad_(False)
        vocabulary = self.tokenizer.tokenizer.get_vocab_size()
        self.encoder = TrainedEncoder(encoder_config(vocabulary))
        self.encoder.load_state_dict(torch.load(run / "encoder.pt", map_location="cpu"))
        self.encoder.to(device).requires_grad_(False)
        self.denoiser = TrainedDenoiser(DENOISER)
        initialise(self.denoiser)
        self.denoiser.to(device, torch.bfloat16)
        # Of ids [B, S] after the prefix: features [B, S, L, H], without gradients.
        self.features = Recorded(torch.no_grad()(lambda tails: self.encoder(self.prefix, tails)[0]))

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Packed and normalised, [B, C, h, w]. Whole: in strips each picture would be encoded alone."""
        return self.vae.encode_whole(images.to(torch.bfloat16))


def write(folder: Path, models: Models) -> None:
    """The folder in diffusers' layout, with the weights as they are now."""
    clear(folder)
    encoder, denoiser, vae = (
        {name: value.detach().cpu() for name, value in state.items()}
        for state in (models.encoder.state(), models.denoiser.state_dict(), models.vae.model.state_dict())
    )
    export(folder, denoiser, encoder, vae, models.tokenizer_json, NANO)


def clear(folder: Path) -> None:
    """Remove what an earlier run exported."""
    if folder.exists():
        shutil.rmtree(folder)
