"""Reads a GGUF file's header, and its tensors as torch has them.

The header is parsed here rather than by the ``gguf`` package, whose reader makes four Python objects
of every one of a tokenizer's 650,000 strings and answers a cut file with an IndexError. What a type's
blocks hold is that package's to know: it gives the sizes and dequantises all but plain numbers.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, MissingPackage
from .tensor_info import DTYPES, TensorInfo, cast

MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# struct codes of GGUF's value types; 8 is a string and 9 an array.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_MOST_DIMENSIONS = 8
_LENGTH = struct.Struct("<Q")


def is_gguf(path: Path) -> bool:
    """Whether a file starts as GGUF files do, whatever its name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


class GgufCheckpoint:
    """The tensors of one GGUF file; shapes as torch has them, dtypes as GGUF names its types."""

    def __init__(self, path: Path) -> None:
        self.paths = [path]
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                parser = _Parser(path, content)
            except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
                raise CheckpointError(
                    f"{path.name} is cut short or damaged: its GGUF header does not end within its "
                    f"{len(content):,} bytes. Download it again."
                ) from error
        self.metadata: dict[str, Any] = parser.metadata
        self.header: dict[str, TensorInfo] = parser.tensors
        self.header_bytes = parser.data_start

    @property
    def name(self) -> str:
        """How to speak of it in an error."""
        return self.paths[0].name

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the CPU in ``dtype``; None: plain numbers as stored, quantised ones in bf16."""
        info = self.header[name]
        if info.dtype not in DTYPES:
            return _dequantize(info, torch.bfloat16 if dtype is None else dtype)
        if dtype is None or DTYPES[info.dtype] == dtype:
            return info.values().view(info.shape)
        return cast(info, dtype)

    def strings(self, key: str) -> list[str]:
        """An array of strings of the metadata, read now; empty where there is none."""
        span = self.metadata.get(key)
        if not isinstance(span, _Strings):
            return []
        with self.paths[0].open("rb") as file:
            file.seek(span.start)
            content = file.read(span.stop - span.start)
        result, at = [], 0
        for _ in range(span.count):
            start = at + 8
            at = start + _LENGTH.unpack_from(content, at)[0]
            result.append(content[start:at].decode("utf-8", "replace"))
        return result


class _Strings:
    """Where an array of strings lies; tokenizers have too many to decode each time."""

    def __init__(self, count: int, start: int, stop: int) -> None:
        self.count, self.start, self.stop = count, start, stop


class _Parser:
    """Walks the header once: metadata, then where the tensors lie."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.at = path, content, 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise CheckpointError(
                f"{path.name} is a GGUF of version {version & 0xFFFF or 'another byte order'}; expected 2 "
                "or 3, little-endian. Download a current file."
            )
        count, keys = self._scalar("Q"), self._scalar("Q")
        self.metadata = dict(self._entry() for _ in range(keys))
        rows = [self._tensor() for _ in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise IndexError
        self.data_start = -(-self.at // alignment) * alignment
        self.tensors = {name: self._info(shape, kind, offset) for name, shape, kind, offset in rows}
        self._check_size()

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.content, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        if self.at + length > len(self.content):
            raise IndexError
        self.at += length
        return self.content[self.at - length : self.at].decode("utf-8")

    def _entry(self) -> tuple[str, Any]:
        return self._string(), self._value(self._scalar("I"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._scalar("I"), self._scalar("Q"))
        if kind not in _SCALARS:
            raise IndexError
        return self._scalar(_SCALARS[kind])

    def _array(self, kind: int, count: int) -> Any:
        if kind == _STRING:
            start = at = self.at
            for _ in range(count):
                at += 8 + _LENGTH.unpack_from(self.content, at)[0]
            self.at = at
            return _Strings(count, start, at)
        if kind == _ARRAY:
            return [self._value(_ARRAY) for _ in range(count)]
        if kind not in _SCALARS:
            raise IndexError
        code = f"<{count}{_SCALARS[kind]}"
        values = list(struct.unpack_from(code, self.content, self.at))
        self.at += struct.calcsize(code)
        return values

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._scalar("I")
        if dimensions > _MOST_DIMENSIONS:
            raise IndexError
        sizes = [self._scalar("Q") for _ in range(dimensions)]
        return name, tuple(reversed(sizes)), self._scalar("I"), self._scalar("Q")

    def _info(self, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        name, block, size = _type(self.path, kind)
        nbytes = math.prod(shape) // block * size
        return TensorInfo(self.path, shape, name, self.data_start + offset, nbytes)

    def _check_size(self) -> None:
        end = max((info.offset + info.nbytes for info in self.tensors.values()), default=0)
        if end > len(self.content):
            raise CheckpointError(
                f"{self.path.name} is cut short: {len(self.content):,} bytes instead of {end:,}. Download "
                "it again."
            )


def _package() -> Any:
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
    gguf = _package()
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError as error:
        raise CheckpointError(
            f"{path.name} has a tensor of type {number}, which the installed gguf package does not know. "
            "Update it (pip install -U gguf), or download the file again."
        ) from error
    return (kind.name, *gguf.GGML_QUANT_SIZES[kind])


def _dequantize(info: TensorInfo, dtype: torch.dtype) -> Tensor:
    """By the gguf package, a piece at a time: it works in fp32."""
    gguf = _package()
    kind = gguf.GGMLQuantizationType[info.dtype]
    result = torch.empty(info.shape, dtype=dtype)
    raw = info if len(info.shape) > 1 else replace(info, shape=(1, *info.shape))
    rows = result.view(raw.shape[0], -1)
    for start, stop in raw.pieces():
        try:
            values = gguf.quants.dequantize(raw.bytes(start, stop).numpy(), kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{info.path.name} stores a tensor as {info.dtype}, which the gguf package cannot "
                "unpack. Choose a GGUF with F16, BF16 or Q8_0 attention."
            ) from error
        rows[start:stop] = torch.from_numpy(values).view(stop - start, -1)
    return result
