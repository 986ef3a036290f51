"""Reads a GGUF file's tensors as torch has them; the gguf package unpacks all but plain numbers."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .gguf_header import LENGTH, MAGIC, SCALARS, STRING, Array, GgufHeader, package
from .tensor_info import DTYPES, TensorInfo, cast
from .user_file import opened


def is_gguf(path: Path) -> bool:
    """Whether a file starts as GGUF files do, whatever its name."""
    if not os.path.isfile(path):
        return False
    with opened(path) as file:
        return file.read(len(MAGIC)) == MAGIC


class GgufCheckpoint:
    """The tensors of one GGUF file; shapes as torch has them, dtypes as GGUF names its types."""

    def __init__(self, path: Path) -> None:
        header = GgufHeader(path)
        self.paths = [path]
        self.metadata: dict[str, Any] = header.metadata
        self.header: dict[str, TensorInfo] = header.tensors
        self.header_bytes = header.data_start

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
        array = self.metadata.get(key)
        if not isinstance(array, Array) or array.kind != STRING:
            return []
        content, result, at = self._content(array), [], 0
        for _ in range(array.count):
            start = at + LENGTH.size
            at = start + LENGTH.unpack_from(content, at)[0]
            result.append(content[start:at].decode("utf-8", "replace"))
        return result

    def numbers(self, key: str) -> list[Any]:
        """An array of numbers of the metadata, read now; empty where there is none."""
        array = self.metadata.get(key)
        if not isinstance(array, Array) or array.kind == STRING:
            return []
        return list(struct.unpack(f"<{array.count}{SCALARS[array.kind]}", self._content(array)))

    def _content(self, array: Array) -> bytes:
        with opened(self.paths[0]) as file:
            file.seek(array.start)
            content = file.read(array.stop - array.start)
        if len(content) < array.stop - array.start:
            raise CheckpointError(f"{self.name} has become shorter since it was opened. Choose it again.")
        return content


def _dequantize(info: TensorInfo, dtype: torch.dtype) -> Tensor:
    """By the gguf package, a piece at a time: it works in fp32."""
    gguf = package()
    kind = gguf.GGMLQuantizationType[info.dtype]
    result = torch.empty(info.shape, dtype=dtype)
    if not result.numel():
        return result
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
