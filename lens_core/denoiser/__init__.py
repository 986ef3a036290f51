"""Latents, text features and noise level to velocity."""

from .transformer import LensDenoiser

__all__ = ["LensDenoiser"]
