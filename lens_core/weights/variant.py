"""Which of the published checkpoints a denoiser is: it has the same tensors in all, so names must tell."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
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
# A checkpoint's own settings, where they are not its variant's, and the largest that a node takes.
_STEPS, _CFG = ("lens.steps", 1000), ("lens.cfg", 100.0)
# A hub's cache keeps a file's folder this far below the model's: models--x--Lens-Turbo/snapshots/<hash>.
_PARENTS = 4


def variant_of(name: str, metadata: dict[str, str] | None = None) -> Variant:
    """The published checkpoint that a file is, from metadata ``lens.variant`` or from its name; with settings
    of its own if metadata have ``lens.steps`` or ``lens.cfg``.

    Lens itself (RL-tuned) when neither says otherwise.
    """
    told = (metadata or {}).get("lens.variant")
    return _with_settings(_told(str(told or name)) or LENS, metadata or {})


def variant_at(path: Path, metadata: dict[str, str] | None = None) -> Variant:
    """The same of a file or folder: by its metadata, else by the nearest that tells: its own name, a link's
    or what it leads to; where a folder's configuration says it comes from; the folders that it lies in."""
    told = (metadata or {}).get("lens.variant")
    names = [str(told)] if told else _names(path)
    variant = next((variant for variant in map(_told, names) if variant is not None), LENS)
    return _with_settings(variant, metadata or {})


def variant_metadata(variant: Variant) -> dict[str, str]:
    """What a denoiser's file says of itself, for its tensors do not tell: what ``variant_of`` reads."""
    told, published = {"lens.variant": variant.name}, variant_of(variant.name)
    if variant.steps != published.steps:
        told[_STEPS[0]] = str(variant.steps)
    if variant.cfg != published.cfg:
        told[_CFG[0]] = f"{variant.cfg:g}"
    return told


def _with_settings(variant: Variant, metadata: dict[str, str]) -> Variant:
    """What is no number, or none that a sampler takes, is left out: a picture can still be drawn."""
    steps, cfg = _number(metadata, *_STEPS), _number(metadata, *_CFG)
    if steps is not None and steps >= 1:
        variant = replace(variant, steps=int(steps))
    return variant if cfg is None else replace(variant, cfg=cfg)


def _number(metadata: dict[str, str], name: str, most: float) -> float | None:
    try:
        found = float(str(metadata.get(name)))
    except ValueError:
        return None
    return found if math.isfinite(found) and 0 <= found <= most else None


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
