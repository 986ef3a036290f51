"""Latents to pictures and back."""

from .autoencoder import LensVAE, to_uint8, unpack
from .colours import linear_colours

__all__ = ["LensVAE", "linear_colours", "to_uint8", "unpack"]
