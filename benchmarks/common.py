"""What every benchmark shares: the machine's name, timing, and writing results."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def median_ms(run: Callable[[], Any], rounds: int = 15, warm: int = 3) -> float:
    """Median wall time of a call that ends with the GPU idle, launches included, in milliseconds."""
    for _ in range(warm):
        run()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def peak_gb(run: Callable[[], Any]) -> float:
    """GB of GPU memory that a call takes at most beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def machine() -> dict[str, Any]:
    """Where and when."""
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "cpu": _cpu(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "command": f"python benchmarks/{Path(sys.argv[0]).name}",
    }


def _cpu() -> str:
    """The processor's name: launching kernels takes as long as running the short ones."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def write(name: str, folder: Path, results: dict[str, Any], table: Sequence[Sequence[Any]]) -> None:
    """``<name>.json`` with everything and ``<name>.md`` with a table, its first row the head."""
    folder.mkdir(parents=True, exist_ok=True)
    where = machine()
    content = json.dumps({"machine": where, **results}, indent=1)
    (folder / f"{name}.json").write_text(content + "\n", encoding="utf-8")
    head, *rows = [[str(cell) for cell in row] for row in table]
    lines = [
        f"# {name}",
        "",
        f"{where['date']}, {where['gpu']}, {where['cpu']}, torch {where['torch']}: `{where['command']}`",
        "",
        *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)),
    ]
    text = "\n".join(lines) + "\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
