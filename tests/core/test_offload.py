"""Pictures under every plan: the same bits, wherever the weights lie.

torch.device("cpu:0") stands for a GPU: it is not equal to "cpu", where the masters are, so weights are copied
there as they would be, only in line.
"""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_core import needs, residence
from lens_core.memory.plan import OFFLOADS, Plan
from lens_core.memory.recovery import OutOfMemory
from lens_core.needs import Picture
from lens_core.pipeline import LensPipeline
from lens_core.vae import LensVAE

GPU, SIZE, PROMPT = torch.device("cpu:0"), (64, 96), "a red circle"
SETTINGS: dict[str, Any] = {"size": SIZE, "steps": 3, "cfg": 5.0, "negative": "a green image"}


def pipeline_on(folder: Path, device: torch.device = GPU, **options: Any) -> LensPipeline:
    return LensPipeline.from_folder(folder, device, torch.float32, **options)


def draw(pipeline: LensPipeline, prompt: str = PROMPT, **settings: Any) -> Tensor:
    noise = pipeline.noise(3, 1, SIZE)
    return pipeline(prompt, noise=noise, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def want(tiny_folder: Path) -> Tensor:
    """The picture without any moving."""
    return draw(pipeline_on(tiny_folder, torch.device("cpu")))


def budget_for(folder: Path, share: float, **options: Any) -> float:
    """A share of the bytes between the smallest plan and everything resident, and what is never counted."""
    pipeline = pipeline_on(folder, **options)
    picture = Picture(*SIZE, 1, 60, 3)
    parts = pipeline.residence.components(picture)
    sizes = len(parts.encoder.layers), len(parts.denoiser.layers)
    smallest = Plan(0, 0, False, False, False).peak(parts)
    return smallest + share * (Plan(*sizes, True, True, True).peak(parts) - smallest)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_the_same_bits_in_every_mode(tiny_folder: Path, want: Tensor, offload: str):
    pipeline = pipeline_on(tiny_folder, offload=offload)
    for _ in range(2):
        assert torch.equal(draw(pipeline), want)
    loaded = pipeline.text.layers.loaded, pipeline.residence.places.loaded
    assert (loaded[0] > 0) == (offload in ("auto", "none"))
    assert (loaded[1] > 0) == (offload in ("auto", "none"))


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0, "denoiser streamed"),
        (0.3, "modulation streamed once, stays"),
        (1, "denoiser resident, modulation res"),
    ],
)
def test_the_same_bits_in_every_budget(
    tiny_folder: Path, want: Tensor, share: float, said: str, caplog, monkeypatch
):
    # A tiny model computes in more memory than it weighs; here the weights are to decide.
    monkeypatch.setattr(needs, "denoiser_bytes", lambda *_, **__: 0)
    monkeypatch.setattr(LensVAE, "decode_bytes", lambda *_: 0)
    monkeypatch.setattr(needs, "encoder_bytes", lambda *_: 0)
    monkeypatch.setattr(needs, "_LIBRARIES", 0)
    caplog.set_level(logging.INFO)
    pipeline = pipeline_on(tiny_folder, budget=budget_for(tiny_folder, share))
    assert torch.equal(draw(pipeline), want)
    assert said in caplog.text


@pytest.mark.parametrize("mode", ["int8_dynamic", "float8_weight_only", "int4_weight_only"])
def test_quantised_weights_are_streamed_too(tiny_folder: Path, want: Tensor, mode: str):
    plain = draw(pipeline_on(tiny_folder, torch.device("cpu"), quantization=mode))
    assert not torch.equal(plain, want)
    assert torch.equal(draw(pipeline_on(tiny_folder, quantization=mode, offload="stream")), plain)


def test_a_negative_by_attention_is_streamed_too(tiny_folder: Path):
    from lens_core.denoiser import NagOptions

    settings = {"cfg": 1.0, "nag": NagOptions(4.0)}
    plain = draw(pipeline_on(tiny_folder, torch.device("cpu")), **settings)
    assert torch.equal(draw(pipeline_on(tiny_folder, offload="stream"), **settings), plain)
    assert not torch.equal(draw(pipeline_on(tiny_folder), cfg=1.0), plain)


def test_another_batch_and_the_step_cache(tiny_folder: Path):
    from lens_core.denoiser import StepCacheOptions

    cached = {"step_cache": StepCacheOptions(threshold=0.5)}
    plain = draw(pipeline_on(tiny_folder, torch.device("cpu")), **cached)
    assert torch.equal(draw(pipeline_on(tiny_folder, offload="stream"), **cached), plain)


