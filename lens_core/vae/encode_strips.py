"""FLUX.2's encoder in horizontal strips: diffusers' whole encode up to rounding, in a fraction of its memory.

As ``strips`` has it for the decoder, whose layers most of these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import StripKernels, choose_strips
from .strips import (
    CONV_WORKSPACE,
    MOMENTS_SCRATCH,
    OnStrip,
    Strips,
    bias_of,
    convolved,
    fill,
    layout_of,
    level_bytes,
    output_of,
    strip_rows,
    through_middle,
    through_resnet,
    writer_of,
)


def encode(model: Any, images: Tensor, on_strip: OnStrip) -> Tensor:
    """Means [B, 32, h, w] of pictures [B, 3, 8h, 8w], as ``model.encode`` of diffusers' AutoencoderKLFlux2.

    Runs that model's own layers, one picture at a time. ``on_strip`` is called before every strip of a
    convolution, and may raise.
    """
    kernels = choose_strips(images.device, images.dtype)
    with torch.no_grad():
        moments = [_encode_one(model, image, kernels, on_strip) for image in images.split(1)]
    return torch.cat(moments).chunk(2, dim=1)[0]


def _encode_one(model: Any, image: Tensor, kernels: StripKernels, on_strip: OnStrip) -> Tensor:
    encoder = model.encoder
    height, width = image.shape[2:]
    picture = Strips(height, height, width, kernels)
    picture.parts.append(image)
    x = _first(encoder.conv_in, picture, on_strip)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = through_resnet(resnet, x, on_strip)
        for downsampler in block.downsamplers or ():
            x = _downsample(downsampler.conv, x, on_strip)
    x = through_middle(encoder.mid_block, x, on_strip)
    conv = encoder.conv_out
    strips = convolved(conv, conv.bias, x, writer_of(encoder.conv_norm_out, x), on_strip)
    moments = torch.cat([strip for _, strip in strips], 2).contiguous()
    return moments if model.quant_conv is None else model.quant_conv(moments)


def _first(conv: nn.Conv2d, picture: Strips, on_strip: OnStrip) -> Strips:
    """A function of its own, so that no name keeps a strip in memory."""
    result, (inside, after) = output_of(conv, picture), bias_of(conv, picture)
    for _, strip in convolved(conv, inside, picture, _copy, on_strip):
        result.append(strip, after)
    return result


def _copy(window: Tensor, piece: Tensor) -> None:
    window.copy_(piece)


def _downsample(conv: nn.Conv2d, x: Strips, on_strip: OnStrip) -> Strips:
    """``Downsample2D``: a 3x3 convolution of every other pixel, zeros below and right; uses ``x`` up."""
    rows, height = strip_rows(conv.in_channels, x.height, x.width) // 2, x.height // 2
    result = Strips(rows, height, x.width // 2, x.kernels)
    inside, after = bias_of(conv, x)
    layout = layout_of(conv.weight)
    weight = conv.weight.contiguous(memory_format=layout)
    for start in range(0, height, rows):
        on_strip()
        stop = min(start + rows, height)
        size = (1, conv.in_channels, 2 * (stop - start) + 1, x.width + 1)
        window = torch.empty(size, dtype=weight.dtype, device=weight.device, memory_format=layout)
        inner = window[:, :, :, :-1]
        fill(inner[:, :, :-1], x.pieces(2 * start, 2 * stop), _copy)
        if 2 * stop < x.height:
            fill(inner[:, :, -1:], x.pieces(2 * stop, 2 * stop + 1), _copy)
        else:
            window[:, :, -1] = 0
        window[:, :, :, -1] = 0
        x.free(2 * stop)
        result.append(F.conv2d(window, weight, inside, stride=2).contiguous(memory_format=layout), after)
    return result


def encode_bytes(
    channels: Sequence[int], height_tokens: int, width_tokens: int, element_size: int, fused: bool = False
) -> int:
    """Peak memory of ``encode`` for one picture, weights and the picture left out.

    ``channels``: the encoder's levels from the finest, [128, 256, 512, 512] as published. The most at once is
    a resnet's, as ``decode_bytes`` has it.
    """
    worst, before = 0, channels[0]
    height, width = 16 * height_tokens, 16 * width_tokens
    for level, after in enumerate(channels):
        size = height >> level, width >> level
        worst = max(worst, level_bytes(before, after, *size, element_size, fused))
        before = after
    return worst + CONV_WORKSPACE + (0 if fused else MOMENTS_SCRATCH)
