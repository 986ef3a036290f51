"""What the files of the models folder are, each looked at once: the page asks for every list each time it is
opened or refreshed."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

from ...lens_core.errors import LensError
from ...lens_core.weights import inspect
from .stamp import stamp_of

log = logging.getLogger(__name__)


def holds(path: Path, component: str) -> bool:
    """Whether a file or a component's folder is, or has in it, what a loader takes.

    One that cannot be opened is not; the log says why, once until it changes.
    """
    try:
        files = sorted(filter(Path.is_file, path.iterdir())) if path.is_dir() else [path]
        return component in _components(path, stamp_of(files))
    except OSError:  # removed between the list and here, or not ours to read
        return False


@lru_cache(maxsize=4096)
def _components(path: Path, stamp: str) -> frozenset[str]:
    try:
        return frozenset(kind.component for kind in inspect(path))
    except (LensError, OSError) as error:
        log.warning("Lens: not in the loaders' lists: %s", error)
        return frozenset()
