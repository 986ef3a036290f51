"""Opens cases one after another and says what went wrong; a process of its own, since one may end it.

Limits: 2 s of CPU time a case, 1 GiB of address space more than at the start. A case fails where anything
but a LensError comes out, or one whose message is not fit to show; where a tensor lies outside its file; and
where a safetensors file is accepted that the safetensors package refuses.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lens_core.errors import LensError
from lens_core.loading import load_vae, open_denoiser, open_encoder
from lens_core.lora.file import open_lora
from lens_core.weights.kind import inspect
from lens_core.weights.loader import AnyCheckpoint
from lens_core.weights.opening import open_any
from lens_core.weights.reader import Checkpoint
from tests.fuzz.bases import linears
from tests.fuzz.cases import Case, case

CPU_SECONDS, WALL_SECONDS, MEMORY = 2.0, 60.0, 2**30
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= dict.fromkeys(("F64", "I64", "U64", "C64"), 64) | dict.fromkeys(("F32", "I32", "U32"), 32)
_BITS |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)


class Hang(BaseException):
    """The case took too long; no ``except Exception`` may hide it."""


def _open_encoder(path: Path) -> Any:
    file = open_encoder(path)
    _ = file.config
    return file.tokenizer("a red circle")


OPEN: dict[str, Callable[[Path], Any]] = {
    "denoiser": open_denoiser,
    "encoder": _open_encoder,
    "vae": lambda path: load_vae(path, torch.bfloat16),
    "lora": lambda path: open_lora(path).match(linears()).summary(1.0),
}


def write(found: Case, folder: Path) -> Path:
    """Make the files; returns what to open."""
    for name, file in found.files.items():
        with (folder / name).open("wb") as target:
            target.write(file.start)
            target.truncate(file.size)
    for name, target_name in (found.links or {}).items():
        (folder / name).symlink_to(target_name)
    return folder / found.path


def run(found: Case, folder: Path, number: int) -> str:
    """What happened: "opened", or the refusal's message. AssertionError for what must not happen."""
    path = write(found, folder)
    with suppress(LensError):
        if number % 2:
            inspect(path)
        _check(open_any(path), number)
    try:
        OPEN[found.component](path)
    except LensError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 5000, f"not fit to show: {message[:300]!r}"
        names = (*found.files, folder.name)
        assert any(name in message for name in names), f"names no file: {message}"
        assert message.endswith("."), f"no sentence: {message}"
        return message
    return "opened"


def _check(checkpoint: AnyCheckpoint, number: int) -> None:
    """Everything that was found lies in the file, and can be read: every fourth tensor, for time's sake."""
    sizes = {path: path.stat().st_size for path in checkpoint.paths}
    small = sum(sizes.values()) < MEMORY // 8
    for index, (name, info) in enumerate(checkpoint.header.items()):
        assert 0 <= info.offset <= info.offset + info.nbytes <= sizes[info.path], (
            f"{name} lies outside: {info}"
        )
        if isinstance(checkpoint, Checkpoint):
            assert info.nbytes * 8 == prod(info.shape) * _BITS.get(info.dtype, 8), (
                f"{name} has another size: {info}"
            )
        if small and len(checkpoint.header) < 200 and (index + number) % 4 == 0:
            with suppress(LensError):
                assert list(checkpoint.read(name).shape) == list(info.shape) or info.dtype == "F4"
    for path in checkpoint.paths if small and isinstance(checkpoint, Checkpoint) else []:
        try:
            safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise AssertionError(f"the safetensors package refuses it: {error}") from error


def _hang(*_: object) -> None:
    raise Hang


def _one(number: int, seed: int, folder: Path) -> tuple[str, str | None]:
    """The outcome, and what is wrong with it."""
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        found = case(number, seed)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        return run(found, folder, number), None
    except BaseException:  # noqa: BLE001 - whatever it is, it is the finding
        return "failed", traceback.format_exc(limit=-6)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for file in os.scandir(folder):
            os.unlink(file.path)


def main(folder: Path, first: int, count: int, seed: int = 0) -> dict[str, Any]:
    """Run cases; a dict of what came out."""
    logging.disable()
    signal.signal(signal.SIGPROF, _hang)
    signal.signal(signal.SIGALRM, _hang)
    inner = folder / "case"  # one for all: removing a folder takes longer than what else a case does
    inner.mkdir()
    _one(10**9, 0, inner)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, opened, failures, messages = time.process_time(), 0, {}, {}
    progress = os.open(folder / "number", os.O_CREAT | os.O_WRONLY)
    for number in range(first, first + count):
        os.pwrite(progress, f"{number:<12}".encode(), 0)
        outcome, failure = _one(number, seed, inner)
        if failure is not None:
            failures[number] = failure
        opened += outcome == "opened"
        messages.setdefault(outcome[:60], (number, outcome))
        if len(failures) >= 20:
            break
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "cases": number + 1 - first,
        "opened": opened,
        "failures": failures,
        "grown_mib": (after - before) / 1024,
        "seconds": time.process_time() - started,
        "messages": sorted(messages.values()),
    }


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[2:]]
    print(json.dumps(main(Path(sys.argv[1]), *arguments)))
