"""Whether nano Lens draws what a held-out prompt says: every mode of the selector, with and without guidance.

    python benchmarks/nano.py [--out FOLDER] [--checkpoints FOLDER] [--prompts 1536] [--device cuda]
        [--variants lens lens-turbo] [--modes NAME ...] [--batch 128] [--only TEXT] [--no-ablations]

A checker reads colours, shapes, counts, places and the word back from the pictures (tools/nano/checker.py).
Each number is the share of the prompts that state a thing whose picture shows it. All rows draw the same
prompts from the same noise, so that differences between rows are of what differs, not of chance; a share of
1536 is known to about half a point at 95 %, to 1 at 75 %. ``all_linear_int4`` rounds the modulation too.

Three mistakes are drawn as well, each of which other implementations make: the schedule with a constant shift
(mu 1.15), guidance on the denoised picture with its norm clamped, the encoder's layers in the wrong order.
A prompt tells so much that a schedule hardly matters, so Lens also draws without any: ``background`` is then
the share of the pictures whose background is of the palette, ``shape`` of those where something clear is.
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
from tools.nano.checker import decided, judge, shares
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
NO_PROMPT = "no prompt"
# Scenes, their pictures, whether the prompts were told -> what is right in each.
Judge = Callable[[Sequence[Scene], Sequence[numpy.ndarray], bool], list[dict[str, bool]]]


@dataclass(frozen=True)
class Row:
    """One way to draw all prompts, or without them: ``changes`` are arguments of ``draw``."""

    variant: str
    mode: str
    cfg: float
    mistake: str
    changes: dict[str, Any]
    steps: int
    told: bool = True


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
    mistakes: dict[str, dict[str, Any]] = {
        "schedule: mu 1.15": {"schedule": constant_shift},
        "layers reversed": {"features": reversed_layers(features)},
    }
    guided = guidance(variant) != 1
    if guided:
        mistakes["guidance on data, clamped"] = {"guide": guidance_on_data}
    found = [in_mode(variant, NONE, guidance(variant), *mistake) for mistake in mistakes.items()]
    # Turbo never drew without a prompt.
    for steps in (VARIANTS[variant].steps, LENS_TURBO.steps) if guided else ():
        found += without_prompts(variant, features, steps)
    return found


def in_mode(variant: str, mode: str, cfg: float, mistake: str = "", changes: Any = None) -> Row:
    """In the variant's steps."""
    return Row(variant, mode, cfg, mistake, changes or {}, VARIANTS[variant].steps)


def without_prompts(variant: str, features: Sequence[Tensor], steps: int) -> list[Row]:
    """All is left to the noise: with the model's schedule, and with a constant shift."""
    name, changes = f"{NO_PROMPT}, {steps} steps", {"features": [each[:0] for each in features]}
    wrong = {**changes, "schedule": constant_shift}
    return [
        Row(variant, NONE, 1.0, name, changes, steps, told=False),
        Row(variant, NONE, 1.0, f"{name}, schedule: mu 1.15", wrong, steps, told=False),
    ]


def measure(args: argparse.Namespace, judge_all: Judge) -> list[dict[str, Any]]:
    """A result for each row."""
    device, scenes = torch.device(args.device), held_out(args.prompts)
    compared: dict[str, Mode] = {NONE: lambda model: None, **modes(args.modes, device)}
    results = []
    for variant in args.variants:
        parts = Parts.load(args.checkpoints / variant, device, shared=args.checkpoints / "lens")
        features = parts.encode([plain_caption(scene) for scene in scenes])
        plain = parts.denoiser
        rows = [in_mode(variant, mode, cfg) for mode in compared for cfg in scales(variant, mode)]
        rows += [] if args.no_ablations else ablations(variant, features)
        for row in (each for each in rows if args.only in each.mistake):
            parts.denoiser = copy.deepcopy(plain)
            compared[row.mode](parts.denoiser)
            start = time.perf_counter()
            changes = {"features": features, **row.changes}
            pictures = draw(parts, scenes, row.steps, row.cfg, batch=args.batch, **changes)
            seconds = time.perf_counter() - start
            right = judge_all(scenes, [picture.numpy() for picture in pictures], row.told)
            results.append(
                {
                    "variant": row.variant,
                    "mode": row.mode,
                    "cfg": row.cfg,
                    "steps": row.steps,
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


def _judged(
    pool: ProcessPoolExecutor, scenes: Sequence[Scene], pictures: Sequence[numpy.ndarray], told: bool
) -> list:
    if not told:
        return list(pool.map(decided, pictures, chunksize=16))
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
    parser.add_argument("--prompts", type=int, default=1536)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--modes", nargs="+", default=list(MODES), help="beside none")
    parser.add_argument("--batch", type=int, default=128, help="pictures at once")
    parser.add_argument("--only", default="", help="rows of mistakes that are named so, in part")
    parser.add_argument("--no-ablations", action="store_true", help="no mistakes")
    args = parser.parse_args(arguments)
    with ProcessPoolExecutor(min(64, os.cpu_count() or 1)) as pool:
        pool.submit(judge, held_out(1)[0], numpy.zeros((64, 64, 3), numpy.uint8)).result()  # before CUDA is
        results = measure(args, partial(_judged, pool))
    settings = {"prompts": args.prompts, "device": args.device, "dtype": "bfloat16"}
    head = ["variant", "mode", "cfg", *(f"{key}, %" for key in KEYS), "everything, %"]
    write("nano", args.out, {"settings": settings, "rows": results}, [head, *map(line, results)])


if __name__ == "__main__":
    main()
