"""``python -m lens_core quantize``: a denoiser, quantised once and for all into a file, LoRAs merged in."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .cli_flags import add_lora_flag
from .loading import open_denoiser
from .lora.merge import open_loras, parse_choice
from .quant.policy import MODES, NONE
from .quantize_file import quantize_file
from .weights.loader import OnTensor

log = logging.getLogger(__name__)


def add_quantize(commands: Any, device: str) -> None:
    """Add the command to ``argparse``'s sub-parsers; ``device`` is the default one."""
    parser = commands.add_parser(
        "quantize",
        help="write a denoiser with smaller weights",
        description="Writes the denoiser with quantised weights, for LensModelLoader and, but for the modes "
        "in 4-bit integers, ComfyUI's own loader. Cancelled and started again, it goes on where it was.",
        epilog="Modes: " + "; ".join(f"{name}: {mode.what}" for name, mode in MODES.items()) + ".",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="a Lens denoiser in bf16 or fp32: file or Lens folder")
    add_lora_flag(parser)
    modes = f"one of {', '.join(MODES)}; {NONE}: with --lora alone, which is then all that changes"
    add("--quant_transformer", required=True, metavar="MODE", help=modes)
    add("--out", required=True, type=Path, metavar="FILE", help="the .safetensors file to write")
    add("--device", default=device, help="where to quantise (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace a file of that name")


def quantize(args: argparse.Namespace) -> Path:
    """Write the file; returns its path. Raises LensError on bad settings."""
    file = open_denoiser(args.model)
    loras = open_loras(map(parse_choice, args.lora), file.sizes)
    with logging_redirect_tqdm(), tqdm(desc="Quantising", unit="tensor", leave=False, disable=None) as bar:
        try:
            return quantize_file(
                file,
                args.quant_transformer,
                args.out,
                args.device,
                _show(bar),
                overwrite=args.overwrite,
                loras=loras,
            )
        except KeyboardInterrupt:
            log.info("What is written is kept beside %s; the same command goes on there.", args.out)
            raise


def _show(bar: tqdm) -> OnTensor:
    """A callback (done, total) that sets the bar, which may begin in the middle."""

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show
