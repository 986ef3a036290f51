"""One forward of the denoiser against ComfyUI's own Lens: the same weights, inputs and process, bf16.

    COMFYUI_PATH=... python benchmarks/denoiser.py [--out FOLDER]

Needs a CUDA GPU with 40 GB. Weights are random; time and memory do not depend on training. A speed is
written only if the output is as close to plain PyTorch in fp32 as plain PyTorch in bf16 is.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, median_ms, peak_gb, write
from lens_core import kernels
from lens_core.config import DenoiserConfig
from lens_core.denoiser import DenoiserRun, LensDenoiser
from lens_core.denoiser.modulation import modulation_bytes
from lens_core.ops import sdpa
from lens_core.sampling import sigmas
from lens_core.tiny.models import random_weights

DEVICE = torch.device("cuda")
GRIDS = {"512x512": (32, 32), "1024x1024": (64, 64), "1440x1440": (90, 90), "1472x736": (92, 46)}
TEXT = 200
# Both round to bf16 at the same places or fewer; what is left is the luck of rounding.
TOLERANCE = 1.1


def load(generator: torch.Generator) -> LensDenoiser:
    """The full-size denoiser with random weights, on the GPU in bf16."""
    model = LensDenoiser(DenoiserConfig(), dtype=torch.bfloat16, device="meta")
    weights = random_weights(model, generator)
    model.load_state_dict({name: value.bfloat16() for name, value in weights.items()}, assign=True)
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
        mask = torch.ones(1, self.text.shape[1], device=DEVICE)
        return native(image, self.sigma, self.text.flatten(2), mask).flatten(2).transpose(1, 2)


def relative_l2(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def measure(case: Case, model: LensDenoiser, exact: LensDenoiser, native: torch.nn.Module) -> dict[str, Any]:
    """Times and errors of one case."""
    run = DenoiserRun([0.5])
    text = model.embed_text(case.text)

    def fast() -> Tensor:
        return case.ours(model, run, text)

    def graphed() -> Tensor:
        return case.ours(model, run, text, graphs=graphs)

    graphs = Graphs()
    want = case_exact(case, exact)
    with plain_torch():
        plain = relative_l2(case.ours(model, DenoiserRun(), text, attention=sdpa), want)
    result: dict[str, Any] = {"plain torch bf16 error": plain}
    for name, call in (
        ("ComfyUI", lambda: case.theirs(native)),
        ("ours", fast),
        ("ours, CUDA graph", graphed),
    ):
        error = relative_l2(call(), want)
        result[f"{name} error"] = error
        if name != "ComfyUI" and not error <= TOLERANCE * plain:
            raise SystemExit(f"{name} is off by {error:.2e}, plain PyTorch in bf16 by {plain:.2e}: no speed.")
        result[f"{name} ms"] = median_ms(call, 20, 4)
        result[f"{name} peak GB"] = peak_gb(call)
    return result
