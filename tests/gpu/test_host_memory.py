"""The encoder and the denoiser under ComfyUI's memory manager, in this process: what another model's load
takes back, and what stays off a small GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
import torch

from lens_core.config import is_modulation
from tests.gpu.conftest import allocated

PACK = Path(__file__).parents[2]
WARM, ROUNDS = 10, 100
pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


@pytest.fixture
def clip(comfy, full_models: Path):
    comfy.management.unload_all_models()
    path = full_models / "text_encoders" / "gpt_oss_20b_mxfp4.safetensors"
    yield comfy.load_clip(path, remember=False)
    comfy.management.unload_all_models()


def encode(clip, text: str = "a red fox in the snow"):
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]


def other_model(comfy, size: int):
    """Any model of ``size`` bytes, in ComfyUI's own patcher."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
    return comfy.patcher(module, load_device=CUDA, offload_device=torch.device("cpu"))


def test_another_models_load_evicts_the_encoder(comfy, clip, monkeypatch: pytest.MonkeyPatch):
    """On a card with room for one of them: a model that needs some of the encoder's memory takes that, one
    that needs all takes all; again and again."""
    some, most = (other_model(comfy, size << 30) for size in (8, 13))
    free = comfy.management.get_free_memory(CUDA)
    monkeypatch.setattr(comfy.management, "EXTRA_RESERVED_VRAM", free - (15 << 30))
    want = encode(clip)  # the first products take their workspace, which stays
    comfy.management.free_memory(1e30, CUDA)
    before = allocated()
    assert torch.equal(encode(clip), want)
    for _ in range(3):
        assert clip.patcher.loaded_size() == clip.patcher.model_size()
        comfy.management.load_models_gpu([some])
        kept = clip.patcher.loaded_size()
        assert 0 < kept < 7 << 30
        assert allocated() - before - some.loaded_size() < kept + (50 << 20)
        comfy.management.load_models_gpu([most])
        assert clip.patcher.loaded_size() == 0
        assert allocated() - before - some.loaded_size() - most.loaded_size() < 50 << 20
        assert torch.equal(encode(clip), want)
    comfy.management.free_memory(1e30, CUDA)
    assert allocated() - before < 50 << 20


@pytest.mark.parametrize("left", [3, 6, 9])
def test_encodes_in_what_is_left(comfy, clip, monkeypatch: pytest.MonkeyPatch, left: int):
    """With a few GB for everything: the same features, and never more memory than that."""
    want = encode(clip)
    comfy.management.free_memory(1e30, CUDA)
    free = comfy.management.get_free_memory(CUDA)
    monkeypatch.setattr(comfy.management, "EXTRA_RESERVED_VRAM", free - (left << 30))
    before = allocated()
    torch.cuda.reset_peak_memory_stats(CUDA)
    assert torch.equal(encode(clip), want)
    peak = torch.cuda.max_memory_allocated(CUDA) - before
    print(f"{left} GB left: {clip.patcher.loaded_size() / 1e9:.2f} GB resident, peak {peak / 1e9:.2f} GB")
    assert peak < left << 30


@pytest.mark.parametrize("placement", ["gpu", "stream"])
def test_placements(comfy, full_models: Path, clip, placement: str):
    want = encode(clip)
    path = full_models / "text_encoders" / "gpt_oss_20b_mxfp4.safetensors"
    other = comfy.load_clip(path, remember=False, placement=placement)
    assert torch.equal(encode(other), want)
    assert other.patcher.loaded_size() == (other.patcher.model_size() if placement == "gpu" else 0)


def test_a_hundred_rounds_leave_nothing_behind(comfy, clip):
    """Load, encode, evict: neither memory grows by more than 1 % once all is warm: 2 GB of the layers are
    page-locked in each of the first loads, until all that fits beside the mapped file are."""
    process = psutil.Process()
    seen = []
    for _ in range(ROUNDS):
        encode(clip)
        comfy.management.free_memory(1e30, CUDA)
        comfy.management.soft_empty_cache()
        assert clip.patcher.loaded_size() == 0
        seen.append((allocated(), torch.cuda.memory_reserved(CUDA), process.memory_info().rss))
    for name, first, last in zip(("allocated", "reserved", "RSS"), seen[WARM - 1], seen[-1], strict=True):
        print(f"{name}: {first / 1e6:.1f} MB after round {WARM}, {last / 1e6:.1f} MB after round {ROUNDS}")
        assert last <= 1.01 * first


def test_loading_takes_no_second_copy_in_ram(full_models: Path):
    """Peak resident set of a process that opens, reads and places the encoder: the file, mapped, once."""
    path = full_models / "text_encoders" / "gpt_oss_20b_mxfp4.safetensors"
    code = f"""
import math, sys, torch
sys.path.insert(0, {str(PACK)!r})
from lens_core.loading import open_encoder
from lens_core.text_encoder import TextEncoder
torch.zeros(1, device="cuda")
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
before = peak()
text = TextEncoder(open_encoder({str(path)!r}), torch.bfloat16)
text.load(torch.device("cuda", 0), math.inf)
text.encode([[1, 2] + [text.file.tokenizer.tokenizer.token_to_id("<|message|>")] * 3 + [5] * 40],
            torch.device("cuda", 0))
print(peak() - before)
"""
    import subprocess

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    used, size = int(result.stdout.split()[-1]), path.stat().st_size
    print(f"{used / 1e9:.2f} GB of RAM for a file of {size / 1e9:.2f} GB")
    assert used <= 1.1 * size


def test_modulation_stays_off_a_small_gpu(comfy, full_models: Path, monkeypatch: pytest.MonkeyPatch):
    """With 6.4 GB, of which ComfyUI keeps 0.9 for computing and two linears for streaming: all the other
    weights of the denoiser are on the GPU, the modulation's are not."""
    management = comfy.management
    management.unload_all_models()
    path = full_models / "diffusion_models" / "lens_turbo_bf16.safetensors"
    model, _ = comfy.load_model(path, torch.bfloat16, disable_dynamic=True)
    weights = dict(model.model.diffusion_model.named_parameters())
    others = {name for name in weights if not is_modulation(name.rpartition(".")[0])}
    room = sum(weights[name].nbytes for name in others)
    linear = (model.model_size() - room) / 96
    computing = management.minimum_inference_memory() - management.extra_reserved_memory()
    left = room + (management.NUM_STREAMS + 0.5) * linear + computing
    monkeypatch.setattr(management, "EXTRA_RESERVED_VRAM", management.get_free_memory(CUDA) - left)
    management.load_models_gpu([model])
    weights = dict(model.model.diffusion_model.named_parameters())
    on_gpu = {name for name, weight in weights.items() if weight.is_cuda}
    print(f"{left / 1e9:.2f} GB left: {model.loaded_size() / 1e9:.2f} GB resident")
    assert on_gpu == others
    management.unload_all_models()
