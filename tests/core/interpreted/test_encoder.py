"""The whole encoder on the Triton backend, and the self-test that lets it be chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_core.encoder import GptOssEncoder, PrefixCache, encode_prompts
from lens_core.kernels import backend, choose, eager, registry
from lens_core.kernels.triton import launch
from lens_core.loading import load_encoder
from tests.compare import per_token_l2

CPU, HALF = torch.device("cpu"), torch.float16


@pytest.fixture(autouse=True)
def _nothing_remembered():
    def forget() -> None:
        for cached in (registry.triton_kernels, registry._self_test, registry._say_once):
            cached.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def encoder(tiny_folder: Path) -> GptOssEncoder:
    return load_encoder(tiny_folder, HALF)[0]


def encode(encoder: GptOssEncoder, cache: PrefixCache | None = None) -> list[Tensor]:
    # Two layers: one sliding, one not. Over more of them near-ties send single tokens to other experts.
    tails = [list(range(3, 40)), [7]]
    return encode_prompts(encoder, range(20), tails, CPU, HALF, captured=(0, 1), cache=cache)


def test_features_equal_the_definitions(encoder: GptOssEncoder, monkeypatch: pytest.MonkeyPatch):
    """And a first run, which computes the prefix, gives the same bits as later ones."""
    cache = PrefixCache()
    got = encode(encoder, cache)
    assert all(map(torch.equal, got, encode(encoder, cache)))
    assert choose(CPU, HALF, encoder.experts[0].bank(), encoder.largest_scale()).name == "triton"
    monkeypatch.setattr("lens_core.kernels.choose", lambda *_: registry.EAGER)
    for one, want in zip(got, encode(encoder), strict=True):
        # fp16 rounds by 2e-4 in the mean, some 20 times in a layer; single tokens may take other experts.
        assert per_token_l2(one, want).median() < 2e-3


@pytest.mark.parametrize(("form", "dtype"), [("mxfp4", torch.bfloat16), ("nvfp4", torch.float16)])
def test_the_self_test_passes(form: str, dtype: torch.dtype):
    # The interpreter cuts fp32 to bf16 instead of rounding it, which attention adds up.
    limit = backend.SELF_TEST_LIMIT * (1 if dtype == torch.float16 else 2)
    assert registry.difference(CPU, dtype, form, 8) < limit


def wrong(name: str) -> Callable[..., Any]:
    """The operation, slightly off."""
    right = getattr(eager, name)

    def operation(*args: Any) -> Any:
        result = right(*args)
        if isinstance(result, Tensor):
            return result * 1.03
        if name == "route":
            return result[0].flip(-1), result[1]
        return result[0], None if result[1] is None else result[1] * 1.03

    return operation


def nothing(name: str) -> Callable[..., Any]:
    """The operation, all NaN."""
    right = getattr(eager, name)

    def operation(*args: Any) -> Any:
        result = right(*args)
        if isinstance(result, Tensor):
            return result * float("nan")
        return result[0], None if result[1] is None else result[1] * float("nan")

    return operation


def refusing(name: str) -> Callable[..., Any]:
    def operation(*_: Any) -> Any:
        raise RuntimeError("no C compiler")

    return operation


@pytest.mark.parametrize(
    ("operation", "mistake", "said"),
    [
        *((operation, wrong, "differs") for operation in ("add_norm", "attention", "route", "experts")),
        ("add_norm", nothing, "differs from PyTorch by inf"),
        ("experts", nothing, "differs from PyTorch by inf"),
        ("experts", refusing, "RuntimeError: no C compiler"),
    ],
)
def test_a_kernel_that_fails_its_self_test_is_not_used(
    operation: str, mistake: Callable, said: str, monkeypatch: pytest.MonkeyPatch
):
    bank = registry.random_bank(8, 64, 64, "mxfp4", torch.Generator(), CPU)
    monkeypatch.setattr(backend, "interpreted", lambda: False)  # where it would not be tested
    for other in ("add_norm", "attention", "route", "experts"):  # the right ones quickly
        monkeypatch.setattr(launch, other, getattr(eager, other))
    assert registry.why_not_triton(CPU, HALF, bank) is None
    registry.triton_kernels.cache_clear()
    registry._self_test.cache_clear()
    monkeypatch.setattr(launch, operation, mistake(operation))
    reason = registry.why_not_triton(CPU, HALF, bank)
    assert reason is not None and said in reason
