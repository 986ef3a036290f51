"""The VAE against diffusers' and ComfyUI's: time, memory, rounding and seams; bf16, the same random weights.

    COMFYUI_PATH=... python benchmarks/vae.py [--out FOLDER] [--vae FILE] [--compile] [--profile] [--tiny]

Needs a CUDA GPU; with --tiny it runs on the CPU, to try the program. Distances from fp32 are those of trained
weights only with --vae, a FLUX.2 VAE file. --profile prints the kernels of a decode and writes them beside
the results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, os.environ["COMFYUI_PATH"])
sys.path.insert(0, str(Path(__file__).parents[1]))
import comfy.cli_args

if not torch.cuda.is_available():
    comfy.cli_args.args.cpu = True
import comfy.latent_formats
import comfy.sd
import latent_preview

from benchmarks import vae_attention as attention
from benchmarks import vae_upsample as upsample
from benchmarks.common import RESULTS, median_ms, peak_gb, write
from benchmarks.picture import pack
from lens_core.loading import load_vae
from lens_core.tiny.models import vae_weights
from lens_core.vae import LensVAE, strips

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SIZES = {"1024x1024": (64, 64), "1440x1440": (90, 90)}
TINY_SIZES = {"32x48": (3, 2)}
# Elements of a strip: as published here, a quarter, and so many that there is one strip.
STRIP_SIZES = {"quarter strips": 2**23, "large strips": 2**27, "whole": 2**32}
# Tokens of a tile and of its overlap, as ComfyUI's node for tiles has them by default.
TILE, OVERLAP = 32, 4
Run = Callable[[], Any]


def milliseconds(run: Run) -> float:
    """Median of a call."""
    if CUDA:
        return median_ms(run)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measured(run: Run) -> dict[str, Any]:
    """Time and peak, or why there are none: not every way runs everywhere."""
    try:
        return {"ms": milliseconds(run), "peak GB": peak_gb(run) if CUDA else None}
    except (RuntimeError, ValueError, NotImplementedError) as error:  # the others are still measured
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def psnr(got: Tensor, want: Tensor, peak: float = 2.0) -> float:
    """In dB, of pictures in [-1, 1]."""
    error = (got.to(want.device).float() - want.float()).square().mean()
    return (10 * torch.log10(peak**2 / error)).item()


def seam(picture: Tensor, rows: list[int]) -> float | None:
    """Edges between these rows and those above over edges elsewhere: 1 where nothing is seen, None without
    rows.

    An edge is the second difference of [1, 3, H, W] from row to row.
    """
    edges = (picture[:, :, 2:] - 2 * picture[:, :, 1:-1] + picture[:, :, :-2]).abs().float().mean((0, 1, 3))
    at = torch.zeros(len(edges), dtype=torch.bool)
    for row in rows:
        at[[index for index in (row - 2, row - 1) if 0 <= index < len(edges)]] = True
    if not at.any() or at.all():
        return None
    at = at.to(edges.device)
    return (edges[at].mean() / edges[~at].mean()).item()


@contextmanager
def strip_elements(count: int) -> Iterator[None]:
    """Strips of so many elements."""
    before, strips.STRIP_ELEMENTS = strips.STRIP_ELEMENTS, count
    try:
        yield
    finally:
        strips.STRIP_ELEMENTS = before


class Contenders:
    """The same weights in every implementation, in bf16; ``exact`` is ours in fp32."""

    def __init__(self, file: Path | None, compiled: bool) -> None:
        if file is None:
            weights = vae_weights(torch.Generator().manual_seed(0), {"latent_channels": 32})
        else:
            weights = load_vae(file, torch.float32).model.state_dict()

        def make(dtype: torch.dtype) -> LensVAE:
            module = LensVAE({}).eval().requires_grad_(False)
            module.model.load_state_dict(weights)
            return module.to(DEVICE, dtype)

        self.exact, self.ours, self.together = make(torch.float32), make(torch.bfloat16), make(torch.bfloat16)
        self.together.model.to(memory_format=torch.channels_last)
        self.compiled = None
        if compiled:
            self.compiled = make(torch.bfloat16)
            self.compiled.model.to(memory_format=torch.channels_last)
            self.compiled.model.decoder.compile()
        self.comfyui = comfy.sd.VAE(sd=dict(weights), dtype=torch.bfloat16)
        self.comfyui.first_stage_model.to(DEVICE, torch.bfloat16)
        self.node = pack().vae.LensHostVAE(self.ours, torch.bfloat16, DEVICE)

    def decodes(self, latents: Tensor) -> dict[str, Run]:
        """Each way to decode."""
        ours, in_ram = self.ours, latents.float().cpu()

        def in_strips(count: int) -> Run:
            def run() -> Tensor:
                with strip_elements(count):
                    return ours.decode(latents)

            return run

        def tuned() -> Tensor:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                return ours.decode(latents)

        ways: dict[str, Run] = {
            "ours": lambda: ours.decode(latents),
            "ours, as the node gives it": lambda: self.node.decode(in_ram),
            "ours, frugal": lambda: ours.decode(latents, frugal_memory=True),
            "ours, cudnn.benchmark": tuned,
            **{f"ours, {name}": in_strips(count) for name, count in STRIP_SIZES.items()},
            "ComfyUI": lambda: self.comfyui.first_stage_model.decode(latents),
            "ComfyUI, as the node gives it": lambda: self.comfyui.decode(in_ram),
            "diffusers": lambda: ours.decode_whole(latents),
            "diffusers, channels last": lambda: self.together.decode_whole(latents),
        }
        if self.compiled is not None:
            ways["diffusers, channels last, compiled"] = lambda: self.compiled.decode_whole(latents)
        return ways

    def encodes(self, images: Tensor) -> dict[str, Run]:
        """Each way to encode."""
        return {
            "ours": lambda: self.ours.encode(images),
            "ComfyUI": lambda: self.comfyui.first_stage_model.encode(images),
            "diffusers": lambda: self.ours.encode_whole(images),
            "diffusers, channels last": lambda: self.together.encode_whole(images),
        }


def graph(run: Run) -> Run:
    """The same work as a CUDA graph: what launching costs is what it saves."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    stream.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        kept = run()
    return lambda: (recorded.replay(), kept)


