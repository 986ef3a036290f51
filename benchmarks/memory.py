"""What fits where: peaks, times and estimates of whole pictures under budgets of GPU memory.

    COMFYUI_PATH=... python benchmarks/memory.py [--out FOLDER] [--folder SCRATCH]

Full-size random weights on a CUDA GPU, 30 GB of RAM. Budgets are enforced: the allocator gets no byte more.
Each picture (prompt encoded, 4 steps sampled at cfg 1, decoded) starts with nothing on the GPU and is
compared with the one drawn without a budget, bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as ``python -m lens_core``

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, write
from benchmarks.models import ENCODER, VAE, write_models
from lens_core.config import EncoderOptions
from lens_core.loading import load_denoiser, load_vae, open_encoder
from lens_core.memory.plan import Plan
from lens_core.memory.recovery import OutOfMemory
from lens_core.needs import Picture
from lens_core.pipeline import LensPipeline
from lens_core.quant.policy import NONE
from lens_core.residence import Residence
from lens_core.text_encoder import TextEncoder
from lens_core.vae import LensVAE

DEVICE, DTYPE = torch.device("cuda", 0), torch.bfloat16
BUDGETS = (6, 8, 10, 12, 16, 24)
SIZES = {"1024x1024": (1024, 1024), "1440x1440": (1440, 1440)}
WEIGHTS = {"bf16": NONE, "8-bit": "int8_dynamic", "4-bit": "uint4_sdnq"}
OFFLOADS = {"resident": "none", "evict": "model", "stream": "stream"}
DENOISER = "lens_turbo_bf16.safetensors"
PROMPT = " ".join(f"word{index}" for index in range(24))
GB = 1e9


@dataclass
class Models:
    """What all pipelines share, and one denoiser."""

    text: TextEncoder
    vae: LensVAE
    folder: Path

    def pipeline(self, mode: str) -> LensPipeline:
        """With the denoiser in a mode."""
        path = self.folder / DENOISER
        denoiser = load_denoiser(path, DTYPE, quantization=mode, device=DEVICE)
        return LensPipeline(Residence(self.text, denoiser, self.vae, DEVICE), DTYPE, EncoderOptions())


def limit(gigabytes: float | None) -> None:
    """Give the allocator so much and no more."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if gigabytes is None else gigabytes * GB / total, DEVICE)


def draw(pipeline: LensPipeline, size: tuple[int, int], steps: int, cfg: float) -> Tensor:
    """A picture, as the command line draws it."""
    noise = pipeline.noise(1, 1, size)
    return pipeline(PROMPT, noise=noise, size=size, steps=steps, cfg=cfg)


def measure(
    pipeline: LensPipeline,
    size: tuple[int, int],
    offload: str,
    budget: float | None,
    want: Tensor | None = None,
    steps: int = 4,
    cfg: float = 1.0,
) -> dict[str, Any]:
    """Peaks, seconds and the plan's own figure; "does not fit" where the plan says so beforehand."""
    residence = pipeline.residence
    residence.clear()
    residence.offload, residence.budget = offload, None if budget is None else budget * GB
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    limit(budget)
    start = time.perf_counter()
    try:
        image = draw(pipeline, size, steps, cfg)
        torch.cuda.synchronize()
    except OutOfMemory as error:
        return {"fits": False, "told": str(error)}
    finally:
        limit(None)
    seconds = time.perf_counter() - start
    tokens = len(pipeline.text.file.tokenizer.split(pipeline._ids(PROMPT))[1])
    picture = Picture(*size, 1, tokens, steps)
    parts = residence.components(picture)
    plan = residence.last
    assert isinstance(plan, Plan)
    allocated = torch.cuda.max_memory_allocated()
    result = {
        "fits": True,
        "seconds": seconds,
        "peak allocated GB": allocated / GB,
        "peak reserved GB": torch.cuda.max_memory_reserved() / GB,
        "estimated GB": plan.peak(parts) / GB,
        "estimate / allocated": plan.peak(parts) / allocated,
        "plan": plan.describe(parts),
    }
    if want is not None:
        result["same picture"] = torch.equal(image, want)
    residence.clear()
    torch.cuda.empty_cache()
    result["left GB"] = torch.cuda.memory_allocated() / GB
    return result


def smallest_budget(result: dict[str, Any]) -> float | None:
    """The first of the budgets that a plan of these peaks goes into."""
    return next((budget for budget in BUDGETS if result["peak reserved GB"] <= budget), None)


def of_weights(pipeline: LensPipeline, name: str) -> dict[str, Any]:
    """All sizes: each way of offloading without and with a budget, then what "auto" does in each budget."""
    results: dict[str, Any] = {}
    # The first reads the file's pages, the next ones lock some of what has left the GPU: then comes the rule.
    cold = [measure(pipeline, SIZES["1024x1024"], "none", None)["seconds"] for _ in range(7)]
    results[f"1024x1024, {name}, resident, first pictures"] = {"seconds": cold}
    for size, pixels in SIZES.items():
        want = draw(pipeline, pixels, 4, 1.0)
        for way, offload in OFFLOADS.items():
            free = measure(pipeline, pixels, offload, None, want)
            budget = smallest_budget(free)
            bound = None if budget is None else measure(pipeline, pixels, offload, budget, want)
            results[f"{size}, {name}, {way}"] = {"free": free, "smallest budget GB": budget, "bound": bound}
        for budget in BUDGETS:
            result = measure(pipeline, pixels, "auto", budget, want)
            results[f"{size}, {name}, auto in {budget} GB"] = result
    print(json.dumps(results), flush=True)
    return results


def published_case(pipeline: LensPipeline) -> dict[str, Any]:
    """1440 x 1440, bf16, 20 steps, cfg 5, nothing offloaded: out of memory on 24 GB as published."""
    return measure(pipeline, SIZES["1440x1440"], "none", 22.5, None, 20, 5.0)


def table(results: dict[str, Any]) -> list[list[str]]:
    """Rows by size and weights: each budget's time and peak."""
    rows = [["", *(f"{budget} GB" for budget in BUDGETS), *OFFLOADS]]
    for size in SIZES:
        for name in WEIGHTS:
            key = f"{size}, {name}"
            if f"{key}, resident" not in results:
                continue
            auto = [results[f"{key}, auto in {budget} GB"] for budget in BUDGETS]
            cells = [
                f"{one['seconds']:.1f} s, {one['peak reserved GB']:.1f} GB" if one["fits"] else "-"
                for one in auto
            ]
            ways = [results[f"{key}, {way}"]["free"] for way in OFFLOADS]
            cells += [f"{one['peak reserved GB']:.1f} GB, {one['seconds']:.1f} s" for one in ways]
            rows.append([key, *cells])
    return rows


@torch.inference_mode()
def main() -> None:
    """Measure all, write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for memory.json and memory.md")
    parser.add_argument("--folder", type=Path, default=None, help="where 22 GB can lie for a while")
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), help="all by default")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        write_models(folder, folder, folder, DENOISER)
        text = TextEncoder(open_encoder(folder / ENCODER), DTYPE)
        models = Models(text, load_vae(folder / VAE, DTYPE), folder)
        for name in args.weights:
            pipeline = models.pipeline(WEIGHTS[name])
            results |= of_weights(pipeline, name)
            if name == "bf16":
                results["1440x1440, bf16, 20 steps, cfg 5, all resident"] = published_case(pipeline)
            del pipeline
            gc.collect()
    write("memory", args.out, results, table(results))


if __name__ == "__main__":
    main()
