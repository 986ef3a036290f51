"""Latents, text features and noise level to velocity."""

from .run import DenoiserRun
from .transformer import LensDenoiser

__all__ = ["DenoiserRun", "LensDenoiser"]
