"""The decoder's last enlarging and finest level in two thirds of the memory, for two fifths more work.

``strips`` keeps an enlarged picture, and a hidden tensor beside its residual. Here they are made strip by
strip whenever they are needed: once for the statistics of the norm that comes next, and again for each
convolution of what is normalised. The picture is the same up to rounding; no tiles, no seams.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..kernels.strips import PARTS
from .strips import (
    CONV_WORKSPACE,
    MOMENTS_SCRATCH,
    OnStrip,
    Strips,
    bias_of,
    convolved,
    level_bytes,
    output_of,
    strip_rows,
    writer_of,
)

# Strips here are so many times smaller, for a dozen of them exist at once.
FINENESS = 4
# (strip, its moments) from the top; told whether it is the last time.
Make = Callable[[bool], Iterator[tuple[Tensor, Tensor]]]


class Stream(Strips):
    """Strips that are made as their rows are asked for, from the top to the bottom, as often as wanted."""

    def __init__(self, like: Strips, make: Make) -> None:
        super().__init__(like.rows, like.height, like.width, like.kernels)
        self.fineness = like.fineness
        self.make = make
        self.coming: Iterator[tuple[Tensor, Tensor]] = iter(())

    def again(self, last: bool = False) -> None:
        """From the top."""
        self.parts.clear()
        self.taken = 0
        self.coming = self.make(last)

    def measure(self) -> None:
        """The moments of all strips, none of which is kept."""
        self.again()
        self.moments.extend(moments for _, moments in self.coming)

    def pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        """As of ``Strips``; makes what is not there yet."""
        while len(self.parts) * self.rows < stop:
            self.parts.append(next(self.coming)[0])
        yield from super().pieces(start, stop)


def finest(conv: nn.Conv2d, resnets: Sequence[Any], x: Strips, on_strip: OnStrip) -> Strips:
    """Enlarge, then the finest level's resnets; uses ``x`` up."""
    x.fineness = FINENESS
    first, *others = resnets
    x = _resnet(first, _enlarged(conv, x, on_strip), on_strip)
    for resnet in others:
        x = _resnet(resnet, x, on_strip)
    return x


def _enlarged(conv: nn.Conv2d, x: Strips, on_strip: OnStrip) -> Stream:
    inside, after = bias_of(conv, x)

    def make(last: bool) -> Iterator[tuple[Tensor, Tensor]]:
        for stop, strip in convolved(conv, inside, x, x.kernels.double, on_strip, scale=2):
            if last:
                x.free(stop // 2)
            yield strip, x.kernels.add_moments(strip, after)

    return Stream(output_of(conv, x, scale=2), make)


def _resnet(block: Any, x: Strips, on_strip: OnStrip) -> Strips:
    """``ResnetBlock2D``; uses ``x`` up."""
    if isinstance(x, Stream):
        x.measure()
    write = writer_of(block.norm1, x)
    inside, after = bias_of(block.conv1, x)

    def make(last: bool) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(x, Stream):
            x.again(last)
        for stop, strip in convolved(block.conv1, inside, x, write, on_strip):
            if isinstance(x, Stream) and not last:
                x.free(stop)
            yield strip, x.kernels.add_moments(strip, after)

    hidden = Stream(output_of(block.conv1, x), make)
    hidden.measure()
    hidden.again(last=True)
    result, start = output_of(block.conv2, hidden), 0
    inside_second, after_second = bias_of(block.conv2, x)
    normalised = writer_of(block.norm2, hidden)
    for stop, strip in convolved(block.conv2, inside_second, hidden, normalised, on_strip):
        residual = x.pieces(start, stop)
        result.append(
            strip, after_second, map(block.conv_shortcut, residual) if block.conv_shortcut else residual
        )
        hidden.free(stop)
        x.free(stop)
        start = stop
    return result


def decode_bytes(
    channels: Sequence[int], height_tokens: int, width_tokens: int, element_size: int, fused: bool = False
) -> int:
    """Peak memory of ``strips.decode`` with this ``finest``; see ``strips.decode_bytes``.

    At the finest level that is the larger of the tensors before and after enlarging, and the strips between;
    of the tensor before, whose strips are of the usual size, the last is held to the end; and the moments,
    which the kernels keep of each of so many strips.
    """
    height, width = 2 * height_tokens, 2 * width_tokens
    worst, before = 0, channels[-1]
    for level, after in enumerate(reversed(channels)):
        if level:
            height, width = 2 * height, 2 * width
        if level == len(channels) - 1:
            kept = max(before / 4, after) * height * width * element_size
            rows = min(height, strip_rows(before, height, width, FINENESS))
            copy = 0 if fused or element_size >= 4 else 4
            between = width * ((5 * before + 5 * after) * element_size + copy * before) * (rows + 2)
            held = before * strip_rows(before, height // 2, width // 2) * width // 2 * element_size
            # Three fp32 for each channel of a part.
            moments = 12 * PARTS * after * math.ceil(height / rows) if fused else 0
            worst = max(worst, int(kept) + between + held + moments)
        else:
            enlarged = level > 0
            worst = max(worst, level_bytes(before, after, height, width, element_size, fused, enlarged))
        before = after
    libraries = CONV_WORKSPACE + (0 if fused else MOMENTS_SCRATCH)
    return worst + 3 * height * width * element_size + libraries
