"""Latents to pictures and back."""

from .autoencoder import LensVAE, to_uint8

__all__ = ["LensVAE", "to_uint8"]
