"""Text features kept on disk, so that a prompt is encoded once and the 13 GB encoder need not be loaded.

One safetensors file per entry, named by a hash of all that decides the features: the encoder's weights,
the precision, the token ids (with them template and date) and the captured layers. The prompt's text is
in neither name nor file. Several processes may share a folder: an entry appears under its name only when
it is whole, and anything may vanish between two looks at it. There is no fsync, so a power cut can leave
a file of the right length with zeros in it; a checksum finds those.

A cache never makes a picture fail: what cannot be read is a miss, what cannot be written is left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .errors import SettingError

log = logging.getLogger(__name__)

# Part of every key: raise it when the same ids give other features, or when the files change.
VERSION = 1
MAX_BYTES = 1 << 30
# A writer that has not finished for this long is gone.
STALE_SECONDS = 3600
_KEY = re.compile(r"[0-9a-f]{64}")
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_PART = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{16}\.part")
_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def feature_key(identity: str, precision: str, ids: Sequence[int], captured: Sequence[int]) -> str:
    """The name (64 hex digits) of one prompt's features.

    ``identity`` stands for the encoder's weights, ``precision`` for how they are computed; ``ids`` are
    those of the whole chat text, ``captured`` the layers whose features are taken.
    """
    parts = [VERSION, identity, precision, [int(token) for token in ids], [int(one) for one in captured]]
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()


class FeatureCache:
    """A folder of features [1, S, L, H] in bf16 or fp32; the entries used longest ago make room."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self._warned = False

    def get(self, key: str) -> Tensor | None:
        """Features [1, S, L, H] on the CPU, or None. The file is read whole and closed, never mapped.

        A damaged entry is deleted and counts as not there.
        """
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                log.debug("The feature cache's entry %s cannot be read (%s).", path, error)
            return None
        try:
            features = _unpack(data)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("The feature cache's entry %s is damaged and is deleted (%s).", path, error)
            _remove(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # eviction takes the oldest first
        return features

    def put(self, key: str, features: Tensor) -> None:
        """Keep features [1, S, L, H], bf16 or fp32 on any device; SettingError for any other tensor.

        Features with NaN or infinity are not kept, or one bad run would spoil all that follow; nor are
        features larger than ``max_bytes``. A folder that cannot be written is one warning.
        """
        path = self._path(key)
        _check(features)
        if not torch.isfinite(features).all():
            log.warning("Features with NaN or infinity in them are not kept in the feature cache.")
            return
        data = _pack(features)
        if len(data) > self.max_bytes:
            log.debug("Features of %d bytes exceed the cache's limit of %d.", len(data), self.max_bytes)
            return
        try:
            self._write(path, data)
        except OSError as error:
            if not self._warned:
                log.warning(
                    "Text features cannot be kept in %s (%s), so the same prompts will be encoded again. "
                    "Free some space, or choose another folder.",
                    self.folder,
                    error,
                )
            self._warned = True
            return
        self._evict(keep=path.name)

    def clear(self) -> int:
        """Delete all entries, and what dead writers left behind; returns the bytes freed."""
        freed = self._remove_stale()
        for path, stat in self._files(_ENTRY):
            freed += stat.st_size if _remove(path) else 0
        return freed

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(stat.st_size for _, stat in self._files(_ENTRY))

    def count(self) -> int:
        """Number of entries."""
        return sum(1 for _ in self._files(_ENTRY))

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise SettingError(f"A feature cache's key is 64 hex digits, got {key!r}. Use feature_key().")
        return self.folder / f"{key}.safetensors"

    def _write(self, path: Path, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_stale()
        part = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.part")
        try:
            with part.open("xb") as file:
                file.write(data)
            part.replace(path)
        finally:
            _remove(part)

    def _evict(self, keep: str) -> None:
        """Delete the entries used longest ago until the rest fits; never ``keep``, just written."""
        entries = sorted(self._files(_ENTRY), key=lambda entry: entry[1].st_mtime_ns)
        total = sum(stat.st_size for _, stat in entries)
        for path, stat in entries:
            if total <= self.max_bytes:
                return
            if path.name != keep and _remove(path):
                total -= stat.st_size

    def _remove_stale(self) -> int:
        """Delete the parts of writers that were killed; returns the bytes freed."""
        freed, limit = 0, time.time() - STALE_SECONDS
        for path, stat in self._files(_PART):
            if stat.st_mtime < limit and _remove(path):
                freed += stat.st_size
        return freed

    def _files(self, pattern: re.Pattern[str]) -> Iterator[tuple[Path, os.stat_result]]:
        """The cache's own files; others in the folder, links among them, are no concern of it."""
        try:
            names = os.listdir(self.folder)
        except OSError:
            return
        for name in filter(pattern.fullmatch, names):
            path = self.folder / name
            with contextlib.suppress(OSError):  # gone since it was listed
                if path.is_file() and not path.is_symlink():
                    yield path, path.stat()


def _check(features: Tensor) -> None:
    if features.ndim != 4 or features.shape[0] != 1 or features.dtype not in _DTYPES:
        raise SettingError(
            "The feature cache keeps features [1, S, L, H] in bf16 or fp32, got "
            f"{list(features.shape)} in {features.dtype}. Pass one prompt's features."
        )


def _pack(features: Tensor) -> bytes:
    features = features.detach().to("cpu").contiguous()
    raw = features.flatten().view(torch.uint8).numpy().tobytes()
    metadata = {
        "format": "lens text features",
        "version": str(VERSION),
        "precision": _DTYPES[features.dtype],
        "tokens": str(features.shape[1]),
        "crc32": str(zlib.crc32(raw)),
    }
    return save({"features": features}, metadata)


def _unpack(data: bytes) -> Tensor:
    """The features in an entry's bytes; one of several errors if anything is wrong with them."""
    start = 8 + int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8:start])["__metadata__"]
    if zlib.crc32(memoryview(data)[start:]) != int(metadata["crc32"]):
        raise ValueError("its checksum is wrong")
    features = load(data)["features"]
    try:
        _check(features)
    except SettingError as error:
        raise ValueError(str(error)) from error
    return features


def _remove(path: Path) -> bool:
    """Whether the file is gone now, by this call or by another process."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # Windows keeps what another process has open
        log.debug("The feature cache's file %s cannot be deleted (%s).", path, error)
        return False
    return True
