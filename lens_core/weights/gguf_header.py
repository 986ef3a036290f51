"""Reads the header of a GGUF file: its metadata, and where its tensors lie.

Parsed here rather than by the ``gguf`` package, whose reader makes four Python objects of every one of a
tokenizer's 650,000 strings, maps the file (which ends the program if the file becomes shorter meanwhile),
and answers a cut file with an IndexError. What a type's blocks hold is that package's to know.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, MissingPackage
from .tensor_info import TensorInfo, is_addressable
from .user_file import opened

MAGIC = b"GGUF"
STRING, _ARRAY = 8, 9
# struct codes of GGUF's value types; 8 is a string and 9 an array.
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
LENGTH = struct.Struct("<Q")
# A denoiser's header has 0.1 MB, one with a tokenizer 12 MB: the first piece is often all.
_PIECES = (2**20, 32 * 2**20)
_MOST_TENSORS, _MOST_KEYS = 50_000, 10_000
_MOST_DIMENSIONS = 8
_LONGEST_NAME = 500
_LARGEST_ALIGNMENT = 2**20


@dataclass(frozen=True)
class Array:
    """Where an array of the metadata lies; tokenizers have too many elements to decode each time."""

    kind: int
    count: int
    start: int
    stop: int


class GgufHeader:
    """``metadata`` by key (arrays as ``Array``), ``tensors`` by name, and where their data begin.

    Raises CheckpointError where the header is in any way not as the format wants it.
    """

    def __init__(self, path: Path) -> None:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            for piece in _PIECES:
                file.seek(0)
                try:
                    parser = _Parser(file.read(piece), size)
                    break
                except _Short:
                    continue
                except _Odd as error:
                    raise CheckpointError(f"{path.name} {error}") from error
            else:
                raise CheckpointError(
                    f"{path.name} is damaged: its GGUF header has more than {piece:,} bytes. "
                    "Download it again."
                )
        self.metadata = parser.metadata
        self.data_start = parser.data_start
        self.tensors = _infos(path, parser, size)


class _Short(Exception):
    """The header goes on after what was read of it."""


class _Odd(Exception):
    """What is wrong with a header and what to do, to follow the file's name."""


def _damaged(why: str) -> _Odd:
    return _Odd(f"is damaged: {why}. Download it again.")


class _Parser:
    """Walks the start of a file of ``size`` bytes once: metadata, then the rows of the tensors."""

    def __init__(self, content: bytes, size: int) -> None:
        self.content, self.size, self.at = content, size, len(MAGIC)
        version = self._scalar("I")
        if version not in (2, 3):
            raise _Odd(
                f"is a GGUF of version {version & 0xFFFF or 'another byte order'}; expected 2 or 3, "
                "little-endian. Download a current file."
            )
        count, keys = self._scalar("Q"), self._scalar("Q")
        if count > _MOST_TENSORS or keys > _MOST_KEYS:
            raise _damaged(f"its GGUF header announces {count:,} tensors and {keys:,} values")
        self.metadata = _unique(self._entry() for _ in range(keys))
        self.rows = _unique(self._tensor() for _ in range(count))
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _LARGEST_ALIGNMENT:
            raise _damaged(f"its alignment is {alignment!r:.40}")
        self.data_start = -(-self.at // alignment) * alignment

    def _skip(self, count: int) -> int:
        """Where the next ``count`` bytes begin; they are passed over."""
        start, self.at = self.at, self.at + count
        if self.at > self.size:
            raise _Odd(
                f"is cut short or damaged: its GGUF header does not end within its {self.size:,} bytes. "
                "Download it again."
            )
        if self.at > len(self.content):
            raise _Short
        return start

    def _scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.content, self._skip(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        start = self._skip(self._scalar("Q"))
        return self.content[start : self.at].decode("utf-8", "replace")

    def _name(self) -> str:
        name = self._string()
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise _damaged(f"a value or tensor is called {name!r:.60}")
        return name

    def _entry(self) -> tuple[str, Any]:
        name, kind = self._name(), self._scalar("I")
        if kind == STRING:
            return name, self._string()
        if kind == _ARRAY:
            return name, self._array(name, self._scalar("I"), self._scalar("Q"))
        if kind not in SCALARS:
            raise _damaged(f"{name} is of the unknown type {kind}")
        return name, self._scalar(SCALARS[kind])

    def _array(self, name: str, kind: int, count: int) -> Array:
        start = self.at
        if kind == STRING:
            self._skip_strings(count)
        elif kind in SCALARS:
            self._skip(count * struct.calcsize("<" + SCALARS[kind]))
        else:  # llama.cpp has no arrays of arrays either
            raise _damaged(f"{name} is an array of the unknown type {kind}")
        return Array(kind, count, start, self.at)

    def _skip_strings(self, count: int) -> None:
        at, content, end = self.at, self.content, len(self.content) - LENGTH.size
        for _ in range(count):
            if at > end:
                break
            at += LENGTH.size + LENGTH.unpack_from(content, at)[0]
        else:
            self._skip(at - self.at)
            return
        self._skip(at + LENGTH.size - self.at)

    def _tensor(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        name, dimensions = self._name(), self._scalar("I")
        if dimensions > _MOST_DIMENSIONS:
            raise _damaged(f"{name} has {dimensions:,} dimensions")
        sizes = [self._scalar("Q") for _ in range(dimensions)]
        if not is_addressable(sizes):
            raise _damaged(f"{name} has the shape {sizes}")
        return name, (tuple(reversed(sizes)), self._scalar("I"), self._scalar("Q"))


def _unique(entries: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, entry in entries:
        if name in result:
            raise _damaged(f"it has {name} twice")
        result[name] = entry
    return result


def _infos(path: Path, parser: _Parser, size: int) -> dict[str, TensorInfo]:
    infos = {
        name: _info(path, name, shape, kind, parser.data_start + offset)
        for name, (shape, kind, offset) in parser.rows.items()
    }
    end = max((info.offset + info.nbytes for info in infos.values()), default=0)
    if end > size:
        raise CheckpointError(
            f"{path.name} is cut short: {size:,} bytes instead of {end:,}. Download it again."
        )
    return infos


def _info(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
    dtype, block, nbytes = _type(path, kind)
    row = shape[-1] if shape else 1
    if row % block:
        raise CheckpointError(
            f"{path.name} is damaged: {name} has rows of {row:,} numbers, which are no "
            f"whole blocks of {block} as {dtype} has them. Download it again."
        )
    return TensorInfo(path, shape, dtype, offset, math.prod(shape) // block * nbytes)


def package() -> Any:
    """The gguf package; MissingPackage where there is none or too old a one."""
    try:
        import gguf
        from gguf.constants import GGMLQuantizationType

        _ = GGMLQuantizationType.MXFP4
    except (ImportError, AttributeError) as error:
        raise MissingPackage(
            "Reading a GGUF file needs the gguf package, 0.18 or newer: pip install 'gguf>=0.18'."
        ) from error
    return gguf


def _type(path: Path, number: int) -> tuple[str, int, int]:
    """Name of a tensor type, and how many numbers a block of it holds in how many bytes."""
    gguf = package()
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError as error:
        raise CheckpointError(
            f"{path.name} has a tensor of type {number}, which the installed gguf package does not know. "
            "Update it (pip install -U gguf), or download the file again."
        ) from error
    return (kind.name, *gguf.GGML_QUANT_SIZES[kind])
