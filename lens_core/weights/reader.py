"""Reads safetensors checkpoints: one file, or the shards of a folder.

Opening reads headers only. Everything that can be wrong with a file (missing, truncated, corrupt,
another format, a missing shard) becomes one sentence here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .tensor_info import DTYPES, TensorInfo, cast

# safetensors' own limit.
_LARGEST_HEADER = 100_000_000
_MAGIC = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch .pt or .ckpt file",
    **{b"\x80" + bytes([n]): "a Python pickle, which this program does not open" for n in range(2, 6)},
    b"version https://git-lfs": "a Git LFS pointer; the weights themselves were not downloaded",
    b"<!DOCTYPE": "a web page; the download went wrong",
    b"<html": "a web page; the download went wrong",
}


class Checkpoint:
    """The tensors of one file or of several shards, read on demand through mmap."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.header: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        for path in paths:
            self.metadata.update(_open_safetensors(path).metadata() or {})
            self.header.update(_tensors_of(path))

    @property
    def name(self) -> str:
        """How to speak of it in an error."""
        first = self.paths[0]
        return first.name if len(self.paths) == 1 else f"{first.parent.name}/ ({len(self.paths)} files)"

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the CPU; floating-point ones in ``dtype`` (None: as stored).

        As stored it stays where the file is mapped; converted, it leaves nothing of the file behind.
        """
        info = self.header[name]
        if info.dtype not in DTYPES:  # one that torch may have and this program does not use
            return _open_safetensors(info.path).get_tensor(name)
        if dtype is None or not info.floating or DTYPES[info.dtype] == dtype:
            return info.values().view(info.shape)
        return cast(info, dtype)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .safetensors file, or a folder with one or with shards and their index."""
    path = Path(path)
    if path.is_dir():
        return Checkpoint(_files_of_folder(path))
    if not path.exists():
        raise CheckpointError(f"There is no file {path}. Check the name, or download it again.")
    return Checkpoint([path])


def read_json(path: Path) -> dict:
    """A JSON file as a dict; a broken one is named."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object. Download it again.")
    return content


def _files_of_folder(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not indexes:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) == 1:
            return files
        found = f"{len(files)} and no index that joins them" if files else "none"
        raise CheckpointError(
            f"Expected one .safetensors file, or shards with their .safetensors.index.json, in "
            f"{folder}; found {found}. Download the folder again."
        )
    weight_map = read_json(indexes[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(
            f"{indexes[0].name} in {folder} has no weight_map from tensors to files. Download it again."
        )
    names = sorted(set(weight_map.values()))
    lacking = [name for name in names if not (folder / name).is_file()]
    if lacking or not names:
        listed = ", ".join(lacking) or "every shard (its weight_map is empty)"
        raise CheckpointError(
            f"{indexes[0].name} in {folder} lists {len(names)} files; missing: {listed}. "
            "Download the missing files into that folder."
        )
    return [folder / name for name in names]


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(_why_not(path, error)) from error


def _why_not(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(32)
    for magic, kind in _MAGIC.items():
        if start.lower().startswith(magic.lower()):
            return f"{path.name} is {kind}. Expected a .safetensors file; choose another file."
    size, expected = path.stat().st_size, _expected_size(path)
    again = "Download it again."
    if expected is None:
        return f"{path.name} is damaged or no safetensors file ({size:,} bytes; {error}). {again}"
    fault = "is cut short" if size < expected else "has more in it than its header says"
    return f"{path.name} {fault}: {size:,} bytes instead of {expected:,}. {again}"


def _tensors_of(path: Path) -> dict[str, TensorInfo]:
    """Where the tensors of a file lie, which safetensors has found to be in order."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: TensorInfo(
            path, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0], size
        )
        for name, entry in header.items()
        for size in [entry["data_offsets"][1] - entry["data_offsets"][0]]
    }


def _expected_size(path: Path) -> int | None:
    """Bytes that a safetensors file should have by its header; None where that cannot be read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LARGEST_HEADER:
            return None
        header = file.read(length)
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        return 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