def of_ways(ways: dict[str, Run], want: Tensor) -> dict[str, Any]:
    """Time, peak, and distance from fp32."""
    results: dict[str, Any] = {}
    for name, run in ways.items():
        results[name] = measured(run)
        if "ms" in results[name]:
            got = run()
            if "node" in name:  # [B, H, W, 3] in [0, 1]
                got = got.movedim(-1, 1) * 2 - 1
            results[name]["PSNR, dB"] = psnr(got, want.clamp(-1, 1) if "node" in name else want)
            del got
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        if CUDA:
            torch.cuda.empty_cache()
    return results


def tiles(models: Contenders, latents: Tensor, whole: Tensor) -> dict[str, Any]:
    """ComfyUI's tiles around our module, and where they differ from the whole picture."""

    def run() -> Tensor:
        return comfy.utils.tiled_scale(
            latents, models.ours.decode, TILE, TILE, OVERLAP, upscale_amount=16, output_device=DEVICE
        )

    rows = list(range(16 * (TILE - OVERLAP), whole.shape[2], 16 * (TILE - OVERLAP)))
    picture = run()
    return {**measured(run), "PSNR to whole, dB": psnr(picture, whole), "seam": seam(picture, rows)}


def upsamples(models: Contenders, grid: tuple[int, int]) -> dict[str, Any]:
    """The decoder's enlarging convolutions, each way; errors are those against fp32."""
    results: dict[str, Any] = {}
    layout = torch.channels_last if CUDA else torch.contiguous_format
    for level, block in enumerate(models.ours.model.decoder.up_blocks):
        for upsampler in block.upsamplers or ():
            weight = upsampler.conv.weight.contiguous(memory_format=layout)
            height, width = (side * 2 ** (level + 1) for side in grid)
            x = torch.randn(1, weight.shape[1], height, width, device=DEVICE, dtype=weight.dtype)
            x, four = x.contiguous(memory_format=layout), upsample.folded(weight)
            four = four.contiguous(memory_format=layout)
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                want = upsample.doubled(x.float(), weight.float())
            for name, run in {
                "doubled": lambda x=x, weight=weight: upsample.doubled(x, weight),
                "at once": lambda x=x, four=four: upsample.at_once(x, four),
                "one by one": lambda x=x, four=four: upsample.one_by_one(x, four),
                "at once, convolution alone": lambda x=x, four=four: torch.conv2d(x, four, padding=1),
            }.items():
                result = measured(run)
                if "alone" not in name and "ms" in result:
                    error = run().float() - want
                    result["relative error"] = (error.norm() / want.norm()).item()
                results[f"{weight.shape[1]} channels, to {2 * height}x{2 * width}, {name}"] = result
            del want
    return results


