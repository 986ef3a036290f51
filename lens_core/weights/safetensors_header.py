"""Reads the header of a safetensors file: which tensors it holds, and where they lie.

Written here, although the safetensors package has it: that maps the file first, and a mapped file that
becomes shorter ends the whole program; it takes headers of 100 MB; and what another parser than ours found
in order proves nothing about what ours found. A file that this accepts, that package does too.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .other_formats import START, other_format
from .tensor_info import TensorInfo, is_addressable
from .user_file import opened

# Of published files none has a header of more than 2 MB; metadata written by trainers can have more.
LARGEST_HEADER = 16 * 2**20
# Braces and brackets: a tensor has three. What these cost to parse is bounded, unlike what 16 MB could hold.
_MOST_PARTS = 200_000
_LONGEST_NAME, _LONGEST_NUMBER = 500, 20
_MOST_DIMENSIONS = 16
# Bits of a number, by the dtypes' names.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a file by name, and its metadata; raises CheckpointError where it is in any way not
    as the format wants it."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(START)
        length = int.from_bytes(start[:8], "little")
        file.seek(8)
        text = file.read(length) if length <= LARGEST_HEADER else b""
    try:
        return _parse(path, text, length, size)
    except _Odd as error:
        kind = other_format(start)
        if kind is not None:
            raise CheckpointError(
                f"{path.name} is {kind}. Expected a .safetensors file; choose another file."
            ) from error
        raise CheckpointError(f"{path.name} {error}. Download it again.") from error


class _Odd(ValueError):
    """What is wrong with a file, to follow its name."""


def _parse(path: Path, text: bytes, length: int, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    def damaged(why: object) -> _Odd:
        return _Odd(f"is damaged or no safetensors file ({size:,} bytes; {why})")

    if text[:1] != b"{":
        raise damaged("no header of a possible length" if length > LARGEST_HEADER else "no header")
    if len(text) < length:
        raise _Odd(f"is cut short: {size:,} bytes instead of {8 + length:,} or more")
    if text.count(b"{") + text.count(b"[") > _MOST_PARTS:
        raise damaged("its header lists more than any model has")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_int=_size)
        metadata = _metadata(header.pop("__metadata__", {}))
        tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
        end = _end(tensors, 8 + length)
    except json.JSONDecodeError as error:
        raise damaged(f"its header is no JSON: {error.msg} at character {error.pos:,}") from error
    except (ValueError, RecursionError) as error:
        raise damaged(error) from error
    if end != size:
        fault = "is cut short" if size < end else "has more in it than its header says"
        raise _Odd(f"{fault}: {size:,} bytes instead of {end:,}")
    return tensors, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("its header has a name twice")
    return result


def _size(text: str) -> int:
    if text.startswith("-") or len(text) > _LONGEST_NUMBER:
        raise ValueError(f"its header has the number {text:.40}")
    return int(text)


def _metadata(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("its metadata are not texts")
    for text in (*found, *found.values()):
        text.encode("utf-8")  # halves of characters, which JSON lets through
    return found


def _tensor(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    """Checked alone; ``data`` is where the tensors begin in the file."""
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise ValueError(f"a tensor is called {name!r:.60}")
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name} has the unknown dtype {dtype!r:.40}")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS or not is_addressable(shape):
        raise ValueError(f"{name} has the shape {shape!r:.80}")
    if not _are_sizes(span) or len(span) != 2:
        raise ValueError(f"{name} has the place {span!r:.80}")
    nbytes, rest = divmod(math.prod(shape) * _BITS[dtype], 8)
    if rest or span[1] - span[0] != nbytes:
        raise ValueError(f"{name}, {dtype} {shape}, has the place {span}, which is another size")
    return TensorInfo(path, tuple(shape), dtype, data + span[0], nbytes)


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(
        type(number) is int and 0 <= number < 2**63 for number in numbers
    )


def _end(tensors: dict[str, TensorInfo], data: int) -> int:
    """Where the last tensor ends, if they lie one after another from ``data`` on."""
    end = data
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise ValueError(f"{name} begins at byte {info.offset:,}, not at {end:,}, the end of the others")
        end += info.nbytes
    return end
