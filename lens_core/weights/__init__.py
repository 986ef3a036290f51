"""Checkpoints: reading, recognising, renaming and strict loading."""

from .detect import denoiser_config, vae_config, variant_of
from .encoder_layouts import encoder_config, encoder_layout
from .keymap import DENOISER
from .loader import load_into
from .reader import Checkpoint, open_checkpoint

__all__ = [
    "DENOISER",
    "Checkpoint",
    "denoiser_config",
    "encoder_config",
    "encoder_layout",
    "load_into",
    "open_checkpoint",
    "vae_config",
    "variant_of",
]
