"""SHA-256 of a file of any size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

_CHUNK = 8 * 2**20


def sha256(path: Path, on_progress: Callable[[int, int], object]) -> str:
    """Hex digest of a file; ``on_progress`` gets the bytes (done, total) as they are read, and may raise to
    stop. Raises OSError."""
    digest, total = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            on_progress(file.tell(), total)
    return digest.hexdigest()