def attentions(grid: tuple[int, int]) -> dict[str, Any]:
    """The middle's attention, each way; errors are those against fp32."""
    shape = (3, 1, 1, 4 * grid[0] * grid[1], 512)
    query, key, value = torch.randn(shape, device=DEVICE).mul(2).bfloat16()
    want, results = attention.exact(query, key, value), {}
    for name, run in attention.WAYS.items():
        results[name] = result = measured(lambda run=run: run(query, key, value))
        if "ms" in result:
            error = run(query, key, value).float() - want
            result["relative error"] = (error.norm() / want.norm()).item()
        print(f"attention, {name}: {json.dumps(result)}", flush=True)
    return results


def preview(grid: tuple[int, int]) -> dict[str, Any]:
    """ComfyUI's linear preview, which ends with the picture in RAM."""
    latents = comfy.latent_formats.Flux2()
    previewer = latent_preview.Latent2RGBPreviewer(
        latents.latent_rgb_factors, latents.latent_rgb_factors_bias, latents.latent_rgb_factors_reshape
    )
    x = torch.randn(1, 128, *grid, device=DEVICE)
    return measured(lambda: previewer.decode_latent_to_preview_image("JPEG", x))


def profile(run: Run, path: Path) -> None:
    """Print the kernels of one call, longest first, and write them to a file."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    run()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profiler(activities=kinds) as seen:
        run()
        if CUDA:
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if CUDA else "self_cpu_time_total"
    text = seen.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(text)


def of_size(models: Contenders, grid: tuple[int, int]) -> dict[str, Any]:
    """All of one size in tokens."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    latents = torch.randn(1, 128, *grid, device=DEVICE, generator=generator)
    images = torch.rand(1, 3, *(16 * side for side in grid), device=DEVICE, generator=generator) * 2 - 1
    latents, images = latents.bfloat16(), images.bfloat16()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        want, means = models.exact.decode_whole(latents.float()), models.exact.encode_whole(images.float())
    results: dict[str, Any] = {"decode": of_ways(models.decodes(latents), want)}
    if CUDA:
        try:
            run = graph(lambda: models.ours.decode(latents))
            results["decode"]["ours, CUDA graph"] = {"ms": milliseconds(run)}
            del run
        except RuntimeError as error:
            results["decode"]["ours, CUDA graph"] = {"failed": str(error)[:300]}
    results["encode"] = of_ways(models.encodes(images), means)
    whole = models.ours.decode(latents)
    rows = strips.strip_rows(models.ours.model.config.block_out_channels[0], *whole.shape[2:])
    borders = list(range(rows, whole.shape[2], rows))
    results["strips"] = {
        "rows": borders,
        "seam": seam(whole, borders),
        "seam of the error": seam(whole.float() - want, borders),
        "estimated GB": models.ours.decode_bytes(*grid, 2) / 1e9,
    }
    del want
    frugal = models.ours.decode(latents, frugal_memory=True)
    results["frugal"] = {"PSNR to whole, dB": psnr(frugal, whole), "seam": seam(frugal, borders)}
    results["tiles"] = tiles(models, latents, whole)
    results["upsample"] = upsamples(models, grid)
    results["attention"] = attentions(grid)
    results["preview"] = preview(grid)
    return results


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row for each way, with time, peak and distance from fp32 for each size."""
    rows = [["ms / peak GB / PSNR, dB", *results]]
    for task in ("decode", "encode"):
        for name in next(iter(results.values()))[task]:
            found = [size[task].get(name, {}) for size in results.values()]
            rows.append([f"{task}, {name}", *map(_cell, found)])
    return rows


def _cell(result: dict[str, Any]) -> str:
    if "ms" not in result:
        return "failed"
    numbers = (("ms", "{:.1f}"), ("peak GB", "{:.2f}"), ("PSNR, dB", "{:.1f}"))
    return " / ".join(form.format(result[key]) if result.get(key) else "-" for key, form in numbers)


@torch.inference_mode()
def main() -> None:
    """Measure all, write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for vae.json and vae.md")
    parser.add_argument("--vae", type=Path, default=None, help="a FLUX.2 VAE file; random weights without it")
    parser.add_argument("--compile", action="store_true", help="diffusers' decoder by torch.compile as well")
    parser.add_argument("--profile", action="store_true", help="the kernels of a decode of each size")
    parser.add_argument("--tiny", action="store_true", help="a tiny picture, to try the program")
    args = parser.parse_args()
    models = Contenders(args.vae, args.compile)
    results: dict[str, Any] = {}
    for name, grid in (TINY_SIZES if args.tiny else SIZES).items():
        if args.profile:
            latents = torch.randn(1, 128, *grid, device=DEVICE, dtype=torch.bfloat16)
            profile(lambda latents=latents: models.ours.decode(latents), args.out / f"vae_profile_{name}.txt")
        results[name] = of_size(models, grid)
    write("vae", args.out, results, table(results))


if __name__ == "__main__":
    main()
