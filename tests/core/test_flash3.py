"""FlashAttention-3: its limits in words, the cached kernel alone is loaded, and what it is handed.

The package and the kernel are stand-ins; the kernel computes plain attention in the layout of the real one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lens_core.kernels import flash3 as module
from lens_core.kernels.flash3 import FETCH, flash3, why_not
from lens_core.ops import Attention, sdpa

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v and result [B, T, heads, D], as the kernel has them."""
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[2:] == k.shape[2:] == v.shape[2:] and k.shape[1] == v.shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def forget() -> None:
    module._kernel.cache_clear()
    module._self_test.cache_clear()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A computer that meets every limit. ``version`` and ``kernel`` can be set; ``loaded`` lists folders."""
    state = SimpleNamespace(version="0.17.2", kernel=plain, loaded=[], hub=tmp_path, capability=(9, 0))

    def distributions(name: str) -> list[Any]:
        assert name == "kernels"
        return [] if state.version is None else [SimpleNamespace(version=state.version)]

    def get_local_kernel(folder: Path) -> Any:
        state.loaded.append(folder)
        return SimpleNamespace(flash_attn_func=state.kernel)

    package: Any = ModuleType("kernels")
    package.get_local_kernel = get_local_kernel
    monkeypatch.setitem(sys.modules, "kernels", package)
    monkeypatch.setattr(module.metadata, "distributions", distributions)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: state.capability)
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    difference = module.difference
    monkeypatch.setattr(module, "difference", lambda _, dtype, head_dim: difference(CPU, dtype, head_dim))
    cached(tmp_path, "one")
    forget()
    yield state
    forget()


def cached(hub: Path, commit: str, age: float = 0) -> Path:
    """A snapshot of the kernel's repository in the cache ``hub``, downloaded ``age`` seconds ago."""
    snapshot = hub / "kernels--kernels-community--flash-attn3" / "snapshots" / commit
    build = snapshot / "build"
    build.joinpath("torch211-cxx11-cu130-x86_64-linux").mkdir(parents=True)
    os.utime(build, (1e9 - age, 1e9 - age))
    return snapshot


def denoiser_heads(tokens: int, heads: int, dim: int) -> Tensor:
    """[B, heads, T, D] as the denoiser's blocks make it: a view of [B, T, heads, D]."""
    return torch.randn(2, tokens, heads, dim).transpose(1, 2)


def test_nothing_to_say_where_every_limit_is_met(here: SimpleNamespace):
    assert why_not(CUDA, BF16, 64, None) is None
    assert why_not(CUDA, torch.float16, 256, None) is None


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        (CUDA, torch.float32, 64, "the denoiser computes in float32, and it takes 16-bit floats"),
        (CPU, BF16, 64, "it runs on NVIDIA GPUs alone"),
        (CUDA, BF16, 264, "a head has 264 channels, and it takes multiples of 8 up to 256"),
        (CUDA, BF16, 60, "a head has 60 channels, and it takes multiples of 8 up to 256"),
    ],
)
def test_limits(here: SimpleNamespace, device: torch.device, dtype: torch.dtype, head_dim: int, reason: str):
    assert why_not(device, dtype, head_dim, None) == reason
    assert here.loaded == []


def test_it_takes_no_mask(here: SimpleNamespace):
    mask = torch.zeros(2, 1, 1, 7)
    reason = "prompts of different lengths need a mask, and it takes none"
    assert why_not(CUDA, BF16, 64, mask) == reason
    q = denoiser_heads(7, 2, 8)
    with pytest.raises(AssertionError, match="no mask"):
        flash3(q, q, q, mask)


