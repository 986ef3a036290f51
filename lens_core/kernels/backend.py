"""What every set of kernels asks before it runs: whether Triton can, and whether its results are right."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

# bf16 keeps 8 bits, so two paths that round at the same places differ by about 2^-9 = 2e-3.
SELF_TEST_LIMIT = 1e-2


def interpreted() -> bool:
    """Triton's interpreter runs the kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_no_gpu(device: torch.device) -> str | None:
    """Why no kernels of ours run on ``device``, in words; None where they may."""
    if device.type == "cuda" or interpreted():
        return None
    return f"there is no GPU for it, {device.type.upper()} computes"


def why_no_triton(device: torch.device, dtype: torch.dtype, part: str) -> str | None:
    """The first limit of all our Triton kernels that is not met, in words; None where all are.

    ``part`` is what would run, as the start of a sentence.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{part} computes in {str(dtype).removeprefix('torch.')}, and they take 16-bit floats"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (Linux: it comes with PyTorch; Windows: pip install triton-windows)"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"this GPU has compute capability {capability[0]}.{capability[1]}, and they need 8.0"
    return None


def why_no_float8(device: torch.device) -> str | None:
    """Why a GPU has no conversion to float8_e4m3fn and no products of it, in words; None where it has."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "8-bit floats are multiplied on NVIDIA's GPUs alone"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"this GPU has compute capability {capability[0]}.{capability[1]}, and 8-bit floats need 8.9"
    return None


def self_test(difference: Callable[[], float]) -> str | None:
    """Run ``difference``, a relative L2 between two backends; None where it is small, else what happened."""
    return self_tested(difference)[1]


def self_tested(difference: Callable[[], float]) -> tuple[float | None, str | None]:
    """The difference (None: there was none to be had) and what ``self_test`` says of it."""
    try:
        error = difference()
    except Exception as problem:  # noqa: BLE001  a missing C compiler, driver or header has many types
        return None, f"the self-test failed ({type(problem).__name__}: {str(problem).strip()[:200]})"
    if error < SELF_TEST_LIMIT:
        return error, None
    return error, f"the self-test differs from PyTorch by {error:.1e}"


def apart(got: tuple[Tensor | None, ...] | Tensor, want: tuple[Tensor | None, ...] | Tensor) -> float:
    """Relative L2 of two results, the largest if they are several; infinite where one has NaN."""
    if isinstance(got, Tensor) and isinstance(want, Tensor):
        error = (got.double() - want.double()).norm() / want.double().norm()
        return error.nan_to_num(nan=float("inf")).item()
    return max(apart(a, b) for a, b in zip(got, want, strict=True) if a is not None and b is not None)