def test_prompts_to_come_are_encoded_while_the_encoder_is_there(tiny_folder: Path, monkeypatch):
    pipeline, loads = pipeline_on(tiny_folder, offload="model"), []
    load = pipeline.text.load
    monkeypatch.setattr(pipeline.text, "load", lambda *args: loads.append(1) or load(*args))
    prompts = [PROMPT, "a blue square", "two dots"]
    pictures = [draw(pipeline, prompt, later=prompts[i + 1 :]) for i, prompt in enumerate(prompts)]
    assert len(loads) == 4, "three prompts and the negative, before the first picture"
    alone = pipeline_on(tiny_folder)
    assert all(torch.equal(draw(alone, p), picture) for p, picture in zip(prompts, pictures, strict=True))
    assert set(pipeline._encoded) == {"a green image"}


def test_nothing_is_left_after_clearing(tiny_folder: Path):
    pipeline = pipeline_on(tiny_folder)
    home = dict(pipeline.denoiser.named_parameters())
    draw(pipeline)
    moved = [name for name, tensor in pipeline.denoiser.named_parameters() if tensor is not home[name]]
    assert len(moved) == len(home)
    pipeline.residence.clear()
    assert all(tensor is home[name] for name, tensor in pipeline.denoiser.named_parameters())
    assert pipeline.text.layers.loaded == pipeline.residence.places.loaded == 0


class Shortage:
    """Runs out of memory at the n-th call of a function, ``times`` times; what its frame held must be gone
    when the next attempt begins."""

    def __init__(self, function: Any, at: int, times: int) -> None:
        self.function, self.at, self.times = function, at, times
        self.calls = 0
        self.held: weakref.ref | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.held is not None:
            assert self.held() is None, "the failed attempt's tensors are still there"
        if self.times and self.calls % (self.at + 1) == 0:
            self.times, self.calls = self.times - 1, 0
            mine = torch.ones(3)
            self.held = weakref.ref(mine)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return self.function(*args, **kwargs)


def fail(monkeypatch: pytest.MonkeyPatch, pipeline: LensPipeline, where: str, times: int) -> None:
    """Have ``where`` run out of memory: "encode", "load", "step N" or "decode"."""
    kind, _, number = where.partition(" ")
    owner, name = {
        "encode": (pipeline.text, "encode"),
        "load": (pipeline.residence.places, "load"),
        "step": (pipeline, "velocity"),
        "decode": (pipeline.vae, "decode"),
    }[kind]
    monkeypatch.setattr(owner, name, Shortage(getattr(owner, name), int(number or 0), times))


PLACES = ["encode", "load", "step 0", "step 2", "decode"]


@pytest.mark.parametrize("where", PLACES)
def test_one_shortage_is_recovered_from(tiny_folder: Path, want: Tensor, monkeypatch, caplog, where: str):
    pipeline = pipeline_on(tiny_folder)
    steps: list[int] = []
    fail(monkeypatch, pipeline, where, times=1)
    assert torch.equal(draw(pipeline, on_step=lambda done, total: steps.append(done)), want)
    assert steps[-3:] == [1, 2, 3]
    assert "tried once more with less" in caplog.text
    assert pipeline.text.layers.loaded == 0, "the second attempt streams"
    monkeypatch.undo()
    assert torch.equal(draw(pipeline), want)


@pytest.mark.parametrize("where", ["encode", "load", "decode"])
def test_a_second_one_is_told(tiny_folder: Path, want: Tensor, monkeypatch, where: str):
    pipeline = pipeline_on(tiny_folder, budget=8e9)
    fail(monkeypatch, pipeline, where, times=2)
    with pytest.raises(OutOfMemory, match=r"GB are needed, 8\.00 GB are free.*--quant_transformer"):
        draw(pipeline)
    assert pipeline.text.layers.loaded == pipeline.residence.places.loaded == 0
    monkeypatch.undo()
    gc.collect()
    assert torch.equal(draw(pipeline), want)


def test_other_errors_pass_through(tiny_folder: Path, monkeypatch):
    pipeline = pipeline_on(tiny_folder)

    def broken(*args: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(pipeline.vae, "decode", broken)
    with pytest.raises(RuntimeError, match="something else"):
        draw(pipeline)


def test_a_budget_below_the_smallest_plan_is_told_before_anything_moves(tiny_folder: Path, monkeypatch):
    pipeline = pipeline_on(tiny_folder, budget=1000)
    monkeypatch.setattr(residence.Residence, "for_encoding", None)
    with pytest.raises(OutOfMemory, match=r"takes .* GB at least with --offload auto"):
        draw(pipeline)
