"""Whether files have changed since: by their names, sizes and times of change."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def stamp_of(files: Iterable[Path]) -> str:
    """Changes with each of these files; "" of none. Raises OSError where one is gone.

    By their names alone: ComfyUI writes fingerprints into pictures, where nobody's folders belong.
    """
    stats = [(file.name, file.stat()) for file in files]
    return str([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]) if stats else ""
