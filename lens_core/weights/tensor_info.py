"""Where a stored tensor lies, and reading parts of it without keeping the file in memory.

Every tensor has a mapping of its own, so its pages go when it does. One that a module takes as it
lies stays mapped; one that is converted is read in pieces, and converting a file needs little more
memory than the result. (A slice of one mapping of the whole file, which safetensors makes, keeps all
that was ever read from it, and takes torch 10 ms each in a file of 13 GB.)
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError

# Names as safetensors spells them; GGUF's F64, F32, F16 and BF16 are the same.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_INTEGERS = frozenset(("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"))
_PIECE = 2 * 2**20


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, as its file's header says."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # as its format names it: F32, BF16, U8, Q8_0, ...
    offset: int  # of its first byte in the file
    nbytes: int

    @property
    def floating(self) -> bool:
        """Whether it stands for floating-point numbers, packed ones included."""
        return self.dtype not in _INTEGERS

    def bytes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of the first dimension as u8 [rows, bytes of a row], mapped for as long as
        this tensor lives."""
        rows = self.shape[0] if self.shape else 1
        stop = rows if stop is None else min(stop, rows)
        row = self.nbytes // max(rows, 1)
        first, length = self.offset + start * row, (stop - start) * row
        if length <= 0:
            return torch.empty(max(stop - start, 0), row, dtype=torch.uint8)
        skipped = first % mmap.ALLOCATIONGRANULARITY
        access = mmap.ACCESS_COPY  # writable for torch's sake; nothing is ever written
        try:
            with self.path.open("rb") as file:
                pages = mmap.mmap(file.fileno(), skipped + length, access=access, offset=first - skipped)
        except (OSError, ValueError) as error:  # ValueError: the file ends before the tensor
            raise CheckpointError(
                f"{self.path} has been changed or removed since it was opened ({error}). Choose it again."
            ) from error
        return torch.frombuffer(pages, dtype=torch.uint8, offset=skipped).view(stop - start, row)

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The same rows in the stored dtype, one of ``DTYPES``: [rows, ...]; a number is [1]."""
        raw = self.bytes(start, stop)
        dtype = DTYPES[self.dtype]
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(-1).view(dtype).view(raw.shape[0], *self.shape[1:])

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of pieces of about 2 MiB along the first dimension."""
        rows = self.shape[0] if self.shape else 1
        step = max(1, _PIECE * rows // max(self.nbytes, 1))
        return ((start, min(start + step, rows)) for start in range(0, rows, step))


def is_addressable(shape: Sequence[int]) -> bool:
    """Whether torch can have a tensor of this shape: its strides fit into 63 bits, even if it is empty."""
    return math.prod(max(size, 1) for size in shape) < 2**63


def cast(info: TensorInfo, dtype: torch.dtype) -> Tensor:
    """The whole tensor in ``dtype``, a piece at a time."""
    rows = info.shape[0] if info.shape else 1
    width = math.prod(info.shape[1:])
    result = torch.empty(rows, width, dtype=dtype)
    for start, stop in info.pieces():
        result[start:stop] = info.values(start, stop).view(stop - start, width)
    return result.view(info.shape)
