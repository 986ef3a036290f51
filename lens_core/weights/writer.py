"""Writes a safetensors file a step at a time, and goes on where an earlier writer was stopped.

Names, dtypes and shapes are known before the first tensor is made, so the header goes first and the data
follow in order: no more than a step is ever in memory. Until it is whole the file is called
``<target>.part``; its header says what it becomes, so one with the same header is the same work, begun.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import CheckpointError, SettingError
from .tensor_info import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The disk has all but the steps since the last multiple of this; a power cut can leave zeros in those.
SYNC = 8
_FULL = (errno.ENOSPC, errno.EDQUOT)


def part_of(target: Path) -> Path:
    """What a file is called until it is whole."""
    return target.with_name(f"{target.name}.part")


class SteppedWriter:
    """One file: a context manager that opens its part; then ``write`` for each step from ``done`` on, then
    ``finish``. Raises CheckpointError where the disk will not have it."""

    def __init__(
        self,
        target: Path,
        steps: Sequence[Mapping[str, Tensor]],
        metadata: Mapping[str, str],
        *,
        resume: bool = True,
    ) -> None:
        """``steps``: the tensors of each in the order of the file, without memory. Without ``resume`` a part
        is begun anew and not kept: for tensors that the header does not tell from others."""
        self.target, self.steps, self.done, self.resume = target, steps, 0, resume
        self.part = part_of(target)
        self._head, self._ends = _layout(steps, metadata)
        self._file: IO[bytes] | None = None

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self._ends[-1]

    def is_written(self) -> bool:
        """Whether the target is there, whole and with this header."""
        if not self.target.is_file() or self.target.stat().st_size != self.size:
            return False
        with self.target.open("rb") as file:
            return file.read(len(self._head)) == self._head

    def check_room(self) -> None:
        """Raise SettingError where the disk has less free than is still to be written."""
        with self._trouble():
            self.target.parent.mkdir(parents=True, exist_ok=True)
            there = self.part.stat().st_size if self.part.is_file() else 0
            free = shutil.disk_usage(self.target.parent).free
        if self.size - there > free:
            raise SettingError(
                f"{self.target.name} needs {(self.size - there) / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are "
                f"free in {self.target.parent}. Free some space, or choose another folder."
            )

    def __enter__(self) -> SteppedWriter:
        with self._trouble():
            self._file = self.part.open("a+b", buffering=0)
        try:
            with self._trouble():
                _lock(self._file, self.part)
                self.done = self._resume(self._file)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Leave what is written for the next time, if there is something to go on from."""
        if self._file is not None:
            self._file.close()
            if self.done == 0 or not self.resume:
                with contextlib.suppress(OSError):
                    self.part.unlink()

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """The next step's tensors, on any device."""
        assert self._file is not None
        for name, expected in self.steps[self.done].items():
            tensor = tensors[name]
            if tensor.dtype != expected.dtype or tensor.numel() != expected.numel():
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not as the header says")
            with self._trouble():
                _write(self._file, _bytes(tensor))
        self.done += 1
        if self.done % SYNC == 0:
            with self._trouble():
                os.fsync(self._file.fileno())

    def finish(self) -> Path:
        """Give the whole file its name, in one go; returns it."""
        assert self._file is not None and self.done == len(self.steps)
        with self._trouble():
            os.fsync(self._file.fileno())
            self._file.close()  # Windows renames no open file
            self.part.replace(self.target)
        self._file = None
        return self.target

    def _resume(self, file: IO[bytes]) -> int:
        """Cut the part back to the last steps that the disk surely has, or begin it; returns their number."""
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if not self.resume or file.read(len(self._head)) != self._head:
            file.truncate(0)
            _write(file, memoryview(self._head))
            return 0
        whole = bisect.bisect_right(self._ends, size)
        done = max(0, whole - 1) // SYNC * SYNC
        file.truncate(self._ends[done - 1] if done else len(self._head))
        return done

    @contextlib.contextmanager
    def _trouble(self) -> Iterator[None]:
        """Turns what the operating system says into a sentence."""
        try:
            yield
        except OSError as error:
            folder = self.target.parent
            if error.errno in _FULL:
                raise CheckpointError(
                    f"The disk of {folder} is full; {self.target.name} takes {self.size / 1e6:,.1f} MB. Free "
                    "some space and start it again: it goes on where it stopped."
                ) from error
            raise CheckpointError(
                f"{self.target} cannot be written ({error.strerror or error}). Give a folder that may be "
                "written to, and close programs that have the file open."
            ) from error


def _layout(steps: Sequence[Mapping[str, Tensor]], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """The start of the file, padded so that the data begin at a multiple of 8, and where each step ends."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    at, ends = 0, []
    for step in steps:
        for name, tensor in step.items():
            start, at = at, at + tensor.nbytes
            entries[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, at],
            }
        ends.append(at)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, [len(head) + end for end in ends]


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def _write(file: IO[bytes], data: memoryview) -> None:
    """All of it: the operating system may take less at a time."""
    while data:
        data = data[file.write(data) :]


def _lock(file: IO[bytes], path: Path) -> None:
    """Raise CheckpointError where another process is writing the file, which would mix the two."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    taken = False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        taken = True
    except OSError:  # a file system without locks
        return
    # One that has just finished has given it its name.
    if taken or not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        raise CheckpointError(
            f"{path} is being written by another program. Wait for it, or give another name."
        )
