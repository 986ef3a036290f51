"""``python -m lens_core check``: a report on the computer, the fast paths and model files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .doctor import Examination
from .doctor import check as examine
from .doctor.report import OnProgress
from .errors import SettingError
from .loading import DTYPES

_DTYPES = {"auto": None, **DTYPES}


def add_check(commands: Any, device: str) -> None:
    """Add the command to ``argparse``'s sub-parsers; ``device`` is the default one."""
    parser = commands.add_parser(
        "check",
        help="report on the computer, the fast paths and files",
        description="Prints a report fit to be pasted into an issue: versions and GPUs, which fast paths run "
        "here (each is tested) and why not the others, what each file is and whether it is whole. Reads "
        "headers alone unless asked for more; downloads and changes nothing. Exit code 1: it found a fault",
    )
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE", help="files, Lens folders, or ComfyUI's models folder")
    add("--hash", action="store_true", help="SHA-256 of each file beside the published one (reads all of it)")
    add("--values", action="store_true", help="read all numbers and look for NaN, infinities and zeros")
    compare = (
        "compute with the files, and compare with transformers and diffusers (in ComfyUI: node LensDoctor)"
    )
    add("--parity", action="store_true", help=compare)
    add("--device", default=device, help="where to compute (default: %(default)s)")
    add("--dtype", default="auto", help=f"in what, one of {', '.join(_DTYPES)}; auto: as models do there")
    add("--paths", action="store_true", help="show folders too, the home folder as ~")
    add("--json", action="store_true", help="for machines")


def check(args: argparse.Namespace) -> tuple[str, bool]:
    """The report, and whether something is broken. Raises SettingError on bad settings."""
    if args.dtype not in _DTYPES:
        raise SettingError(f"--dtype must be one of {', '.join(_DTYPES)}, got {args.dtype}.")
    if args.parity and not args.files:
        raise SettingError("--parity compares files: name some, or a Lens folder.")
    examination = Examination(
        hashes=args.hash,
        values=args.values,
        parity=args.parity,
        paths=args.paths,
        device=torch.device(args.device),
        dtype=_DTYPES[args.dtype],
    )
    with _bar() as on_progress, logging_redirect_tqdm():
        report = examine(args.files, examination, on_progress)
    text = json.dumps(report.as_dict(), indent=1) if args.json else report.text()
    return text, report.broken > 0


@contextmanager
def _bar() -> Iterator[OnProgress]:
    """A callback that shows what is being done, on stderr where that is a terminal."""
    with tqdm(leave=False, disable=None, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}") as bar:

        def show(what: str, done: int, total: int) -> None:
            bar.total = max(total, 1)
            bar.n = min(done, bar.total)
            bar.set_description_str(what)

        yield show
