"""What each component of a picture needs on the GPU, for the plans of ``memory.plan``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .config import PIXELS_PER_TOKEN, DenoiserConfig, is_modulation
from .denoiser import LensDenoiser
from .kernels import EAGER_BLOCK, choose_block
from .memory.estimate import denoiser_bytes, encoder_bytes
from .memory.plan import BUFFERS, Component, Components
from .text_encoder import TextEncoder
from .vae import LensVAE

# The chat around a prompt.
_TEMPLATE_TOKENS = 440
# cuBLAS' workspace, which it takes with its first product and keeps.
_LIBRARIES = 34_000_000
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


@dataclass(frozen=True)
class Picture:
    """Pixels, pictures at once, tokens of the longest prompt, noise levels."""

    height: int
    width: int
    batch: int = 1
    text_tokens: int = 200
    levels: int = 20

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in image tokens."""
        return self.height // PIXELS_PER_TOKEN, self.width // PIXELS_PER_TOKEN


def largest_below(height: int, width: int, fits: Callable[[int, int], bool]) -> tuple[int, int] | None:
    """The largest (height, width) of about this shape, smaller than it, that ``fits``; None if none does."""
    rows = height // PIXELS_PER_TOKEN
    for count in range(rows - 1, 0, -1):
        columns = max(1, round(width / PIXELS_PER_TOKEN * count / rows))
        size = count * PIXELS_PER_TOKEN, columns * PIXELS_PER_TOKEN
        if fits(*size):
            return size
    return None


def encoder_needs(sizes: tuple[int, ...], placement: str, tokens: int, *, dense: bool) -> Component:
    """An encoder of layers with these ``sizes`` in one of ``config.PLACEMENTS``, for a prompt of so many
    tokens; ``dense``: its experts are dequantised, which only resident layers' can be."""
    working = encoder_bytes(_TEMPLATE_TOKENS + tokens)
    if placement == "cpu":
        return Component(())
    if dense or placement == "gpu":  # all or nothing
        return Component((), sum(sizes), working)
    if placement == "stream":
        return Component((), 0, working + BUFFERS * max(sizes))
    return Component(sizes, 0, working)


def denoiser_needs(
    sizes: Mapping[str, int],
    config: DenoiserConfig,
    picture: Picture,
    element_size: int,
    *,
    fused: bool,
    quantized: bool,
) -> Component:
    """A denoiser of tensors with these names and ``sizes``; ``fused`` and ``quantized`` as
    ``estimate.denoiser_bytes`` has them."""
    steps = [0] * config.num_layers
    modulation, rest = [0] * config.num_layers, 0
    for name, size in sizes.items():
        found, layer = _BLOCK.match(name), name.rpartition(".")[0]
        if found is None:
            rest += size
        elif is_modulation(layer):
            modulation[int(found[1])] += size
        else:
            steps[int(found[1])] += size
    height, width = picture.grid
    working = denoiser_bytes(
        config,
        batch=picture.batch,
        image_tokens=height * width,
        text_tokens=picture.text_tokens,
        element_size=element_size,
        fused=fused,
        quantized=quantized,
        levels=picture.levels,
    )
    return Component(tuple(steps), rest, working + _LIBRARIES, tuple(modulation))


def picture_needs(
    text: TextEncoder,
    placement: str,
    denoiser: LensDenoiser,
    vae: LensVAE,
    picture: Picture,
    device: torch.device,
    dtype: torch.dtype,
    quantized: bool,
) -> Components:
    """All three models for a picture that is computed on ``device``, by the denoiser in ``dtype``."""
    kernels = choose_block(device, dtype, denoiser.config.attention_head_dim)
    return Components(
        encoder_needs(tuple(text.layers.sizes), placement, picture.text_tokens, dense=text.dense),
        denoiser_needs(
            {name: tensor.nbytes for name, tensor in denoiser.state_dict().items()},
            denoiser.config,
            picture,
            dtype.itemsize,
            fused=kernels is not EAGER_BLOCK,
            quantized=quantized,
        ),
        vae_needs(vae, picture, device),
    )


def vae_needs(vae: LensVAE, picture: Picture, device: torch.device) -> Component:
    """The VAE, which decodes one picture of a batch at a time, on ``device``."""
    weights = sum(tensor.nbytes for tensor in vae.state_dict().values())
    element = next(vae.parameters()).element_size()
    return Component((), weights, vae.decode_bytes(*picture.grid, element, device) + _LIBRARIES)
