"""Which kernels quantised linears run on: declared limits decide, and self-tests at first use.

Each kind of 8-bit product is tested when a layer first asks for it: most models have one kind or none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from ..quant import linear as quant
from ..quant.layer_format import FLOAT8, INT8, LayerFormat, affine4, float8, int8, mxfp8, nvfp4
from ..quant.linear import Packed, QuantizedRows
from . import backend
from .linear import EAGER_LINEAR, Biases, LinearKernels, multiply
from .scaled_mm import multiply_float8, why_not_multiply_float8

log = logging.getLogger(__name__)
# From here on PyTorch's products of 8-bit floats are faster (H200: a forward at 1440 x 1440 by 4 of 75 ms; at
# 1024 x 1024 with text Triton's wins 1 ms beside a fast CPU and 6 beside a slow one).
_MANY_TOKENS = 6000
# Of 200 tokens in a self-test: few, and more tiles than multiprocessors.
_REPEATS = (1, 10, 30)


@cache
def choose_linear(device: torch.device, dtype: torch.dtype) -> LinearKernels:
    """The fastest backend on ``device`` in ``dtype``; why it is not Triton on a GPU is logged once."""
    if backend.why_no_gpu(device) is not None:
        return EAGER_LINEAR
    reason = why_not_triton_linear(device, dtype)
    if reason is not None:
        log.warning("Quantised weights are unpacked in plain PyTorch, slower than with Triton: %s.", reason)
    kernels = triton_linear_kernels() if reason is None else replace(EAGER_LINEAR, multiply={})
    products = {FLOAT8: multiply_float8 if reason is not None else _float8_product, **kernels.multiply}
    here = {kind: run for kind, run in products.items() if limit(kind, device, dtype) is None}
    return replace(kernels, multiply=here, why_not=cache(partial(_why_not, device=device, dtype=dtype)))


@cache
def why_not_triton_linear(device: torch.device, dtype: torch.dtype) -> str | None:
    """The first limit that is not met, in words; None where all are."""
    reason = backend.why_no_triton(device, dtype, "the denoiser")
    if reason is None and not backend.interpreted():
        reason = backend.self_test(lambda: difference(device, dtype))
    return reason


@cache
def why_not(kind: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why inputs are not quantised to ``kind``, in words; None where they can be."""
    reason = limit(kind, device, dtype)
    if reason is None and not backend.interpreted():
        reason = backend.self_test(lambda: product_difference(kind, device, dtype))
    return reason


def _float8_product(
    streams: Sequence[QuantizedRows], weights: Sequence[Packed], biases: Biases
) -> list[Tensor]:
    """By PyTorch where the GPU has enough to do. Image and text together by Triton for fewer tokens: the GPU
    waits for two launches a layer, and the text's few tiles run beside the image's."""
    if len(streams) == 2 and sum(x.values[..., 0].numel() for x in streams) < _MANY_TOKENS:
        return triton_linear_kernels().multiply[INT8](streams, weights, biases)
    return multiply_float8(streams, weights, biases)


