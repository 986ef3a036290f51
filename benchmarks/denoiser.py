"""One forward of the denoiser against ComfyUI's own Lens: the same weights, inputs and process, bf16.

    COMFYUI_PATH=... python benchmarks/denoiser.py [--out FOLDER]

Needs a CUDA GPU with 40 GB. Weights are random; time and memory do not depend on training. A speed is
written only if the output is as close to plain PyTorch in fp32 as plain PyTorch in bf16 is.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, median_ms, peak_gb, write
from lens_core.config import DenoiserConfig
from lens_core.denoiser import BlockGraphs, DenoiserRun, LensDenoiser, transformer
from lens_core.kernels import EAGER_BLOCK
from lens_core.kernels.backend import apart
from lens_core.ops import cudnn_sdpa, sdpa
from lens_core.tiny.models import random_weights

DEVICE = torch.device("cuda")
GRIDS = {"512x512": (32, 32), "1024x1024": (64, 64), "1440x1440": (90, 90), "1472x736": (46, 92)}
TEXT = 200
# Both round to bf16 at the same places or fewer; what is left is the luck of rounding.
TOLERANCE = 1.1


def load(generator: torch.Generator) -> LensDenoiser:
    """The full-size denoiser with random weights, in bf16, brought to the GPU as a file would be."""
    model = LensDenoiser(DenoiserConfig(), dtype=torch.bfloat16, device="meta")
    weights = random_weights(model, generator)
    model.load_state_dict({name: value.bfloat16().cpu() for name, value in weights.items()}, assign=True)
    del weights
    torch.cuda.empty_cache()
    return model.to(DEVICE).eval().requires_grad_(False)


def comfyui(model: LensDenoiser) -> torch.nn.Module:
    """ComfyUI's own Lens with the same tensors and the reference's epsilon of queries and keys."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.ldm.lens.model
    import comfy.ops

    with torch.device("meta"):
        native = comfy.ldm.lens.model.LensTransformer2DModel(operations=comfy.ops.disable_weight_init)
    native.load_state_dict(model.state_dict(), assign=True)
    for block in native.transformer_blocks:
        for norm in (block.attn.norm_q, block.attn.norm_k, block.attn.norm_added_q, block.attn.norm_added_k):
            norm.eps = 1e-6
    return native


class Case:
    """One size with or without text: the same inputs for all implementations."""

    def __init__(self, grid: tuple[int, int], text: int, generator: torch.Generator) -> None:
        random = {"generator": generator, "device": DEVICE}
        self.grid = grid
        self.latents = torch.randn(1, grid[0] * grid[1], 128, **random).bfloat16()
        self.text = torch.randn(1, text, 4, 2880, **random).bfloat16()
        self.sigma = torch.tensor([0.5], device=DEVICE)  # 1000 sigma is exact in bf16

    def ours(self, model: LensDenoiser, run: DenoiserRun, text: Tensor, **options: Any) -> Tensor:
        return model(self.latents, self.sigma, text, self.grid, run=run, **options)

    def theirs(self, native: torch.nn.Module) -> Tensor:
        image = self.latents.transpose(1, 2).unflatten(-1, self.grid)
        mask = torch.ones(1, self.text.shape[1], device=DEVICE) if self.text.shape[1] else None
        return native(image, self.sigma, self.text.flatten(2), mask).flatten(2).transpose(1, 2)


@contextmanager
def plain_torch() -> Iterator[None]:
    """As on a machine without Triton."""
    chosen = transformer.choose_block
    transformer.choose_block = lambda *_: EAGER_BLOCK
    try:
        yield
    finally:
        transformer.choose_block = chosen


