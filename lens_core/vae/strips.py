"""FLUX.2's decoder in horizontal strips: diffusers' whole decode up to rounding, in a fraction of its memory.

Tiles would change the picture, because every GroupNorm and the middle's attention look at all of it. Here a
layer's input is complete before the layer runs, so the norms' statistics are those of the whole picture, and
only the work within a layer is cut up:

- A layer's input is a list of strips, each freed once its output exists. At its worst a decode holds two
  tensors of [128, H, W], a residual and the hidden one beside it, where whole layers took the space of nine.
- Of normalised and enlarged inputs, and of fp32 copies where the statistics need them, a strip exists at a
  time.
- Statistics are taken of every strip when it is made, and combined when the next norm needs them.

What lies between the convolutions is ``kernels.strips``, by Triton where that can run.

Strips are cut by a layer's shape alone, so that a picture does not depend on how much memory was free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import EAGER_STRIPS, StripKernels, choose_strips

# A strip's channels x rows x width, 256 rows of 1024 in 128 channels. With a quarter of it a decode at 1440 x
# 1440 takes 8 % less memory, and an H200 waits for the CPU that launches four times as many kernels.
STRIP_ELEMENTS = 2**25
# Scores of the attention that exist at once where no kernel avoids them.
ATTENTION_SCORES = 2**25
# What cuDNN may take beside the tensors.
CONV_WORKSPACE = 32 * 2**20
# What PyTorch's variance of a strip takes on NVIDIA's GPUs, whatever the strip: measured on an H200.
MOMENTS_SCRATCH = 264 * 2**20

OnStrip = Callable[[], None]
# Takes rows of a picture, [1, C, n, width], into place: [1, C, n, width], or both sizes doubled.
Write = Callable[[Tensor, Tensor], object]


def strip_rows(channels: int, height: int, width: int, parts: int = 1) -> int:
    """Rows of a strip of a layer of [channels, height, width]; even, for pixels are doubled in pairs.

    ``parts``: how many times smaller than usual.
    """
    count = math.ceil(channels * height * width * parts / STRIP_ELEMENTS)
    rows = math.ceil(height / count)
    return rows + rows % 2


class Strips:
    """A picture [1, C, height, width] in strips of ``rows`` rows (the last may be shorter), each freed alone.

    Beside them the moments of every strip's channels, for the GroupNorm that comes next.
    """

    def __init__(self, rows: int, height: int, width: int, kernels: StripKernels = EAGER_STRIPS) -> None:
        self.rows, self.height, self.width = rows, height, width
        self.kernels = kernels
        # How many times smaller than usual the strips are that are made of these.
        self.fineness = 1
        self.parts: list[Tensor | None] = []
        self.taken = 0
        self.moments: list[Tensor] = []

    def append(
        self, strip: Tensor, bias: Tensor | None = None, residual: Iterator[Tensor] | None = None
    ) -> None:
        """The next rows, [1, C, rows, width], once a bias [C] and pieces of a residual, one below the other,
        are added to them in place."""
        self.parts.append(strip)
        for piece in residual or (None,):
            rows = strip.shape[2] if piece is None else piece.shape[2]
            self.moments.append(self.kernels.add_moments(strip[:, :, :rows], bias, piece))
            strip = strip[:, :, rows:]

    def pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        """Rows [start, stop) as views of the strips that hold them, each [1, C, n, width]."""
        while start < stop:
            index, offset = divmod(start, self.rows)
            count = min(stop - start, self.rows - offset)
            part = self.parts[index]
            assert part is not None, f"row {start} of {self.height} was freed"
            yield part[:, :, offset : offset + count]
            start += count

    def take(self, stop: int) -> Iterator[Tensor]:
        """The strips that end at row ``stop`` or above, which lets go of them."""
        first, self.taken = self.taken, len(self.parts) if stop >= self.height else stop // self.rows
        for index in range(first, self.taken):
            part, self.parts[index] = self.parts[index], None
            assert part is not None
            yield part

    def free(self, stop: int) -> None:
        """Rows above ``stop`` are needed no more."""
        for _ in self.take(stop):
            pass

    def affine(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """``norm`` over the whole picture as fp32 scale and shift, [1, C, 1, 1] each; uses the moments up."""
        moments = torch.cat(self.moments)
        self.moments.clear()
        return self.kernels.affine(moments, norm.weight, norm.bias, norm.num_groups, norm.eps)


# As ``_finest``.
Finest = Callable[[nn.Conv2d, Sequence[Any], Strips, OnStrip], Strips]


def decode(model: Any, latents: Tensor, on_strip: OnStrip, finest: Finest | None = None) -> Tensor:
    """Pictures [B, 3, 8h, 8w] of latents [B, 32, h, w], as ``model.decode`` of diffusers' AutoencoderKLFlux2.

    Runs that model's own layers, one picture at a time. ``on_strip`` is called before every strip of a
    convolution, and may raise. ``finest`` is another way through the last enlarging and the layers after it.
    """
    kernels = choose_strips(latents.device, latents.dtype)
    batch, _, height, width = latents.shape
    decoder = model.decoder
    scale = 2 ** sum(block.upsamplers is not None for block in decoder.up_blocks)
    with torch.no_grad():
        images = latents.new_empty(batch, decoder.conv_out.out_channels, scale * height, scale * width)
        for image, picture in zip(images.split(1), latents.split(1), strict=True):
            _decode_one(model, picture, image, kernels, on_strip, finest or _finest)
    return images


def _decode_one(
    model: Any, latents: Tensor, image: Tensor, kernels: StripKernels, on_strip: OnStrip, finest: Finest
) -> None:
    decoder = model.decoder
    if model.post_quant_conv is not None:
        latents = model.post_quant_conv(latents)
    # The first convolution is whole, for it is small; from here on strips have no owner but their list.
    height, width = latents.shape[2:]
    x = Strips(height, height, width, kernels)
    x.append(decoder.conv_in(latents).contiguous(memory_format=layout_of(latents)))
    x = through_middle(decoder.mid_block, x, on_strip)
    *blocks, last = decoder.up_blocks
    for block in blocks:
        for resnet in block.resnets:
            x = through_resnet(resnet, x, on_strip)
        if block is not blocks[-1]:
            x = _upsample(block.upsamplers[0].conv, x, on_strip)
    x = finest(blocks[-1].upsamplers[0].conv, last.resnets, x, on_strip)
    conv, start = decoder.conv_out, 0
    for stop, strip in convolved(conv, conv.bias, x, writer_of(decoder.conv_norm_out, x), on_strip):
        x.free(stop)
        image[:, :, start:stop] = strip
        start = stop


def _finest(conv: nn.Conv2d, resnets: Sequence[Any], x: Strips, on_strip: OnStrip) -> Strips:
    """Enlarge, then the finest level's resnets; uses ``x`` up."""
    x = _upsample(conv, x, on_strip)
    for resnet in resnets:
        x = through_resnet(resnet, x, on_strip)
    return x


