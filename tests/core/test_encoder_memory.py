"""Loading an encoder takes little more memory than its file, in every layout."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import encoder_files as files

ROOT = Path(__file__).parents[2]
MIB = 2**20
HIDDEN, EXPERTS, VOCABULARY = 1024, 16, 8000
# Each file is about 200 MB; a layer of 25 MiB of packed experts is 96 MiB in 16 bits.
LAYERS = {"original": 7, "nvfp4": 7, "nvfp4 rebundle": 7, "gguf": 7, "transformers": 2, "comfyui": 2}
# How far the peak may grow, in sizes of the file. The original layout stays mapped. Packed layouts leave
# a result of about the file's size and work on one expert (1 MiB here), or on pieces of 2 MiB that are 16
# when dequantised. Of 16 bits a quarter is left, 50 MiB; the rest is what quantising one expert takes (14
# bytes for each of 2 million numbers) and what malloc keeps of blocks this small. A source that stayed in
# memory would add 1.
LIMITS = {
    "original": 0.1,
    "nvfp4": 1.1,
    "nvfp4 rebundle": 1.1,
    "gguf": 1.1,
    "transformers": 0.8,
    "comfyui": 0.8,
}
# What the first use of torch's and gguf's code takes whatever the file: 12 MiB for GGUF files of 34, 87 and
# 192 MiB, which grow by 1.07 of their size beside it (8-bit attention becomes bf16).
ONCE = 24 * MIB

# Of each path it reads, a child of its own tells by how much loading that file grew it: what was imported
# before is imported once.
LOAD = """
import os, sys, torch
from pathlib import Path
from lens_core.encoder import GptOssEncoder
from lens_core.loading import open_encoder
torch.set_num_threads(1)

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024

def grown(path):
    file = open_encoder(path)
    encoder = GptOssEncoder(file.sizes, dtype=torch.bfloat16, device="meta")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    encoder = GptOssEncoder(file.config, dtype=torch.bfloat16, device="meta")
    file.load(encoder, torch.bfloat16)
    return status("VmHWM") - before

for line in sys.stdin:
    if os.fork() == 0:
        print(grown(line.rstrip()), flush=True)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.wait()[1]):
        print("failed", flush=True)
"""


@pytest.fixture(scope="module")
def loader() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", LOAD]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        yield process


@cache
def weights(layers: int) -> dict[str, Tensor]:
    """An encoder with random bytes; 128 rows of attention are enough."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16)

    result = {"model.embed_tokens.weight": noise(VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("q", "k", "v"):
            result[f"{prefix}self_attn.{name}_proj.weight"] = noise(128, HIDDEN)
            result[f"{prefix}self_attn.{name}_proj.bias"] = noise(128)
        result[f"{prefix}self_attn.o_proj.weight"] = noise(HIDDEN, 128)
        result[f"{prefix}self_attn.o_proj.bias"] = noise(HIDDEN)
        result[f"{prefix}self_attn.sinks"] = noise(2)
        result[f"{prefix}mlp.router.weight"] = noise(EXPERTS, HIDDEN)
        result[f"{prefix}mlp.router.bias"] = noise(EXPERTS)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            result[f"{prefix}{norm}.weight"] = noise(HIDDEN)
        for name, rows in (("gate_up_proj", 2 * HIDDEN), ("down_proj", HIDDEN)):
            bank = f"{prefix}mlp.experts.{name}"
            shape = (EXPERTS, rows, HIDDEN // 32)
            result[f"{bank}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            result[f"{bank}_scales"] = torch.randint(115, 125, shape, dtype=torch.uint8)
            result[f"{bank}_bias"] = noise(EXPERTS, rows)
    return result


def any_scales(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A bank that MXFP4 cannot hold."""
    packed, e4m3, factors = files.rebundled(blocks, scales)
    return packed, e4m3, factors * 1.5


def write(layout: str, path: Path) -> None:
    tensors = weights(LAYERS[layout])
    if layout == "gguf":
        files.write_gguf(path, tensors, "Q8_0")
    elif layout == "original":
        files.save(path, files.original(tensors))
    elif layout.startswith("nvfp4"):
        bundle = files.rebundled if layout == "nvfp4 rebundle" else any_scales
        files.save(path, files.comfy_nvfp4(tensors, bundle))
    else:
        dense = files.dense if layout == "transformers" else files.comfy_dense
        files.save(path, dense(tensors, torch.bfloat16))


@pytest.mark.parametrize("layout", LAYERS)
def test_the_peak_is_little_more_than_the_file(layout: str, loader: subprocess.Popen[str], tmp_path: Path):
    path = tmp_path / "encoder.bin"
    write(layout, path)
    size = path.stat().st_size
    assert 150 * MIB < size < 300 * MIB
    print(path, file=loader.stdin, flush=True)
    grown = int(loader.stdout.readline())
    path.unlink()
    print(f"{layout}: {size / MIB:.0f} MiB, grown by {grown / MIB:.0f} MiB")
    assert grown < LIMITS[layout] * size + ONCE