def limit(kind: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The first limit of products of ``kind`` that is not met, in words; None where all are."""
    if kind == INT8:
        return why_not_triton_linear(device, dtype)
    reason = backend.why_no_float8(device)
    if reason is None and dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        reason = f"the denoiser computes in {name}, and products of 8-bit floats come in bfloat16"
    return reason


def _why_not(
    form: LayerFormat, size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> str | None:
    """``why_not`` of a layer of ``size`` (N, K); each reason is logged once."""
    kind = form.inputs or ""
    reason = why_not(kind, device, dtype)
    if reason is None:
        reason = why_not_multiply_float8(*size) if kind == FLOAT8 else _why_not_int8()(*size)
    if reason is not None:
        _say_once(kind, dtype, reason)
    return reason


@cache
def _say_once(kind: str, dtype: torch.dtype, reason: str) -> None:
    name = str(dtype).removeprefix("torch.")
    log.warning("%s: the weights stay 8-bit and are multiplied in %s: %s.", kind, name, reason)


@cache
def triton_linear_kernels() -> LinearKernels:
    """The Triton backend; import only once its limits are met."""
    from .triton import linear_launch as launch

    return LinearKernels("triton", launch.quantize_rows, launch.unpack, {INT8: launch.multiply})


def _why_not_int8() -> Callable[[int, int], str | None]:
    from .triton.linear_launch import why_not_multiply

    return why_not_multiply


def difference(device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative L2 between the backends' unpacked weights and quantised rows, on the same input
    at the published model's widths, so that what is compiled here serves there too."""
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(2, 96, 1536, generator=generator).to(device)
    weights = [[quant.quantize(weight, form) for weight in pair] for form in (float8, int8, affine4)]
    weights += _block_scaled(generator, device)
    streams = [torch.randn(2, tokens, 1536, generator=generator).to(device, dtype) for tokens in (37, 5)]
    kinds = [INT8] if backend.why_no_float8(device) else [INT8, FLOAT8]

    def run(kernels: LinearKernels) -> tuple[Tensor, ...]:
        rows = (kernels.quantize_rows(streams, kind) for kind in kinds)
        unpacked = (weight for pair in weights for weight in kernels.unpack(pair, dtype))
        return (*unpacked, *(quant.dequantize_rows(x) for pair in rows for x in pair))

    return backend.apart(run(triton_linear_kernels()), run(EAGER_LINEAR))


def _block_scaled(generator: torch.Generator, device: torch.device) -> list[list[Packed]]:
    """Pairs [96, 1536] in mxfp8 and in nvfp4 of random numbers and scales: comfy-kitchen, which quantises to
    them, may be missing."""
    floats = torch.randn(2, 96, 1536, generator=generator).to(torch.float8_e4m3fn)
    powers = torch.randint(124, 131, (2, 128, 48), generator=generator).to(torch.uint8)
    nibbles = torch.randint(0, 256, (2, 96, 768), generator=generator).to(torch.uint8)
    scales = (0.1 + torch.rand(2, 128, 96, generator=generator)).to(torch.float8_e4m3fn)
    factor = torch.tensor(0.37, device=device)
    eight = zip(floats.to(device), powers.to(device), strict=True)
    four = zip(nibbles.to(device), scales.to(device), strict=True)
    return [[Packed(mxfp8, *parts) for parts in eight], [Packed(nvfp4, *parts, factor) for parts in four]]


def product_difference(kind: str, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative L2 between the backends' products of the same 8-bit numbers: of few tokens, and
    of so many that every tile is used, with one scale for the weight or one for each of its rows."""
    generator = torch.Generator().manual_seed(0)
    form: LayerFormat = {INT8: int8, FLOAT8: float8}[kind]
    weights = torch.randn(2, 1536, 1536, generator=generator).to(device)
    biases = torch.randn(2, 1536, generator=generator).to(device, dtype)
    runs: list[Callable[..., list[Tensor]]] = [multiply_float8] if kind == FLOAT8 else []
    if why_not_triton_linear(device, dtype) is None:
        runs.append(triton_linear_kernels().multiply[INT8])
    pairs = [quant.quantize(weight, form) for weight in weights]
    scale = pairs[0].scale.new_full((1536, 1) if form is float8 else (), 0.01)
    others = [packed._replace(scale=scale) for packed in pairs]
    some = torch.randn(200, 1536, generator=generator).to(device, dtype)
    errors = []
    for repeats in _REPEATS:
        streams = [quant.quantize_rows(x[None], kind) for x in (some.repeat(repeats, 1), some[:37])]
        for layers, added in ((pairs, [*biases]), (others, [None, None])):
            want = tuple(multiply(streams, layers, added))
            errors += [backend.apart(tuple(run(streams, layers, added)), want) for run in runs]
    return max(errors)
