"""FlashAttention-3 for the denoiser's attention, where the user chose it and has fetched it beforehand.

The compiled kernel is ``kernels-community/flash-attn3`` on the Hugging Face hub, loaded by the package
``kernels``. That package downloads what it is asked for by name, so it is only handed a folder that lies in
the cache already: nothing here reaches the network. The folder is looked for by the repository alone,
because ``kernels`` downloads a version by its commit and leaves no trace of the version in the cache.

Checked with kernels 0.14.1, 0.15.2, 0.16.2 and 0.17.2; older ones also want the kernel's module name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend

REPOSITORY, VERSION = "kernels-community/flash-attn3", 1
OLDEST_PACKAGE = (0, 14)
# Run once; it fetches the one build that fits the PyTorch that runs it.
FETCH = f"python -c \"import kernels; kernels.get_kernel('{REPOSITORY}', version={VERSION})\""

# The kernel has code for Ampere and Ada (8.x) and for Hopper (9.0), and none for what came after.
OLDEST_GPU, NEWEST_GPU = (8, 0), (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD, HEAD_STEP = 256, 8


def flash3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention over q [B, heads, Tq, D] and k, v [B, heads, Tk, D] -> [B, Tq, heads * D].

    Only for where ``why_not`` has no objection. The kernel wants [B, T, heads, D] and takes any strides
    but the last, so the denoiser's transposed views go in as they lie in memory.
    """
    assert mask is None, "FlashAttention-3 takes no mask"
    out = _kernel()(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    if isinstance(out, tuple):  # early builds return the logarithms of the sums too
        out = out[0]
    return out.flatten(2)


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, mask: Tensor | None) -> str | None:
    """The first limit that is not met, or what its self-test said, in words; None where it can run.

    It looks at the disk, so ask once for each run and not at each attention.
    """
    return limit(device, dtype, head_dim, mask) or _self_test(str(device), dtype, head_dim)


def limit(device: torch.device, dtype: torch.dtype, head_dim: int, mask: Tensor | None) -> str | None:
    """The first limit that is not met, in words; None where all are."""
    if mask is not None:
        return "prompts of different lengths need a mask, and it takes none"
    if dtype not in DTYPES:
        return f"the denoiser computes in {str(dtype).removeprefix('torch.')}, and it takes 16-bit floats"
    if device.type != "cuda" or torch.version.hip is not None:
        return "it runs on NVIDIA GPUs alone"
    capability = torch.cuda.get_device_capability(device)
    if not OLDEST_GPU <= capability <= NEWEST_GPU:
        return f"this GPU has compute capability {_dotted(capability)}, and it takes 8.0 to 9.0"
    if head_dim > LARGEST_HEAD or head_dim % HEAD_STEP:
        return f"a head has {head_dim} channels, and it takes multiples of {HEAD_STEP} up to {LARGEST_HEAD}"
    return _why_no_kernel()


def _why_no_kernel() -> str | None:
    """What is missing on this computer, and the commands that bring it; None if all is there."""
    package = next(iter(metadata.distributions(name="kernels")), None)
    if package is None:
        return f"the package kernels is not installed (pip install kernels, then once: {FETCH})"
    if tuple(int(part) for part in package.version.split(".")[:2]) < OLDEST_PACKAGE:
        needed = _dotted(OLDEST_PACKAGE)
        return f"the package kernels is {package.version}, and {needed} is needed (pip install -U kernels)"
    if _snapshot() is None:
        return f"{REPOSITORY} is not in {_cache()} (once: {FETCH})"
    return None


def _cache() -> Path:
    """Where ``kernels`` keeps what it downloaded."""
    from huggingface_hub import constants

    return Path(os.environ.get("KERNELS_CACHE") or constants.HF_HUB_CACHE)


def _snapshot() -> Path | None:
    """The folder of the last revision that was downloaded, or None."""
    builds = _cache().glob(f"kernels--{REPOSITORY.replace('/', '--')}/snapshots/*/build")
    last = max(builds, key=lambda build: build.stat().st_mtime, default=None)
    return None if last is None else last.parent


@cache
def _kernel() -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """``flash_attn_func`` of the build that fits this PyTorch, from the cache."""
    from kernels import get_local_kernel

    return get_local_kernel(_snapshot()).flash_attn_func


@cache
def _self_test(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Load the kernel and run it once; None where it agrees with PyTorch, else what happened."""
    reason = backend.self_test(lambda: difference(torch.device(device), dtype, head_dim))
    # A changed PyTorch needs another build, which the cache may not hold.
    return None if reason is None else f"{reason}; if PyTorch has changed, fetch it again: {FETCH}"


def difference(device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """Relative L2 to PyTorch's attention on random q, k, v in the denoiser's layout."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, tokens, 3, head_dim, generator=generator).to(device, dtype).transpose(1, 2)
        for tokens in (200, 300, 300)
    )
    want = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return backend.apart(flash3(q, k, v), want.transpose(1, 2).flatten(2))


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
