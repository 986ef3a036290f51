"""What the files of the models folder are, each looked at once: the page asks for every list each time it is
opened or refreshed."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

from ...lens_core.errors import LensError
from ...lens_core.weights import inspect

log = logging.getLogger(__name__)
_Stamp = tuple[tuple[str, int, int], ...]


def holds(path: Path, component: str) -> bool:
    """Whether a file or a component's folder is, or has in it, what a loader takes.

    One that cannot be opened is not; the log says why, once until it changes.
    """
    try:
        return component in _components(path, _stamp(path))
    except OSError:  # removed between the list and here, or not ours to read
        return False


def _stamp(path: Path) -> _Stamp:
    """Names, sizes and times of change of a file, or of the files in a folder."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return tuple((file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()])


@lru_cache(maxsize=4096)
def _components(path: Path, stamp: _Stamp) -> frozenset[str]:
    try:
        return frozenset(kind.component for kind in inspect(path))
    except (LensError, OSError) as error:
        log.warning("Lens: not in the loaders' lists: %s", error)
        return frozenset()
