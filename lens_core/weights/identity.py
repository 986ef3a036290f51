"""A name for a checkpoint's weights that does not depend on where they lie, for caches."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLES, _SAMPLE = 32, 4096
_LARGEST_HEADER = 32 * 2**20


def identity(paths: list[Path]) -> str:
    """A hex digest of the files' sizes, times of change, starts and a few dozen samples of each.

    The start is the header (names, shapes, offsets) where it is a safetensors file. Not a proof that
    two files are equal, which would take reading them; enough that another or a changed file differs.
    """
    digest = hashlib.blake2b(digest_size=20)
    for path in paths:
        state = path.stat()
        digest.update(f"{state.st_size} {state.st_mtime_ns}".encode())
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            digest.update(start + file.read(length if length <= _LARGEST_HEADER else 2**20))
            for index in range(_SAMPLES):
                file.seek(index * max(0, state.st_size - _SAMPLE) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
