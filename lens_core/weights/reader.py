"""Reads safetensors checkpoints: one file, or the shards of a folder.

Opening reads headers only. Everything that can be wrong with a file (missing, truncated, corrupt,
another format, a missing shard) becomes one sentence here.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, first_of
from .safetensors_header import read_header
from .tensor_info import DTYPES, TensorInfo, cast
from .user_file import read_json

__all__ = ["Checkpoint", "open_checkpoint", "read_json"]
# Twenty times what Lens and GPT-OSS have: what costs time for each tensor ends soon.
MOST_TENSORS = 50_000
_MOST_SHARDS = 1000


class Checkpoint:
    """The tensors of one file or of several shards, read on demand through mmap."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.header: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        for path in paths:
            tensors, metadata = read_header(path)
            self.metadata.update(metadata)
            self.header.update(tensors)
            if len(self.header) > MOST_TENSORS:
                raise CheckpointError(
                    f"{self.name} holds more than {MOST_TENSORS:,} tensors, which no model of this program "
                    "has. Choose another file."
                )

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
            return _read_by_package(info, name)
        if dtype is None or not info.floating or DTYPES[info.dtype] == dtype:
            return info.values().view(info.shape)
        return cast(info, dtype)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .safetensors file, or a folder with one or with shards and their index."""
    path = Path(path)
    return Checkpoint(_files_of_folder(path) if os.path.isdir(path) else [path])


def _files_of_folder(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        return _files_of_index(indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    found = f"{len(files)} and no index that joins them" if files else "none"
    pickles = [file.name for kind in ("bin", "pt", "pth", "ckpt") for file in folder.glob(f"*.{kind}")]
    if pickles and not files:
        found += f", and {first_of(sorted(pickles), 2)}, which are Python pickles and never opened"
    raise CheckpointError(
        f"Expected one .safetensors file, or shards with their .safetensors.index.json, in "
        f"{folder}; found {found}. Download the folder again."
    )


def _files_of_index(index: Path) -> list[Path]:
    folder, weight_map = index.parent, read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(
            f"{index.name} in {folder} has no weight_map from tensors to files. Download it again."
        )
    names = sorted(set(weight_map.values()))
    if len(names) > _MOST_SHARDS:
        raise CheckpointError(
            f"{index.name} in {folder} lists {len(names):,} files; expected at most {_MOST_SHARDS:,}. "
            "Download it again."
        )
    outside = [ascii(name) for name in names if _leaves(name)]
    if outside:
        raise CheckpointError(
            f"{index.name} in {folder} lists files outside that folder, where nothing is read: "
            f"{first_of(outside)}. Download the folder from its publisher."
        )
    lacking = [ascii(name)[1:-1] for name in names if not os.path.isfile(folder / name)]
    if lacking or not names:
        listed = first_of(lacking) or "every shard (its weight_map is empty)"
        raise CheckpointError(
            f"{index.name} in {folder} lists {len(names)} files; missing: {listed}. "
            "Download the missing files into that folder."
        )
    return [folder / name for name in names]


def _leaves(name: str) -> bool:
    """Whether a name in an index leads out of its folder, on any operating system. (A link does not count:
    the hub's cache consists of them, and whoever made it may write here anyway.)"""
    windows = PureWindowsPath(name)
    return bool(windows.anchor) or PurePosixPath(name).is_absolute() or ".." in windows.parts


def _read_by_package(info: TensorInfo, name: str) -> Tensor:
    try:
        with safe_open(info.path, framework="pt", device="cpu") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{info.path.name} stores {name} as {info.dtype}, which cannot be read here ({error}). Choose "
            "another file."
        ) from error
