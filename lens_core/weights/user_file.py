"""Opens files that users bring: regular ones only, and what the operating system says as a sentence."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..errors import CheckpointError

# The index of the largest published models has 10 MB.
_LARGEST_JSON = 32 * 2**20


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file from its start; raises CheckpointError where there is none, or it cannot be read.

    A pipe or a device is refused: reading one may wait for ever, or never end.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}. Check the name, or download it again.") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not regular:
        raise CheckpointError(f"{path} is a folder, a pipe or a device. Expected a file; choose another.")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error


def read_json(path: Path) -> dict:
    """A JSON file as a dict; a broken one is named."""
    with opened(path) as file:
        text = file.read(_LARGEST_JSON + 1)
    if len(text) > _LARGEST_JSON:
        raise CheckpointError(
            f"{path} has more than {_LARGEST_JSON:,} bytes, too many for what it is. Download it again."
        )
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object. Download it again.")
    return content


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(
        f"{path} cannot be read ({reason}). Check its name and who may read it, or download it again."
    )
