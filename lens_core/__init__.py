"""Lens text-to-image without a host: prompt, encoder, denoiser, sampler, VAE and their files.

Nothing here imports ComfyUI. ``python -m lens_core generate`` makes pictures from a folder,
``python -m lens_core.tiny`` writes tiny random models for tests.
"""

__version__ = "0.1.0"
