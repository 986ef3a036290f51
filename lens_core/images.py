"""PNG files that hold the settings they were made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from . import __version__


def save_png(image: Tensor, folder: Path, settings: dict[str, Any]) -> Path:
    """Write image [H, W, 3] of bytes under the next free number; returns its path.

    The settings are JSON in the PNG's ``lens`` text. The file appears under its name only when it
    is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    info.add_itxt("lens", json.dumps({**settings, "version": __version__}, ensure_ascii=False))
    taken = [int(path.stem[5:]) for path in folder.glob("lens_*.png") if path.stem[5:].isdigit()]
    path = folder / f"lens_{max(taken, default=0) + 1:05d}.png"
    part = path.with_suffix(".part")
    Image.fromarray(image.numpy()).save(part, format="PNG", pnginfo=info)
    part.replace(path)
    return path


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that ``save_png`` wrote."""
    with Image.open(path) as image:
        return json.loads(image.text["lens"])  # type: ignore[attr-defined]
