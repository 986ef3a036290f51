"""``python -m lens_core generate``: pictures from a Lens folder, without ComfyUI; ``cache``: kept features;
``quantize``: a smaller denoiser; ``download``: model files; ``check``: a report on computer and files.

Flags and their meanings are those of the published inference script, and further ones for the text
encoder; steps and cfg default to the checkpoint's published settings instead of Lens' for all.
"""

from __future__ import annotations

import argparse
import logging
import math
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .cli_check import add_check, check
from .cli_download import add_download, download
from .cli_flags import ATTENTIONS, OFF, add_generate, default_cache
from .cli_quantize import add_quantize, quantize
from .cli_reasoner import check_reasoner, reasoner_settings, rewritten, rewritten_by
from .config import PLACEMENTS, TEMPLATE_DATE, DenoiserConfig, EncoderOptions, Variant
from .denoiser import NAG_OFF, STEP_CACHE_OFF, BlockGraphs, NagOptions, StepCacheOptions
from .errors import LensError, SettingError
from .feature_cache import FeatureCache
from .images import save_png
from .interval import WHOLE, Interval
from .loading import DTYPES
from .lora.merge import Choice, parse_choice
from .memory.plan import OFFLOADS
from .ops import Attention, flash3_on
from .pipeline import LensPipeline
from .prompt import check_date, today
from .quant.policy import CHOICES, NONE
from .sampling import bucket, check_size
from .sampling.loop import OnStep
from .weights import variant_of

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The command line; every flag says its default."""
    parser = argparse.ArgumentParser(
        prog="python -m lens_core", description="Microsoft's Lens without ComfyUI."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add_generate(commands, device)
    cache = commands.add_parser("cache", help="show or clear the text features kept on disk")
    cache.add_argument("--folder", default=default_cache(), metavar="DIR", help="default: %(default)s")
    cache.add_argument("--clear", action="store_true", help="delete them")
    add_quantize(commands, device)
    add_check(commands, device)
    add_download(commands)
    return parser


def generate(args: argparse.Namespace) -> list[Path]:
    """Make and save the pictures; returns their paths. Raises LensError on bad settings."""
    dtype, variant, size = _check(args)
    check_reasoner(args)
    options = _encoder_options(args)
    loras = [parse_choice(text) for text in args.lora]
    guided, step_cache, nag = _savings(args)
    attention = _attention(args, dtype)
    steps = variant.steps if args.steps is None else args.steps
    cfg = variant.cfg if args.cfg is None else args.cfg
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    originals = [prompt.strip() for prompt in args.prompt.split("|")]
    prompts = rewritten(args, originals, seed)  # a server's failure costs no loading
    device = torch.device(args.device)
    pipeline = _load(args, device, dtype, options, loras)
    prompts = rewritten_by(pipeline, args, prompts, seed)
    pipeline.attention, pipeline.graphs = attention, BlockGraphs() if args.cuda_graphs else None
    noise = pipeline.noise(seed, len(prompts) * args.n, size)
    of_run = {
        "negative_prompt": args.negative_prompt,
        "steps": steps,
        "cfg": cfg,
        "seed": seed,
        "batch": len(prompts) * args.n,
        **_settings(args, variant, size, dtype),
    }
    paths = []
    for index, prompt in enumerate(prompts):
        if not prompt:
            log.warning("Prompt %d is empty: the picture will follow no description.", index + 1)
        desc = prompt[:40] or "(empty prompt)"
        # A warning about the prompt gets a line of its own above the bar.
        with logging_redirect_tqdm(), tqdm(total=steps, desc=desc, unit="step") as bar:
            images = pipeline(
                prompt,
                noise=noise[index * args.n : (index + 1) * args.n],
                size=size,
                steps=steps,
                cfg=cfg,
                negative=args.negative_prompt,
                on_step=_position(bar),
                guided=guided,
                step_cache=step_cache,
                nag=nag,
                later=prompts[index + 1 :],
            )
        for number, image in enumerate(images.cpu()):
            settings = {
                "prompt": prompt,
                **of_run,
                "index": index * args.n + number,
                **reasoner_settings(args, originals[index], prompt),
                **_unusual(options, args.attention, guided, step_cache, nag, pipeline.quantization, loras),
            }
            paths.append(save_png(image, args.out, settings))
    if pipeline.graphs is not None:
        log.info("CUDA graphs: %s.", pipeline.graphs.report(dict.fromkeys(pipeline.graphs.runs, 0)))
    return paths


def _settings(
    args: argparse.Namespace, variant: Variant, size: tuple[int, int], dtype: torch.dtype
) -> dict[str, Any]:
    """What every PNG of a run holds of its model and its size."""
    return {
        "height": size[0],
        "width": size[1],
        "n": args.n,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.device(args.device).type,
        "checkpoint": Path(args.repo_id).resolve().name,
        "variant": variant.name,
        **_other_parts(args),
    }


def _load(
    args: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    options: EncoderOptions,
    loras: Sequence[Choice],
) -> LensPipeline:
    # Lines about the LoRAs get lines of their own above the bar.
    with logging_redirect_tqdm(), tqdm(desc="Loading", unit="tensor", leave=False, disable=None) as bar:
        budget = _limited(device, args.vram_budget)
        return LensPipeline.from_folder(
            args.repo_id,
            device,
            dtype,
            _count(bar),
            options,
            args.quant_transformer,
            args.offload,
            budget,
            loras,
            text_encoder=args.text_encoder,
            vae=args.vae,
        )


def _count(bar: tqdm) -> OnStep:
    """A callback (done, total) that moves the bar by one."""
    return lambda *_: bar.update()


def _position(bar: tqdm) -> OnStep:
    """A callback (done, total) that moves the bar to a step, back too where a picture is begun again."""
    return lambda done, _: bar.update(done - bar.n)


def _limited(device: torch.device, gigabytes: float | None) -> float | None:
    """The budget in bytes, which the GPU's allocator now enforces."""
    if gigabytes is None:
        return None
    number = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(number).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total), number)
    return gigabytes * 1e9


