"""What the files of the models folder are, each looked at once: the page asks for every list each time it is
opened or refreshed."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

from ...lens_core.config import Variant
from ...lens_core.errors import LensError
from ...lens_core.weights import Kind, inspect
from .stamp import stamp_of

log = logging.getLogger(__name__)


def holds(path: Path, component: str) -> bool:
    """Whether a file or a component's folder is, or has in it, what a loader takes.

    One that cannot be opened is not; the log says why, once until it changes.
    """
    try:
        return any(kind.component == component for kind in _kinds_at(path))
    except OSError:  # removed between the list and here, or not ours to read
        return False


def variant_in(path: Path) -> Variant | None:
    """Which published checkpoint a denoiser's file or folder is; None where it is gone, or none."""
    try:
        return next((kind.variant for kind in _kinds_at(path) if kind.variant is not None), None)
    except OSError:
        return None


def _kinds_at(path: Path) -> tuple[Kind, ...]:
    files = sorted(filter(Path.is_file, path.iterdir())) if path.is_dir() else [path]
    return _kinds(path, stamp_of(files))


@lru_cache(maxsize=4096)
def _kinds(path: Path, stamp: str) -> tuple[Kind, ...]:
    try:
        return inspect(path)
    except (LensError, OSError) as error:
        log.warning("Lens: not in the loaders' lists: %s", error)
        return ()
