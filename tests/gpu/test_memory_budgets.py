"""Whole pictures under ComfyUI's memory manager on cards with little memory.

Enforced, the allocator gets no byte more; told to ComfyUI as --reserve-vram does. Always the picture that a
card with room for everything draws.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lens_core.denoiser.modulation import modulation_bytes
from tests.gpu.conftest import allocated

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
GB, GIB = 10**9, 1 << 30
PROMPT = " ".join(f"word{index}" for index in range(24))
ROUNDS = 50


@dataclass(frozen=True)
class Case:
    """A card's memory and what is drawn on it; ``peak``: bytes that may be reserved at most; ``whole``: which
    of encoder and denoiser (without modulation) are resident when they have worked."""

    memory: float
    size: int
    mode: str
    placement: str
    peak: float
    whole: tuple[bool, bool] = (False, True)
    steps: int = 4
    cfg: float = 1.0


CASES = {
    "24 GB, 1440, bf16, 20 steps": Case(24 * GB, 1440, "none", "gpu", 22.5 * GB, (True, True), 20, 5.0),
    "12 GB, 1440, bf16": Case(12 * GIB, 1440, "none", "auto", 12 * GIB, (True, True)),
    "6.5 GB, 1440, 8-bit": Case(6.5 * GB, 1440, "int8_dynamic", "stream", 6.5 * GB),
    "4 GB, 1024, 4-bit": Case(4 * GB, 1024, "uint4_sdnq", "stream", 4 * GB),
}


class Card:
    """All models of a case, and what a picture of them takes."""

    def __init__(self, comfy, models: Path, case: Case) -> None:
        self.comfy, self.case = comfy, case
        path = models / "text_encoders" / "gpt_oss_20b_mxfp4.safetensors"
        self.clip = comfy.load_clip(path, remember=False, placement=case.placement)
        path = models / "diffusion_models" / "lens_turbo_bf16.safetensors"
        self.model, _ = comfy.load_model(path, torch.bfloat16, case.mode, disable_dynamic=True)
        self.vae = comfy.load_vae(models / "vae" / "flux2-vae.safetensors")

    @torch.inference_mode()
    def draw(self) -> Tensor:
        """The picture [1, H, W, 3], from nothing on the GPU."""
        case, comfy = self.case, self.comfy
        (text, extra), *_ = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(PROMPT))
        encoder = self.clip.patcher
        whole = [encoder.loaded_size() == encoder.model_size()]
        latent = comfy.empty_latent(case.size, case.size, 1)
        settings = {"seed": 1, "steps": case.steps, "cfg": case.cfg, "noise": "host", "denoise": 1.0}
        result = comfy.sample(self.model, [[text, extra]], [[text[:, :0], extra]], latent, **settings)
        steps = self.model.model_size() - modulation_bytes(self.model.model.diffusion_model)
        self.whole = (*whole, self.model.loaded_size() >= steps)
        return comfy.decode(result, self.vae).cpu()

    def clear(self) -> None:
        """What an unload request does; cast buffers ComfyUI gives back after every node."""
        self.comfy.management.unload_all_models()
        self.comfy.management.reset_cast_buffers()
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(params=CASES, ids=list(CASES))
def card(request, comfy, full_models: Path) -> Iterator[Card]:
    comfy.management.unload_all_models()
    card = Card(comfy, full_models, CASES[request.param])
    yield card
    card.clear()


def enforce(comfy, monkeypatch: pytest.MonkeyPatch, memory: float | None) -> None:
    """As if the card had so much."""
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if memory is None else memory / total, CUDA)
    if memory is not None:
        left = comfy.management.get_free_memory(CUDA) - memory
        monkeypatch.setattr(comfy.management, "EXTRA_RESERVED_VRAM", left)


def test_a_card_with_little_memory_draws_the_same(card: Card, comfy, monkeypatch, caplog):
    want = card.draw()
    card.clear()
    before = allocated()
    torch.cuda.reset_peak_memory_stats(CUDA)
    enforce(comfy, monkeypatch, card.case.memory)
    caplog.set_level(logging.INFO)
    try:
        got = card.draw()
    finally:
        enforce(comfy, monkeypatch, None)
    peaks = torch.cuda.max_memory_allocated(CUDA), torch.cuda.max_memory_reserved(CUDA)
    resident = card.clip.patcher.loaded_size(), card.model.loaded_size()
    print(
        f"peak {peaks[0] / GB:.2f} GB allocated, {peaks[1] / GB:.2f} GB reserved; now resident: encoder "
        f"{resident[0] / GB:.2f}, denoiser {resident[1] / GB:.2f} GB"
    )
    assert torch.equal(got, want)
    assert card.whole == card.case.whole
    assert peaks[1] <= card.case.peak
    assert "Out of memory" not in caplog.text
    card.clear()
    assert allocated() - before < 50 << 20


def test_rounds_of_swapping_and_evicting_leave_nothing(comfy, full_models: Path):
    """Two checkpoints in turn, each drawn with and let go: nothing grows once all is warm."""
    cards = [
        Card(comfy, full_models, Case(0, 512, mode, "stream", 0, steps=2))
        for mode in ("int8_dynamic", "uint4_sdnq")
    ]
    seen, pictures = [], []
    for number in range(ROUNDS):
        card = cards[number % 2]
        pictures.append(card.draw())
        comfy.management.free_memory(1e30, CUDA)
        comfy.management.soft_empty_cache()
        seen.append((allocated(), torch.cuda.memory_reserved(CUDA)))
    print([f"{value / 1e6:.1f} MB" for value in (*seen[3], *seen[-1])])
    assert all(torch.equal(picture, pictures[number % 2]) for number, picture in enumerate(pictures))
    assert max(seen[4:]) <= seen[3]