def measure(case: Case, model: LensDenoiser, exact: LensDenoiser, native: torch.nn.Module) -> dict[str, Any]:
    """Times, memory and errors of one case; no time of ours without its error."""
    run, graphs, text = DenoiserRun([0.5]), BlockGraphs(), model.embed_text(case.text)
    ours: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: case.ours(model, run, text),
        "ours, CUDA graph": lambda: case.ours(model, run, text, graphs=graphs),
    }
    with plain_torch():
        latents, full = case.latents.float(), case.text.float()
        want = exact(latents, case.sigma, full, case.grid, attention=sdpa)
        plain = apart(case.ours(model, DenoiserRun(), case.text, attention=sdpa), want)
    result: dict[str, Any] = {"plain PyTorch": {"error": plain}}
    for name, call in {**ours, "ComfyUI": lambda: case.theirs(native)}.items():
        error = max(apart(call(), want) for _ in range(3))
        if name in ours and not error <= TOLERANCE * plain:
            raise SystemExit(f"{name} is off by {error:.2e}, plain PyTorch in bf16 by {plain:.2e}: no speed.")
        result[name] = {"ms": median_ms(call, 20, 4), "error": error, "peak GB": peak_gb(call)}
    return result


def floor_ms(tokens: int, text: int) -> float:
    """The matrix products by cuBLAS and the attention by cuDNN alone, back to back."""
    random = {"device": DEVICE, "dtype": torch.bfloat16}
    shapes = [(4608, 1536), (1536, 1536), (4096, 1536), (4096, 1536), (1536, 4096)]
    weights = [torch.randn(*shape, **random) / 40 for shape in shapes]
    inputs = [torch.randn(count, weight.shape[1], **random) for count in (tokens, text) for weight in weights]
    q, k, v = torch.randn(3, 1, 24, tokens + text, 64, **random)

    def run() -> None:
        for _ in range(48):
            for x, weight in zip(inputs, weights * 2, strict=True):
                if len(x):
                    F.linear(x, weight)
            cudnn_sdpa(q, k, v)

    return median_ms(run, 10, 2)


def memory(model: LensDenoiser) -> dict[str, float]:
    """Weights on the GPU in GB, with and without the modulation's, and a run's table."""
    whole = torch.cuda.memory_allocated()
    levels = [1 - step / 20 for step in range(20)]
    run = DenoiserRun(levels)
    sigma = torch.ones(1, device=DEVICE)
    ms = median_ms(lambda: DenoiserRun(levels).modulation(model, sigma, torch.bfloat16))
    run.modulation(model, sigma, torch.bfloat16)
    table = torch.cuda.memory_allocated() - whole
    for block in model.blocks:
        block.img_mod.cpu()
        block.txt_mod.cpu()
    released = torch.cuda.memory_allocated()
    case = Case((64, 64), TEXT, torch.Generator(DEVICE).manual_seed(1))
    text = model.embed_text(case.text)
    peak = peak_gb(lambda: model(case.latents, sigma, text, case.grid, run=run))
    for block in model.blocks:
        block.img_mod.to(DEVICE)
        block.txt_mod.to(DEVICE)
    return {
        "resident GB": whole / 1e9,
        "resident while sampling, modulation released GB": released / 1e9,
        "of which the table of 20 levels GB": table / 1e9,
        "activations of a forward at 1024x1024 GB": peak,
        "table of 20 levels ms": ms,
    }


@torch.inference_mode()
def main() -> None:
    """Measure all, write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for denoiser.json and denoiser.md")
    args = parser.parse_args()
    generator = torch.Generator(DEVICE).manual_seed(0)
    model = load(generator)
    results: dict[str, Any] = {"memory": memory(model)}
    print(json.dumps(results, indent=1), flush=True)
    exact, native = copy.deepcopy(model).float(), comfyui(model)
    names = ("ComfyUI", "ours", "ours, CUDA graph")
    rows = [["one forward, bf16", "ComfyUI", "ours", "ours, CUDA graph", "cuBLAS and cuDNN alone"]]
    for size, grid in GRIDS.items():
        for text in (TEXT, 0):
            name = f"{size}, {text} text tokens"
            case = results[name] = measure(Case(grid, text, generator), model, exact, native)
            case["floor ms"] = floor_ms(grid[0] * grid[1], text)
            print(name, json.dumps(case), flush=True)
            rows.append([name, *(f"{case[who]['ms']:.1f} ms" for who in names), f"{case['floor ms']:.1f} ms"])
    used = results["memory"]
    weights = used["resident GB"], used["resident while sampling, modulation released GB"]
    rows.append(
        ["weights on the GPU", f"{weights[0]:.2f} GB", "{:.2f} to {:.2f} GB".format(*weights[::-1]), "", ""]
    )
    write("denoiser", args.out, results, rows)


if __name__ == "__main__":
    main()
