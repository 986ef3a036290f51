"""Loading a folder of F32 shards to bf16, beside reading its bytes: from the disk and from the page cache.

    python benchmarks/load.py [--gigabytes 4] [--rounds 3] [--out FOLDER] [--folder SCRATCH]

A denoiser of full width with fewer blocks, random weights, two shards and their index, as diffusers writes
them. Each measurement is a process of its own. "disk" drops the files from the page cache first, as far as
the system does that on request; "cache" has read them before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

from benchmarks.common import RESULTS, write
from lens_core.config import DenoiserConfig
from lens_core.denoiser import LensDenoiser
from lens_core.loading import load_denoiser

_CHUNK = 16 * 2**20


def write_folder(folder: Path, gigabytes: float) -> None:
    """Two shards of F32 tensors and their index, one block at a time in memory."""
    from safetensors.torch import save_file

    state = LensDenoiser(DenoiserConfig(num_layers=1), dtype=torch.float32, device="meta").state_dict()
    block = sum(tensor.nbytes for name, tensor in state.items() if "transformer_blocks" in name)
    rest = sum(tensor.nbytes for tensor in state.values()) - block
    blocks = max(2, round((gigabytes * 1e9 - rest) / block))
    state = LensDenoiser(DenoiserConfig(num_layers=blocks), dtype=torch.float32, device="meta").state_dict()
    names, where = sorted(state), {}
    generator = torch.Generator().manual_seed(0)
    for index, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"diffusion_pytorch_model-{index:05d}-of-00002.safetensors"
        tensors = {name: torch.randn(state[name].shape, generator=generator) for name in part}
        save_file(tensors, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(part, file))
    content = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(content, encoding="utf-8")


def read_bytes(folder: Path) -> None:
    """Every byte of the files, into one buffer again and again."""
    buffer = memoryview(bytearray(_CHUNK))
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):  # type: ignore[attr-defined]
                pass


def load(folder: Path) -> None:
    """To bf16, as the loaders do."""
    load_denoiser(folder, torch.bfloat16)


TASKS: dict[str, Callable[[Path], None]] = {"read": read_bytes, "load": load}


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(task: str, folder: Path) -> dict[str, float]:
    """Seconds of one task in this process, and how much more memory, mapped files included, it took."""
    before, start = _peak_gb(), time.perf_counter()
    TASKS[task](folder)
    return {"seconds": time.perf_counter() - start, "peak GB": _peak_gb() - before}


def _peak_gb() -> float:
    """Of this process alone, as Linux tells it (getrusage begins with the parent's)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e9


def measured(task: str, folder: Path, rounds: int, cold: bool) -> dict[str, float]:
    """Medians of several processes."""
    results = []
    for _ in range(rounds):
        forget(folder) if cold else read_bytes(folder)
        command = [sys.executable, __file__, "--task", task, "--folder", str(folder)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results.append(json.loads(output.splitlines()[-1]))
    return {name: statistics.median(result[name] for result in results) for name in results[0]}


def main() -> None:
    """Measure all, write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4, help="size of the folder")
    parser.add_argument("--rounds", type=int, default=3, help="processes of which the median is taken")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for load.json and load.md")
    parser.add_argument("--folder", type=Path, default=None, help="where the files can lie for a while")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(measure(args.task, args.folder)))
        return
    results: dict[str, Any] = {}
    rows = [
        ["from", "reading all bytes, s", "loading to bf16, s", "ratio", "weights, GB", "memory taken, GB"]
    ]
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        write_folder(folder, args.gigabytes)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
        for place, cold in (("disk", True), ("cache", False)):
            read, loaded = (measured(task, folder, args.rounds, cold) for task in ("read", "load"))
            ratio = loaded["seconds"] / read["seconds"]
            results[place] = {"GB of the folder": size, "read": read, "load": loaded, "ratio": ratio}
            numbers = (read["seconds"], loaded["seconds"], ratio, size / 2, loaded["peak GB"])
            rows.append([place, *(f"{number:.2f}" for number in numbers)])
    write("load", args.out, results, rows)


if __name__ == "__main__":
    main()
