"""The command line's flags for speed, and what it does on a GPU without bfloat16."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_core import cli
from lens_core.denoiser import BlockGraphs, LensDenoiser, graph
from lens_core.images import read_settings
from lens_core.kernels import flash3
from lens_core.ops import flash3_or_sdpa, sdpa

FLAGS = ("--prompt", "a fox", "--height", 64, "--width", 48, "--steps", 2, "--cfg", 5, "--seed", 3)
FORWARDS, BLOCKS = 4, 3


@pytest.fixture
def generate(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command in fp32 on the CPU; returns its exit code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))

    def run(*flags: object, out: str = "out", dtype: str = "float32") -> int:
        given = ("--repo_id", tiny_folder, "--out", tmp_path / out, "--device", "cpu", "--dtype", dtype)
        return cli.main([str(argument) for argument in ("generate", *given, *FLAGS, *flags)])

    return run


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each forward of the denoiser is given by name."""
    seen: list[dict[str, Any]] = []
    forward = LensDenoiser.forward

    def spy(self: LensDenoiser, *arguments: Any, **named: Any) -> Tensor:
        seen.append(named)
        return forward(self, *arguments, **named)

    monkeypatch.setattr(LensDenoiser, "forward", spy)
    return seen


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """FlashAttention-3 can run, in fp32 too; shapes of what it is called with."""
    seen: list[torch.Size] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(q.shape)
        return sdpa(*(x.transpose(1, 2) for x in (q, k, v))).unflatten(-1, q.shape[2:])

    monkeypatch.setattr(flash3, "why_not", lambda *_: None)
    monkeypatch.setattr(flash3, "DTYPES", (torch.float32,))
    monkeypatch.setattr(flash3, "_kernel", lambda: kernel)
    return seen


def picture(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_without_flags(generate: Callable[..., int], given: list[dict[str, Any]], tmp_path: Path):
    assert generate() == 0
    assert [(call["attention"], call["graphs"]) for call in given] == FORWARDS * [(None, None)]
    assert "attention" not in read_settings(picture(tmp_path / "out"))


def test_cuda_graphs_on_a_cpu_are_one_line(
    generate: Callable[..., int],
    given: list[dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    """The same file, byte for byte: they leave no trace in its settings."""
    graph._say_once.cache_clear()
    caplog.set_level(logging.INFO)
    assert generate(out="plain") == generate("--cuda_graphs", out="graphs") == 0
    graphs = [call["graphs"] for call in given[FORWARDS:]]
    assert isinstance(graphs[0], BlockGraphs) and graphs == FORWARDS * [graphs[0]]
    assert caplog.text.count("denoiser runs without them: the model computes on the CPU.") == 1
    assert "CUDA graphs: 0 of 4 forwards played, 0 recorded." in caplog.text
    assert picture(tmp_path / "graphs").read_bytes() == picture(tmp_path / "plain").read_bytes()


def test_flash_attention_3(
    generate: Callable[..., int], given: list[dict[str, Any]], installed: list[torch.Size], tmp_path: Path
):
    assert generate("--attention", "flash_attn3") == 0
    assert [call["attention"] for call in given] == FORWARDS * [flash3_or_sdpa]
    assert len(installed) == FORWARDS * BLOCKS
    assert read_settings(picture(tmp_path / "out"))["attention"] == "flash_attn3"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("xformers", "--attention must be one of auto, flash_attn3, got xformers."),
        (
            "flash_attn3",
            "FlashAttention-3 cannot be used: it runs on NVIDIA GPUs alone. Set attention to auto, the "
            "fastest that is here.",
        ),
    ],
)
def test_an_attention_that_is_not_to_be_had(
    generate: Callable[..., int],
    given: list[dict[str, Any]],
    capsys: pytest.CaptureFixture,
    name: str,
    message: str,
):
    """Said before anything is loaded."""
    assert generate("--attention", name, dtype="bfloat16") == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert given == []


def test_flash_attention_3_or_pytorchs(installed: list[torch.Size]):
    """Under a mask, and in a dtype that it does not take."""
    q, k, v = (torch.randn(2, 3, tokens, 8) for tokens in (5, 7, 7))
    mask = torch.zeros(2, 1, 1, 7)
    mask[0, ..., 3:] = -1e30
    torch.testing.assert_close(flash3_or_sdpa(q, k, v), sdpa(q, k, v))
    assert len(installed) == 1
    assert torch.equal(flash3_or_sdpa(q, k, v, mask), sdpa(q, k, v, mask))
    assert torch.equal(
        flash3_or_sdpa(q.double(), k.double(), v.double()), sdpa(q.double(), k.double(), v.double())
    )
    assert len(installed) == 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """A CUDA GPU that has bfloat16, or imitates it as Turing does."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())

    def run(has: bool) -> None:
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation
        )

    return run


@pytest.mark.parametrize(
    ("device", "has", "asked", "want"),
    [
        ("cuda", True, "bfloat16", torch.bfloat16),
        ("cuda:1", False, "bfloat16", torch.float32),
        ("cuda", False, "float32", torch.float32),
        ("cpu", False, "bfloat16", torch.bfloat16),
    ],
)
def test_the_dtype_that_a_gpu_can_compute_in(
    gpu: Callable[[bool], None],
    caplog: pytest.LogCaptureFixture,
    device: str,
    has: bool,
    asked: str,
    want: torch.dtype,
):
    gpu(has)
    assert cli._dtype(argparse.Namespace(device=device, dtype=asked)) == want
    assert ("This GPU has no bfloat16" in caplog.text) == (_name(want) != asked)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def test_the_file_says_what_was_computed(
    generate: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And not what the flag said."""
    monkeypatch.setattr(cli, "_dtype", lambda _: torch.float32)
    assert generate(dtype="bfloat16") == 0
    assert read_settings(picture(tmp_path / "out"))["dtype"] == "float32"
