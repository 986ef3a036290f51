"""What a picture's models need on the GPU, from their files' headers: before anything is loaded."""

from __future__ import annotations

import torch
from torch import nn

from .denoiser import LensDenoiser
from .denoiser_file import DenoiserFile
from .encoder_file import EncoderFile
from .kernels.backend import why_no_gpu, why_no_triton
from .memory.plan import Component
from .needs import Picture, denoiser_needs, encoder_needs
from .quantized import replace_linears
from .text_encoder import layer_sizes


def denoiser_file_needs(
    file: DenoiserFile,
    mode: str,
    device: torch.device,
    held: torch.dtype,
    computing: torch.dtype,
    picture: Picture,
) -> Component:
    """A file's denoiser, quantised by ``mode`` as ``file.mode`` gives it, its other weights ``held`` in one
    dtype and ``computing`` in another or the same.

    Our kernels are taken to run where nothing speaks against them: their test of themselves is a kernel.
    """
    layers = file.layers(mode, device)
    structure = LensDenoiser(file.config, nn, held, device="meta")
    replace_linears(structure, {name: part.packed for name, part in layers.items()})
    sizes = {name: tensor.nbytes for name, tensor in structure.state_dict().items()}
    fused = why_no_gpu(device) is None and why_no_triton(device, computing, "the denoiser") is None
    return denoiser_needs(
        sizes, file.config, picture, computing.itemsize, fused=fused, quantized=bool(layers)
    )


def encoder_file_needs(
    file: EncoderFile, placement: str, dtype: torch.dtype, picture: Picture, *, dense: bool = False
) -> Component:
    """A file's encoder in one of ``config.PLACEMENTS``, computing in ``dtype``."""
    return encoder_needs(layer_sizes(file.sizes, dtype, dense), placement, picture.text_tokens, dense=dense)