def test_amds_gpus_are_not_meant(here: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert why_not(CUDA, BF16, 64, None) == "it runs on NVIDIA GPUs alone"


@pytest.mark.parametrize("capability", [(7, 5), (10, 0), (12, 0)])
def test_gpus_before_and_after(here: SimpleNamespace, capability: tuple[int, int]):
    here.capability = capability
    dotted = ".".join(map(str, capability))
    reason = f"this GPU has compute capability {dotted}, and it takes 8.0 to 9.0"
    assert why_not(CUDA, BF16, 64, None) == reason


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_gpus_that_the_kernel_has_code_for(here: SimpleNamespace, capability: tuple[int, int]):
    here.capability = capability
    assert why_not(CUDA, BF16, 64, None) is None


def test_without_the_package(here: SimpleNamespace):
    here.version = None
    reason = f"the package kernels is not installed (pip install kernels, then once: {FETCH})"
    assert why_not(CUDA, BF16, 64, None) == reason


@pytest.mark.parametrize(("version", "accepted"), [("0.9.0", False), ("0.13.0", False), ("1.0.dev0", True)])
def test_the_packages_version(here: SimpleNamespace, version: str, accepted: bool):
    here.version = version
    reason = f"the package kernels is {version}, and 0.14 is needed (pip install -U kernels)"
    assert why_not(CUDA, BF16, 64, None) == (None if accepted else reason)


def test_a_kernel_that_was_not_fetched(here: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    empty = here.hub / "empty"
    monkeypatch.setenv("KERNELS_CACHE", str(empty))
    reason = f"kernels-community/flash-attn3 is not in {empty} (once: {FETCH})"
    assert why_not(CUDA, BF16, 64, None) == reason
    assert here.loaded == []


def test_the_hubs_own_cache_where_kernels_has_none(here: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("KERNELS_CACHE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here.hub))
    assert why_not(CUDA, BF16, 64, None) is None


def test_the_last_download_is_loaded_once(here: SimpleNamespace):
    last = cached(here.hub, "two", age=-60)
    cached(here.hub, "three", age=60)
    os.utime(here.hub.joinpath("kernels--kernels-community--flash-attn3/snapshots/one/build"), (1e9, 1e9))
    q = denoiser_heads(5, 2, 8)
    for _ in range(2):
        assert why_not(CUDA, BF16, 64, None) is None
        flash3(q, q, q)
    assert here.loaded == [last]


@pytest.mark.parametrize("tuples", [False, True], ids=["tensor", "tuple"])
def test_it_is_attention_in_the_denoisers_layout(here: SimpleNamespace, tuples: bool):
    seen: list[Tensor] = []

    def kernel(*qkv: Tensor) -> Any:
        seen.extend(qkv)
        return (plain(*qkv), torch.zeros(())) if tuples else plain(*qkv)

    here.kernel = kernel
    attention: Attention = flash3
    q, k, v = denoiser_heads(37, 24, 64), denoiser_heads(50, 24, 64), denoiser_heads(50, 24, 64)
    got = attention(q, k, v, None)
    assert got.shape == (2, 37, 24 * 64)
    torch.testing.assert_close(got, sdpa(q, k, v))
    assert [tensor.data_ptr() for tensor in seen] == [tensor.data_ptr() for tensor in (q, k, v)]
    assert all(tensor.is_contiguous() for tensor in seen)


def test_a_build_that_does_not_load(here: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    def fail(_: Path) -> Any:
        raise FileNotFoundError("Cannot find a build variant for this system in one:" + "x" * 999)

    monkeypatch.setattr(sys.modules["kernels"], "get_local_kernel", fail, raising=False)
    reason = why_not(CUDA, BF16, 64, None)
    assert reason is not None and len(reason) < 500
    assert reason.startswith("the self-test failed (FileNotFoundError: Cannot find a build variant for")
    assert reason.endswith(f"; if PyTorch has changed, fetch it again: {FETCH}")


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_kernel_that_is_wrong_here(here: SimpleNamespace, factor: float):
    here.kernel = lambda q, k, v: plain(q, k, v) * factor
    reason = why_not(CUDA, BF16, 64, None)
    assert reason is not None and reason.startswith("the self-test differs from PyTorch by ")


def test_a_kernel_that_takes_the_layout_of_pytorch_is_wrong(here: SimpleNamespace):
    here.kernel = F.scaled_dot_product_attention
    assert why_not(CUDA, BF16, 64, None) is not None


def test_the_self_test_runs_once_for_each_dtype_and_size(
    here: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    ran = []
    monkeypatch.setattr(module, "difference", lambda *call: ran.append(call) or 0.0)
    for dtype, head_dim in ((BF16, 64), (BF16, 64), (torch.float16, 64), (BF16, 128)):
        assert why_not(CUDA, dtype, head_dim, None) is None
    assert ran == [(CUDA, BF16, 64), (CUDA, torch.float16, 64), (CUDA, BF16, 128)]
