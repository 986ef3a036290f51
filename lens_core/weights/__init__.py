"""Checkpoints: reading, recognising, renaming and strict loading."""

from .detect import denoiser_config, vae_config
from .encoder_layouts import encoder_config, encoder_layout
from .keymap import DENOISER
from .kind import Kind, inspect
from .loader import load_into
from .reader import Checkpoint, open_checkpoint
from .variant import variant_at, variant_metadata, variant_of

__all__ = [
    "DENOISER",
    "Checkpoint",
    "Kind",
    "denoiser_config",
    "encoder_config",
    "encoder_layout",
    "inspect",
    "load_into",
    "open_checkpoint",
    "vae_config",
    "variant_at",
    "variant_metadata",
    "variant_of",
]