def _check(args: argparse.Namespace) -> tuple[torch.dtype, Variant, tuple[int, int]]:
    """Dtype, variant and (height, width) that the flags mean; raises before anything is loaded."""
    if args.dtype not in DTYPES:
        reason = " (float16 overflows: Lens' values reach 1.4e5)" if args.dtype == "float16" else ""
        raise SettingError(f"--dtype must be one of {', '.join(DTYPES)}, got {args.dtype}{reason}.")
    if args.quant_transformer not in CHOICES:
        listed = ", ".join(CHOICES)
        raise SettingError(f"--quant_transformer must be one of {listed}, got {args.quant_transformer}.")
    for flag, value in (("--n", args.n), ("--steps", args.steps)):
        if value is not None and value < 1:
            raise SettingError(f"{flag} must be at least 1, got {value}.")
    if args.offload not in OFFLOADS:
        raise SettingError(f"--offload must be one of {', '.join(OFFLOADS)}, got {args.offload}.")
    if args.vram_budget is not None and not args.vram_budget > 0:
        raise SettingError(f"--vram_budget must be above 0 GB, got {args.vram_budget}.")
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
    _check_parts(args)
    _check_device(args.device)
    if args.vram_budget is not None and torch.device(args.device).type != "cuda":
        raise SettingError(
            f"--vram_budget limits an NVIDIA GPU, but --device is {args.device}. Leave it out."
        )
    folder = Path(args.repo_id)
    # A link's own name counts too: caches keep the files under a hash.
    variant = variant_of(f"{folder.absolute().name} {folder.resolve().name}")
    return _dtype(args), variant, _size(args)


def _check_parts(args: argparse.Namespace) -> None:
    """Raise SettingError for a Lens folder that lacks a part which no flag gives."""
    if not Path(args.repo_id, "transformer").is_dir():
        return  # what is wrong with it is said as it is opened
    for part in ("text_encoder", "vae"):
        if getattr(args, part) is None and not Path(args.repo_id, part).is_dir():
            raise SettingError(
                f"{args.repo_id} has no {part}/. Take it from another folder or a file with --{part} PATH."
            )


def _dtype(args: argparse.Namespace) -> torch.dtype:
    """What the flag says, or float32 on a GPU that only imitates bfloat16."""
    dtype, device = DTYPES[args.dtype], torch.device(args.device)
    if dtype != torch.bfloat16 or device.type != "cuda":
        return dtype
    with torch.cuda.device(device):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return dtype
    log.warning(
        "This GPU has no bfloat16, so Lens is computed in float32: slower, and with twice the memory. "
        "(float16 is no way out: Lens' values overflow it.)"
    )
    return torch.float32


def _attention(args: argparse.Namespace, dtype: torch.dtype) -> Attention | None:
    """The denoiser's attention that the flag means; raises before anything is loaded."""
    if args.attention not in ATTENTIONS:
        raise SettingError(f"--attention must be one of {', '.join(ATTENTIONS)}, got {args.attention}.")
    if args.attention == "auto":
        return None
    return flash3_on(torch.device(args.device), dtype, DenoiserConfig().attention_head_dim)


