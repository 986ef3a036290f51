"""Which fast paths run on a device, each tested now against plain PyTorch, and why not the others.

Limits and self-tests are those that the choices ask themselves (``kernels``); here they are asked one after
the other at the published sizes, with what came out.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..config import DenoiserConfig, EncoderConfig
from ..denoiser import graph
from ..kernels import backend, block_registry, flash3, linear_registry, registry, strip_registry
from ..ops import fastest_attention
from ..quant import kitchen
from ..quant.layer_format import FLOAT8, INT8
from .report import FAULTS, Finding, OnProgress, Section, sentence

_HEAD, _EXPERTS = DenoiserConfig.attention_head_dim, EncoderConfig.num_local_experts


@dataclass(frozen=True)
class FastPath:
    """``limit`` says why it cannot be on a device in a dtype (None: it can), ``difference`` is its self-test:
    the relative L2 to its twin (None: it has none)."""

    name: str
    limit: Callable[[torch.device, torch.dtype], str | None]
    difference: Callable[[torch.device, torch.dtype], float] | None = None


def _triton(part: str) -> Callable[[torch.device, torch.dtype], str | None]:
    return lambda device, dtype: backend.why_no_triton(device, dtype, part)


def _why_no_attention(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = backend.why_no_triton(device, dtype, "the denoiser")
    return reason or block_registry.why_not_attend(device, dtype)


def _why_no_kitchen(name: str, device: torch.device) -> str | None:
    reason = kitchen.why_not_multiply(name, device)
    if reason is None and importlib.util.find_spec("comfy_kitchen") is None:
        reason = "comfy-kitchen is not installed (pip install comfy-kitchen)"
    return reason


def _graph_difference(device: torch.device, dtype: torch.dtype) -> float:
    """A recorded product, played with other numbers than it was recorded with."""
    weight, x = torch.randn(2, 256, 256, device=device, dtype=dtype)
    own = x.clone()
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            F.linear(own, weight)  # cuBLAS takes memory at its first call, which cannot be recorded
        torch.cuda.synchronize(device)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            out = F.linear(own, weight)
        own.copy_(2 * x)
        recorded.replay()
        return backend.apart(out, F.linear(2 * x, weight))


FAST_PATHS = (
    FastPath(
        "encoder, MXFP4 experts",
        _triton("the encoder"),
        lambda device, dtype: registry.difference(device, dtype, "mxfp4", _EXPERTS),
    ),
    FastPath(
        "encoder, NVFP4 experts",
        _triton("the encoder"),
        lambda device, dtype: registry.difference(device, dtype, "nvfp4", _EXPERTS),
    ),
    FastPath(
        "denoiser, between products",
        _triton("the denoiser"),
        lambda device, dtype: block_registry.difference(device, dtype, _HEAD),
    ),
    FastPath("denoiser, own attention", _why_no_attention),  # tested with what is between products
    FastPath(
        "FlashAttention-3",
        lambda device, dtype: flash3.limit(device, dtype, _HEAD, None),
        lambda device, dtype: flash3.difference(device, dtype, _HEAD),
    ),
    FastPath("CUDA graphs", lambda device, _: graph.why_never(device), _graph_difference),
    FastPath("quantised weights", _triton("the denoiser"), linear_registry.difference),
    *(
        FastPath(
            f"products in {name}",
            lambda device, dtype, kind=kind: linear_registry.limit(kind, device, dtype),  # type: ignore[misc]
            lambda device, dtype, kind=kind: linear_registry.product_difference(  # type: ignore[misc]
                kind, device, dtype
            ),
        )
        for name, kind in (("int8", INT8), ("float8", FLOAT8))
    ),
    *(
        FastPath(
            f"products in {name}",
            lambda device, _, name=name: _why_no_kitchen(name, device),  # type: ignore[misc]
        )
        for name in kitchen.NEEDS
    ),
    FastPath("VAE, between convolutions", _triton("the VAE"), strip_registry.difference),
)


def section(device: torch.device, dtype: torch.dtype, on_progress: OnProgress | None = None) -> Section:
    """The section for a device and the dtype that models compute in; tests every path that may run."""
    findings = []
    for done, path in enumerate(FAST_PATHS):
        if on_progress is not None:
            on_progress(f"Testing {path.name}", done, len(FAST_PATHS))
        findings.append(examine(path, device, dtype))
    attention = fastest_attention(device)
    which = "PyTorch's" if attention.__name__ == "sdpa" else "PyTorch's, cuDNN's version first"  # type: ignore[attr-defined]
    findings.append(Finding("attention otherwise", which))
    title = f"Fast paths on {device.type.upper()}, {str(dtype).removeprefix('torch.')}"
    return Section(title, findings)


def examine(path: FastPath, device: torch.device, dtype: torch.dtype) -> Finding:
    """One fast path: on, with its error and the time its test took, or why not."""
    try:
        reason = backend.why_no_gpu(device) or path.limit(device, dtype)
    except FAULTS as error:
        return Finding(path.name, f"NO: {sentence(error)}", broken=True, facts={"on": False})
    if reason is not None:
        return Finding(path.name, f"no: {reason}", facts={"on": False, "why": reason})
    if path.difference is None:
        return Finding(path.name, "yes", facts={"on": True})
    difference, start = path.difference, time.perf_counter()
    apart, fault = backend.self_tested(lambda: difference(device, dtype))
    seconds = time.perf_counter() - start
    facts = {"on": fault is None, "error": apart, "limit": backend.SELF_TEST_LIMIT, "seconds": seconds}
    if fault is not None:
        return Finding(path.name, f"NO: {fault}", broken=True, facts=facts)
    text = f"yes, self-test {apart:.1e} of {backend.SELF_TEST_LIMIT:.0e} allowed, {seconds:.1f} s"
    return Finding(path.name, text, facts=facts)