def layout_of(like: Tensor) -> torch.memory_format:
    """Tensor cores read 16-bit pixels with their channels together; other layouts are converted first."""
    half = like.is_cuda and like.dtype in (torch.bfloat16, torch.float16)
    return torch.channels_last if half else torch.contiguous_format


def through_resnet(block: Any, x: Strips, on_strip: OnStrip) -> Strips:
    """``ResnetBlock2D``; uses ``x`` up."""
    shortcut = block.conv_shortcut
    hidden = output_of(block.conv1, x)
    residual = x if shortcut is None else Strips(x.rows, x.height, x.width)
    inside, after = bias_of(block.conv1, x)
    for stop, strip in convolved(block.conv1, inside, x, writer_of(block.norm1, x), on_strip):
        if shortcut is not None:
            residual.parts.extend(map(shortcut, x.take(stop)))
        hidden.append(strip, after)
    result, start = output_of(block.conv2, hidden), 0
    inside, after = bias_of(block.conv2, x)
    for stop, strip in convolved(block.conv2, inside, hidden, writer_of(block.norm2, hidden), on_strip):
        result.append(strip, after, residual.pieces(start, stop))
        hidden.free(stop)
        residual.free(stop)
        start = stop
    return result


def _upsample(conv: nn.Conv2d, x: Strips, on_strip: OnStrip) -> Strips:
    """``Upsample2D``: every pixel doubled both ways, then a convolution; uses ``x`` up."""
    result = output_of(conv, x, scale=2)
    inside, after = bias_of(conv, x)
    for stop, strip in convolved(conv, inside, x, x.kernels.double, on_strip, scale=2):
        x.free(stop // 2)
        result.append(strip, after)
    return result


def through_middle(block: Any, x: Strips, on_strip: OnStrip) -> Strips:
    """``UNetMidBlock2D``, the decoder's or the encoder's; uses ``x`` up."""
    first, *others = block.resnets
    x = through_resnet(first, x, on_strip)
    for attention, resnet in zip(block.attentions, others, strict=True):
        if attention is not None:
            x = attended(attention, x)
        x = through_resnet(resnet, x, on_strip)
    return x


def attended(block: Any, x: Strips) -> Strips:
    """``Attention`` of one picture's pixels with each other; uses ``x`` up."""
    scale, shift = x.affine(block.group_norm)
    normed = [torch.addcmul(shift, part, scale).to(part.dtype) for part in x.pieces(0, x.height)]
    tokens = torch.cat([part.flatten(2).transpose(1, 2) for part in normed], 1)
    del normed
    query, key, value = (
        linear(tokens).unflatten(-1, (block.heads, -1)).transpose(1, 2)
        for linear in (block.to_q, block.to_k, block.to_v)
    )
    del tokens
    # NVIDIA's GPUs have a kernel for heads of 512 that keeps no scores, and wants all the queries it can get.
    count = query.shape[2]
    fused = query.is_cuda and torch.version.hip is None
    chunks = query.split(count if fused else max(1, ATTENTION_SCORES // count), dim=2)
    mixed = torch.cat([F.scaled_dot_product_attention(chunk, key, value) for chunk in chunks], 2)
    del query, key, value, chunks
    mixed = block.to_out[0](mixed.transpose(1, 2).flatten(2)).transpose(1, 2)
    result, start = Strips(x.rows, x.height, x.width, x.kernels), 0
    for part in x.take(x.height):
        stop = start + part.shape[2] * part.shape[3]
        result.append(part, residual=iter([mixed[:, :, start:stop].unflatten(2, part.shape[2:])]))
        start = stop
    return result


def _rows(conv: nn.Conv2d, source: Strips, scale: int) -> int:
    channels = max(conv.in_channels, conv.out_channels)
    return strip_rows(channels, scale * source.height, scale * source.width, source.fineness)


def output_of(conv: nn.Conv2d, source: Strips, scale: int = 1) -> Strips:
    """Room for what ``convolved`` yields."""
    height, width = scale * source.height, scale * source.width
    result = Strips(_rows(conv, source, scale), height, width, source.kernels)
    result.fineness = source.fineness
    return result


def bias_of(conv: nn.Conv2d, source: Strips) -> tuple[Tensor | None, Tensor | None]:
    """The bias, or nothing, to be added by the convolution; the bias, or nothing, to be added after it."""
    return (None, conv.bias) if source.kernels.adds_bias else (conv.bias, None)


def convolved(
    conv: nn.Conv2d, bias: Tensor | None, source: Strips, write: Write, on_strip: OnStrip, scale: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """(row it ends at, strip) of a 3x3 convolution of ``source`` as ``write`` transforms it.

    A strip needs a row more on either side, zeros beyond the picture. The upper one is kept, transformed,
    from the strip before: the caller may free the source's rows above where that strip ended.
    """
    height, width = scale * source.height, scale * source.width
    rows = _rows(conv, source, scale)
    layout = layout_of(conv.weight)
    weight = conv.weight.contiguous(memory_format=layout)
    size = (1, conv.in_channels, min(rows, height) + 2, width)
    rim = torch.empty(size, dtype=weight.dtype, device=weight.device, memory_format=layout)
    for start in range(0, height, rows):
        on_strip()
        stop = min(start + rows, height)
        rim[:, :, 0] = rim[:, :, rows] if start else 0
        window = rim[:, :, : stop - start + 2]
        fill(window[:, :, 1:-1], source.pieces(start // scale, stop // scale), write, scale)
        if stop < height:
            fill(window[:, :, -1:], source.pieces(stop // scale, stop // scale + 1), write)
        else:
            window[:, :, -1] = 0
        # AMD's convolutions put the channels apart again.
        yield stop, F.conv2d(window, weight, bias, padding=(0, 1)).contiguous(memory_format=layout)


def fill(window: Tensor, pieces: Iterator[Tensor], write: Write, scale: int = 1) -> None:
    """``write`` the pieces one below the other. A function of its own, so that no view outlives it: a view
    would keep a strip in memory that its list has let go of."""
    for piece in pieces:
        rows = scale * piece.shape[2]
        write(window[:, :, :rows], piece)
        window = window[:, :, rows:]


def writer_of(norm: nn.GroupNorm, source: Strips) -> Write:
    """GroupNorm and SiLU."""
    scale, shift = source.affine(norm)
    return lambda window, piece: source.kernels.normalise_silu(window, piece, scale, shift)


def decode_bytes(
    channels: Sequence[int], height_tokens: int, width_tokens: int, element_size: int, fused: bool = False
) -> int:
    """Peak memory of ``decode`` for one picture, weights and latents left out.

    ``channels``: the decoder's levels from the finest, [128, 256, 512, 512] as published.
    The most at once is, at some level: the enlarged picture, complete; its first layer's input with the first
    strips of hidden tensor and residual; or hidden tensor and residual, complete, with a strip of the result.
    Beside them a convolution's input exists and, for the statistics of 16-bit floats unless kernels are
    ``fused``, a strip of its output in fp32. Moments, 1 % of the whole, are left out.
    """
    height, width = 2 * height_tokens, 2 * width_tokens
    worst, before = 0, channels[-1]
    for level, after in enumerate(reversed(channels)):
        if level:
            height, width = 2 * height, 2 * width
        worst = max(worst, level_bytes(before, after, height, width, element_size, fused, enlarged=level > 0))
        before = after
    libraries = CONV_WORKSPACE + (0 if fused else MOMENTS_SCRATCH)
    return worst + 3 * height * width * element_size + libraries


def level_bytes(
    before: int, after: int, height: int, width: int, element_size: int, fused: bool, enlarged: bool = False
) -> int:
    """Peak memory within a level's resnets, of which the first has ``before`` channels, and where its input
    is enlarged."""
    copy = 0 if fused or element_size >= 4 else 4
    first = copy if before == after else max(copy, 2 * element_size)
    # Channels of what is complete, of a convolution's input, and bytes beside them of a strip's pixel.
    moments = [
        (max(before, 2 * after), before, first * after),
        (2 * after, after, (element_size + copy) * after),
    ]
    if enlarged:
        moments.append((before, before, copy * before))
    worst = 0
    for kept, into, extra in moments:
        rows = min(height, strip_rows(max(into, after), height, width))
        strip = width * (into * (rows + 2) * element_size + extra * rows)
        worst = max(worst, kept * height * width * element_size + strip)
    return worst
