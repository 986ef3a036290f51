"""Which kernels the VAE's strips are decoded by: declared limits decide, and a self-test at first use."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from . import backend, strips

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StripKernels:
    """One backend's operations; signatures and meaning are those of ``kernels.strips``."""

    name: str
    add_moments: Callable[..., Tensor]
    affine: Callable[..., tuple[Tensor, Tensor]]
    normalise_silu: Callable[..., None]
    double: Callable[..., None]
    # Whether a convolution's bias is best left to add_moments: on a GPU PyTorch adds it in a pass of its own.
    adds_bias: bool = False


EAGER_STRIPS = StripKernels("torch", strips.add_moments, strips.affine, strips.normalise_silu, strips.double)


@cache
def choose_strips(device: torch.device, dtype: torch.dtype) -> StripKernels:
    """The fastest backend on ``device`` in ``dtype``; why it is not Triton on a GPU is logged once."""
    if backend.why_no_gpu(device) is not None:
        return EAGER_STRIPS
    reason = backend.why_no_triton(device, dtype, "the VAE")
    if reason is None and not backend.interpreted():
        reason = backend.self_test(lambda: difference(device, dtype))
    if reason is None:
        return triton_strip_kernels()
    log.warning(
        "The VAE decodes in plain PyTorch between its convolutions, slower than with Triton: %s.", reason
    )
    return EAGER_STRIPS


@cache
def triton_strip_kernels() -> StripKernels:
    """The Triton backend; import only once its limits are met."""
    from .triton import strip_launch

    return StripKernels(
        "triton",
        strip_launch.add_moments,
        strip_launch.affine,
        strip_launch.normalise_silu,
        strip_launch.double,
        adds_bias=True,
    )


def difference(device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative L2 between the backends' operations, each on the same random input."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, mean: float = 0.0) -> Tensor:
        return (mean + torch.randn(shape, generator=generator)).to(device, dtype)

    def picture(rows: int, width: int, mean: float = 0.0) -> Tensor:
        return normal(1, channels, rows, width, mean=mean).contiguous(memory_format=torch.channels_last)

    channels, groups = 128, 32  # the finest level's, so that what is compiled here serves there too
    first, second, residual = picture(17, 29, mean=2), picture(6, 29), picture(6, 29)
    bias, gain, offset = normal(channels), normal(channels, mean=1), normal(channels)

    def run(kernels: StripKernels) -> tuple[Tensor, ...]:
        one, two, both = first.clone(), second.clone(), second.clone()
        parts = (
            kernels.add_moments(one),
            kernels.add_moments(two, bias),
            kernels.add_moments(both, None, residual),
            kernels.add_moments(both, bias, residual),
        )
        affines = [kernels.affine(part, gain, offset, groups, 1e-6) for part in (*parts, torch.cat(parts))]
        window = picture(8, 29).zero_()
        kernels.normalise_silu(window[:, :, 1:-1], both, *affines[-1])
        tall, flat = picture(12, 58), picture(6, 58)
        kernels.double(tall, both)
        kernels.double(flat, both)
        return (two, both, window, tall, flat, *(value for pair in affines for value in pair))

    return backend.apart(run(triton_strip_kernels()), run(EAGER_STRIPS))
