"""Whether nano Lens draws what a held-out prompt says: every mode of the selector, with and without guidance.

    python benchmarks/nano.py [--out FOLDER] [--checkpoints FOLDER] [--prompts 384] [--device cuda]
        [--variants lens lens-turbo] [--modes NAME ...] [--batch 128] [--no-ablations]

A checker reads colours, shapes, counts, places and the word back from the pictures (tools/nano/checker.py).
Each number is the share of the prompts that state a thing whose picture shows it. All rows draw the same
prompts from the same noise, so that differences between rows are of what differs, not of chance; a share of
384 is known to about 1 point at 95 %, to 2 at 75 %. ``all_linear_int4`` rounds the modulation too.

Three mistakes are drawn as well, each of which other implementations make: the schedule with a constant shift
(mu 1.15), guidance on the denoised picture with its norm clamped, the encoder's layers in the wrong order.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, ROOT, write
from benchmarks.quality_models import BAD, Mode, modes
from lens_core.config import LENS, LENS_TURBO
from lens_core.quant.policy import NONE
from lens_core.sampling.schedule import shifted
from tools.nano.captions import plain_caption
from tools.nano.checker import judge, shares
from tools.nano.configs import GUIDANCE
from tools.nano.sample import Parts, draw
from tools.nano.scenes import SIZES, Scene, sample_scene

VARIANTS = {"lens": LENS, "lens-turbo": LENS_TURBO}
# Those that every GPU and the CPU have.
MODES = (
    "float8_weight_only",
    "float8_dynamic",
    "int8_weight_only",
    "int8_dynamic",
    "int4_weight_only",
    "uint4_sdnq",
    BAD,
)
KEYS = ("background", "colour", "shape", "count", "relation", "size", "text")
Judge = Callable[[Sequence[Scene], Sequence[numpy.ndarray]], list[dict[str, bool]]]


@dataclass(frozen=True)
class Row:
    """One way to draw all prompts: ``changes`` are arguments of ``draw``."""

    variant: str
    mode: str
    cfg: float
    mistake: str
    changes: dict[str, Any]


def held_out(count: int, seed: int = 0) -> list[Scene]:
    """Scenes whose main part training never showed, all nine sizes in turn."""
    rng = random.Random(seed)
    return [sample_scene(rng, held_out=True, size=SIZES[index % len(SIZES)]) for index in range(count)]


def constant_shift(steps: int, tokens: int, mu: float = 1.15) -> Tensor:
    """A schedule whose shift does not know the number of tokens and steps."""
    times = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    levels = shifted(times, mu)
    return torch.cat([levels, levels.new_zeros(1)]).float()


def guidance_on_data(x: Tensor, sigma: Tensor, wanted: Tensor, unwanted: Tensor, scale: float) -> Tensor:
    """Guidance on the denoised picture instead of the velocity, its norm never raised."""
    cond, uncond = (x.float() - sigma * velocity.float() for velocity in (wanted, unwanted))
    guided = uncond + scale * (cond - uncond)
    lengths = [torch.linalg.vector_norm(each, dim=-1, keepdim=True) for each in (cond, guided)]
    guided = guided * (lengths[0] / (lengths[1] + 1e-8)).clamp(max=1)
    return ((x.float() - guided) / sigma).to(wanted.dtype)


def guidance(variant: str) -> float:
    """The scale that a variant is meant for."""
    return 1.0 if VARIANTS[variant].cfg == 1 else GUIDANCE


def scales(variant: str, mode: str) -> list[float]:
    """Those that are measured, the largest first."""
    found = {GUIDANCE, 1.0} | ({VARIANTS[variant].cfg} if mode == NONE else set())
    return sorted(found, reverse=True)


def reversed_layers(features: Sequence[Tensor]) -> list[Tensor]:
    """Features [S, L, H] with the captured layers last to first."""
    return [each.flip(1) for each in features]


def ablations(variant: str, features: Sequence[Tensor]) -> list[Row]:
    """The mistakes; guidance where the variant has any."""
    cfg = guidance(variant)
    found = [
        Row(variant, NONE, cfg, "schedule: mu 1.15", {"schedule": constant_shift}),
        Row(variant, NONE, cfg, "layers reversed", {"features": reversed_layers(features)}),
    ]
    if cfg != 1:
        found.append(Row(variant, NONE, cfg, "guidance on data, clamped", {"guide": guidance_on_data}))
    return found


def measure(args: argparse.Namespace, judge_all: Judge) -> list[dict[str, Any]]:
    """A result for each row."""
    device, scenes = torch.device(args.device), held_out(args.prompts)
    compared: dict[str, Mode] = {NONE: lambda model: None, **modes(args.modes, device)}
    results = []
    for variant in args.variants:
        parts = Parts.load(args.checkpoints / variant, device, shared=args.checkpoints / "lens")
        features = parts.encode([plain_caption(scene) for scene in scenes])
        plain = parts.denoiser
        rows = [Row(variant, mode, cfg, "", {}) for mode in compared for cfg in scales(variant, mode)]
        for row in rows + ([] if args.no_ablations else ablations(variant, features)):
            parts.denoiser = copy.deepcopy(plain)
            compared[row.mode](parts.denoiser)
            start, steps = time.perf_counter(), VARIANTS[variant].steps
            changes = {"features": features, **row.changes}
            pictures = draw(parts, scenes, steps, row.cfg, batch=args.batch, **changes)
            seconds = time.perf_counter() - start
            right = judge_all(scenes, [picture.numpy() for picture in pictures])
            results.append(
                {
                    "variant": row.variant,
                    "mode": row.mode,
                    "cfg": row.cfg,
                    "steps": steps,
                    "mistake": row.mistake,
                    "right": shares(right),
                    "all right": sum(all(each.values()) for each in right) / len(right),
                    "seconds": round(seconds, 2),
                }
            )
            print(line(results[-1]), flush=True)
    return results


def line(result: dict[str, Any]) -> list[str]:
    """A result as a line of the table."""
    what = " / ".join(filter(None, (result["mode"], result["mistake"])))
    shown = [f"{100 * result['right'][key]:.1f}" if key in result["right"] else "" for key in KEYS]
    number = f"{result['cfg']:g}"
    return [result["variant"], what, number, *shown, f"{100 * result['all right']:.1f}"]


def _judged(pool: ProcessPoolExecutor, scenes: Sequence[Scene], pictures: Sequence[numpy.ndarray]) -> list:
    return list(pool.map(judge, scenes, pictures, chunksize=16))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all, write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for nano.json and nano.md")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=ROOT / "checkpoints" / "nano",
        help="folder of lens and lens-turbo",
    )
    parser.add_argument("--prompts", type=int, default=384)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--modes", nargs="+", default=list(MODES), help="beside none")
    parser.add_argument("--batch", type=int, default=128, help="pictures at once")
    parser.add_argument("--no-ablations", action="store_true", help="no mistakes")
    args = parser.parse_args(arguments)
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        pool.submit(judge, held_out(1)[0], numpy.zeros((64, 64, 3), numpy.uint8)).result()  # before CUDA is
        results = measure(args, partial(_judged, pool))
    settings = {"prompts": args.prompts, "device": args.device, "dtype": "bfloat16"}
    head = ["variant", "mode", "cfg", *(f"{key}, %" for key in KEYS), "everything, %"]
    write("nano", args.out, {"settings": settings, "rows": results}, [head, *map(line, results)])


if __name__ == "__main__":
    main()