def _savings(args: argparse.Namespace) -> tuple[Interval, StepCacheOptions, NagOptions]:
    """The guided steps, step cache and NAG that the flags mean; raises before anything is loaded."""
    flag = "--guidance_interval"
    try:
        guided = Interval(*args.guidance_interval)
        flag = "--step_cache"
        step_cache = StepCacheOptions(threshold=args.step_cache)
        flag = "--nag_scale"
        return guided, step_cache, NagOptions(args.nag_scale)
    except SettingError as error:
        raise SettingError(f"{flag}: {error}") from error


def _encoder_options(args: argparse.Namespace) -> EncoderOptions:
    """What the text encoder's flags mean; raises before anything is loaded."""
    if args.encoder_placement not in PLACEMENTS:
        listed = ", ".join(PLACEMENTS)
        raise SettingError(f"--encoder_placement must be one of {listed}, got {args.encoder_placement}.")
    if args.encoder_placement in ("gpu", "stream") and torch.device(args.device).type == "cpu":
        raise SettingError(
            f"--encoder_placement {args.encoder_placement} needs a GPU, but --device is {args.device}. "
            "Use auto or cpu, or another --device."
        )
    date = {"pinned": TEMPLATE_DATE, "today": today()}.get(args.template_date, args.template_date)
    try:
        check_date(date)
    except SettingError as error:
        raise SettingError(f"--template_date must be pinned, today or a date: {error}") from error
    return EncoderOptions(
        dense=args.disable_mxfp4,
        placement=args.encoder_placement,
        feature_cache=_cache_folder("--feature_cache", args.feature_cache),
        extended=args.extended_prompt,
        date=date,
    )


def _cache_folder(flag: str, value: str) -> Path | None:
    if value == OFF:
        return None
    if not value.strip() or (Path(value).exists() and not Path(value).is_dir()):
        raise SettingError(f"{flag} must be a folder, got {value!r}, which is none. Give another.")
    return Path(value)


def _unusual(
    options: EncoderOptions,
    attention: str,
    guided: Interval,
    step_cache: StepCacheOptions,
    nag: NagOptions,
    quantization: str,
    loras: Sequence[Choice],
) -> dict[str, Any]:
    """Settings for the PNG that are not the default; kept text features and CUDA graphs change nothing."""
    usual = EncoderOptions()
    settings = {
        "disable_mxfp4": (options.dense, usual.dense),
        "encoder_placement": (options.placement, usual.placement),
        "extended_prompt": (options.extended, usual.extended),
        "template_date": (options.date, usual.date),
        "guidance_interval": ([guided.start, guided.end], [WHOLE.start, WHOLE.end]),
        "step_cache": (step_cache.threshold, STEP_CACHE_OFF.threshold),
        "nag_scale": (nag.scale, NAG_OFF.scale),
        "attention": (attention, "auto"),
        "quant_transformer": (quantization, NONE),
        "lora": ([str(lora) for lora in loras], []),
    }
    return {name: value for name, (value, default) in settings.items() if value != default}


def _other_parts(args: argparse.Namespace) -> dict[str, str]:
    """Names of the parts that are not the folder's own, for the PNG."""
    given = {"text_encoder": args.text_encoder, "vae": args.vae}
    return {name: path.resolve().name for name, path in given.items() if path is not None}


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


def show_cache(args: argparse.Namespace) -> str:
    """A line about the kept text features, which are deleted if asked."""
    folder = _cache_folder("--folder", args.folder)
    if folder is None:
        raise SettingError("No folder of text features is known here. Give it with --folder.")
    cache = FeatureCache(folder)
    if args.clear:
        return f"{cache.clear() / 1e6:,.1f} MB freed in {folder}"
    count = cache.count()
    return f"{count} {'entry' if count == 1 else 'entries'}, {cache.size() / 1e6:,.1f} MB in {folder}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors meant for the user are one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = build_parser().parse_args(argv)
    try:
        if args.command == "cache":
            print(show_cache(args))
        elif args.command == "quantize":
            _check_device(args.device)
            print(quantize(args))
        elif args.command == "check":
            _check_device(args.device)
            text, broken = check(args)
            print(text)
            return int(broken)
        elif args.command == "download":
            for line in download(args):
                print(line, flush=True)
        else:
            for path in generate(args):
                print(path)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130
    return 0
