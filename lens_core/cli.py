"""``python -m lens_core generate``: pictures from a Lens folder, without ComfyUI.

Flags and their meanings are those of the published inference script; steps and cfg default to the
checkpoint's published settings instead of Lens' for all.
"""

from __future__ import annotations

import argparse
import logging
import math
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from .config import Variant
from .errors import LensError, SettingError
from .images import save_png
from .pipeline import LensPipeline
from .sampling import ASPECT_RATIOS, BASE_RESOLUTIONS, bucket, check_size
from .sampling.loop import OnStep
from .weights import variant_of

log = logging.getLogger(__name__)
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def build_parser() -> argparse.ArgumentParser:
    """The command line; every flag says its default."""
    parser = argparse.ArgumentParser(prog="python -m lens_core", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser(
        "generate", help="make pictures", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = generate.add_argument
    add("--repo_id", required=True, metavar="PATH", help="a Lens folder in diffusers' layout")
    add("--prompt", required=True, help="what to draw; several prompts are joined by |")
    add("--negative_prompt", default="", help="what to avoid (only where cfg is not 1)")
    add("--base_resolution", type=int, default=1440, help=f"one of {BASE_RESOLUTIONS}")
    add("--aspect_ratio", default="1:1", help=f"width:height, one of {', '.join(ASPECT_RATIOS)}")
    add("--height", type=int, default=None, help="with --width: a size outside the buckets")
    add("--width", type=int, default=None, help="with --height: a size outside the buckets")
    add("--steps", type=int, default=None, help="denoising steps; None: the checkpoint's own")
    add("--cfg", type=float, default=None, help="guidance scale; None: the checkpoint's own")
    add("--n", type=int, default=1, help="pictures per prompt")
    add("--seed", type=int, default=None, help="None: a new one each time, written into the PNG")
    add("--dtype", default="bfloat16", help=f"one of {', '.join(_DTYPES)}")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--out", type=Path, default=Path("outputs"), help="folder for the pictures")
    return parser


def generate(args: argparse.Namespace) -> list[Path]:
    """Make and save the pictures; returns their paths. Raises LensError on bad settings."""
    dtype, variant, size = _check(args)
    steps = variant.steps if args.steps is None else args.steps
    cfg = variant.cfg if args.cfg is None else args.cfg
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    prompts = [prompt.strip() for prompt in args.prompt.split("|")]
    device = torch.device(args.device)
    with tqdm(desc="Loading", unit="tensor", leave=False, disable=None) as bar:
        pipeline = LensPipeline.from_folder(args.repo_id, device, dtype, _count(bar))
    noise = pipeline.noise(seed, len(prompts) * args.n, size)
    paths = []
    for index, prompt in enumerate(prompts):
        if not prompt:
            log.warning("Prompt %d is empty: the picture will follow no description.", index + 1)
        with tqdm(total=steps, desc=prompt[:40] or "(empty prompt)", unit="step") as bar:
            images = pipeline(
                prompt,
                noise=noise[index * args.n : (index + 1) * args.n],
                size=size,
                steps=steps,
                cfg=cfg,
                negative=args.negative_prompt,
                on_step=_count(bar),
            )
        for number, image in enumerate(images.cpu()):
            settings = {
                "prompt": prompt,
                "negative_prompt": args.negative_prompt,
                "height": size[0],
                "width": size[1],
                "steps": steps,
                "cfg": cfg,
                "seed": seed,
                "n": args.n,
                "index": index * args.n + number,
                "batch": len(prompts) * args.n,
                "dtype": args.dtype,
                "device": device.type,
                "checkpoint": Path(args.repo_id).resolve().name,
                "variant": variant.name,
            }
            paths.append(save_png(image, args.out, settings))
    return paths


def _count(bar: tqdm) -> OnStep:
    """A callback (done, total) that moves the bar by one."""
    return lambda *_: bar.update()


def _check(args: argparse.Namespace) -> tuple[torch.dtype, Variant, tuple[int, int]]:
    """Dtype, variant and (height, width) that the flags mean; raises before anything is loaded."""
    if args.dtype not in _DTYPES:
        reason = " (float16 overflows: Lens' values reach 1.4e5)" if args.dtype == "float16" else ""
        raise SettingError(f"--dtype must be one of {', '.join(_DTYPES)}, got {args.dtype}{reason}.")
    for flag, value in (("--n", args.n), ("--steps", args.steps)):
        if value is not None and value < 1:
            raise SettingError(f"{flag} must be at least 1, got {value}.")
    if args.cfg is not None and not math.isfinite(args.cfg):
        raise SettingError(f"--cfg must be a finite number, got {args.cfg}.")
    if args.seed is not None and not 0 <= args.seed < 2**64:
        raise SettingError(f"--seed must be from 0 to 2**64 - 1, got {args.seed}.")
    if args.out.exists() and not args.out.is_dir():
        raise SettingError(f"--out {args.out} is a file; give a folder.")
    if not Path(args.repo_id).is_dir():
        raise SettingError(
            f"--repo_id {args.repo_id} is no folder on this machine, and nothing is downloaded "
            "without being asked. Expected a Lens folder with transformer/, text_encoder/, vae/ "
            "and tokenizer/ in it."
        )
    _check_device(args.device)
    folder = Path(args.repo_id)
    # A link's own name counts too: caches keep the files under a hash.
    variant = variant_of(f"{folder.absolute().name} {folder.resolve().name}")
    return _DTYPES[args.dtype], variant, _size(args)


def _size(args: argparse.Namespace) -> tuple[int, int]:
    if (args.height is None) != (args.width is None):
        raise SettingError("--height and --width go together: give both or neither.")
    if args.height is None:
        return bucket(args.base_resolution, args.aspect_ratio)
    check_size(args.height, args.width)
    return args.height, args.width


def _check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # every backend has its own way to say that it is not there
        reason = str(error).splitlines()[0]
        raise SettingError(f"--device {name} cannot be used here ({reason}). Use --device cpu.") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors meant for the user are one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = build_parser().parse_args(argv)
    try:
        for path in generate(args):
            print(path)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130
    return 0
