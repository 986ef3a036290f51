"""Latents, text features and noise level to velocity."""

from .graph import BlockGraphs
from .run import DenoiserRun
from .transformer import LensDenoiser

__all__ = ["BlockGraphs", "DenoiserRun", "LensDenoiser"]
