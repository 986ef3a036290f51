"""What quantisation does to velocities and pictures: every mode of the selector against bf16.

    python benchmarks/quality.py [--out FOLDER] [--seeds 4] [--steps 8] [--size 1024x1024] [--cfg 1]
        [--model PATH [--vae PATH] | --tiny] [--device cuda] [--modes NAME ...]

Needs a CUDA GPU with 40 GB; --tiny runs on the CPU, and --device cpu will do for nano Lens. Velocities are
compared at bf16's latents, step by step; final latents and pictures are each mode's own. Without --model the
weights are random: errors are real then, pictures are noise, and what a mode does to one as seen is trained
weights' to say. Random weights also have no outliers, which trained ones have and which coarse formats do
worst with.

A grid of 16 pixels is looked for in each picture; ``all_linear_int4``, which rounds the modulation too, is
there to show whether one would be found. With random weights it is (2.7 times bf16's grid energy with 24 of
the 48 blocks at 512x512), but 4 bits in the blocks' other linears alone come to 1.3 there: what all tokens
have in common meets the same rounded weights. The score grows with the area, since chance has less of it in
a larger picture; the error's mean tile does not, and says how strong the pattern is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, write
from benchmarks.fidelity import lpips
from benchmarks.quality_harness import Harness, Settings, centre
from benchmarks.quality_models import BAD, RANDOM, Mode, Subject, from_files, full_size, modes, tiny_size

HEAD = [
    "mode",
    "velocity: cosine (worst)",
    "relative L2 (worst)",
    "common to all tokens",
    "final latents: relative L2",
    "picture: PSNR, dB (worst)",
    "SSIM (worst)",
    "grid energy / bf16's",
    "border contrast / bf16's",
    "comb",
    "error's mean tile / 255",
    "a grid?",
]


def measure(subject: Subject, settings: Settings, compared: dict[str, Mode]) -> dict[str, Any]:
    """Everything of every mode."""
    if subject.weights == RANDOM:
        centre(subject, settings)
    harness = Harness(subject, settings, lpips(subject.device))
    results: dict[str, Any] = {
        "settings": asdict(settings),
        "subject": {"weights": subject.weights, "text": subject.text, "decoder": subject.decoder},
        "bf16": harness.reference,
        "modes": {},
    }
    for name, mode in compared.items():
        results["modes"][name] = harness.compare(mode)
        print(name, json.dumps(results["modes"][name]), flush=True)
    if BAD in compared:
        results["the detector finds the bad example's grid"] = results["modes"][BAD]["draws a grid"]
    return results


def row(name: str, result: dict[str, Any]) -> list[str]:
    """A mode as a line of the table."""
    velocity, picture, grid = result["velocity"], result["picture"], result["grid"]
    noise, likeness = picture["PSNR dB"], picture["SSIM"]
    return [
        name,
        f"{velocity['cosine']:.5f} ({velocity['cosine, worst']:.4f})",
        f"{velocity['relative L2']:.4f} ({velocity['relative L2, worst']:.3f})",
        f"{100 * velocity['error common to all tokens']:.1f} %",
        f"{result['final latents']['relative L2']:.4f}",
        f"{sum(noise) / len(noise):.1f} ({min(noise):.1f})",
        f"{sum(likeness) / len(likeness):.4f} ({min(likeness):.4f})",
        f"{grid['grid energy, ratio']:.3f}",
        f"{grid['border contrast, ratio']:.3f}",
        f"{grid['comb']:.2f}",
        f"{grid['RMS of its mean tile / 255']:.2f}",
        "yes" if result["draws a grid"] else "no",
    ]


def size(text: str) -> tuple[int, int]:
    """``WIDTHxHEIGHT`` -> (height, width)."""
    width, height = map(int, text.split("x"))
    return height, width


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all, write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for quality.json and quality.md")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=size, default=(1024, 1024), help="WIDTHxHEIGHT in pixels")
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance with an empty negative; 1: none")
    parser.add_argument("--model", type=Path, help="trained weights: a Lens folder or a denoiser's file")
    parser.add_argument("--vae", type=Path, help="a FLUX.2 VAE's file or folder, if --model has none")
    parser.add_argument("--tiny", action="store_true", help="the tests' tiny model on the CPU")
    parser.add_argument("--device", default="cuda", help="cpu will do for a model as small as nano Lens")
    parser.add_argument("--modes", nargs="+", help="all by default")
    args = parser.parse_args(arguments)
    device = torch.device("cpu" if args.tiny else args.device)
    if args.model is not None:
        subject = from_files(args.model, args.vae, device)
    else:
        subject = tiny_size(device) if args.tiny else full_size(device)
    settings = Settings(args.seeds, args.steps, args.size, args.cfg)
    results = measure(subject, settings, modes(args.modes, device))
    rows = [row(name, result) for name, result in results["modes"].items()]
    plain = ["bf16", *[""] * 6, "1", "1", f"{results['bf16']['comb']:.2f}", "", ""]
    write("quality", args.out, results, [HEAD, plain, *rows])


if __name__ == "__main__":
    main()
