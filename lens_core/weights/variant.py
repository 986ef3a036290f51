"""Which of the published checkpoints a denoiser is: it has the same tensors in all, so names must tell."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..config import LENS, LENS_BASE, LENS_TURBO, Variant
from ..errors import CheckpointError
from .opening import SUBFOLDERS
from .reader import read_json

# The first row whose pattern a name in lower case matches; the last is any other name of Lens.
_NAMES: tuple[tuple[Variant, str], ...] = (
    (LENS_TURBO, r"turbo"),
    (LENS_BASE, r"(?<![a-z0-9])base(?![a-z0-9])"),
    (LENS, r"lens"),
)
# A hub's cache keeps a file's folder this far below the model's: models--x--Lens-Turbo/snapshots/<hash>.
_PARENTS = 4


def variant_of(name: str, metadata: dict[str, str] | None = None) -> Variant:
    """The published checkpoint that a file is, from metadata ``lens.variant`` or from its name.

    Lens itself (RL-tuned) when neither says otherwise.
    """
    return _told(str((metadata or {}).get("lens.variant") or name)) or LENS


def variant_at(path: Path, metadata: dict[str, str] | None = None) -> Variant:
    """The same of a file or folder: by its metadata, else by the nearest that tells: its own name, a link's
    or what it leads to; where a folder's configuration says it comes from; the folders that it lies in."""
    told = (metadata or {}).get("lens.variant")
    names = [str(told)] if told else _names(path)
    return next((variant for variant in map(_told, names) if variant is not None), LENS)


def _told(name: str) -> Variant | None:
    return next((variant for variant, pattern in _NAMES if re.search(pattern, name.lower())), None)


def _names(path: Path) -> Iterator[str]:
    model = path.absolute()
    model = model.parent if model.name in SUBFOLDERS.values() else model
    yield f"{model.name} {model.resolve().name}"
    elsewhere = [
        str(found)
        for file in (model / "model_index.json", model / "config.json", path / "config.json")
        if (found := _read(file).get("_name_or_path"))
    ]
    parents = [parent.name for start in (model, model.resolve()) for parent in list(start.parents)[:_PARENTS]]
    # Only of a name that speaks of Lens: a disk may be called base, and a user turbo.
    yield from (name for name in (*elsewhere, *parents) if "lens" in name.lower())


def _read(file: Path) -> dict:
    try:
        return read_json(file) if os.path.isfile(file) else {}
    except CheckpointError:
        return {}
