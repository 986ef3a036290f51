"""Pictures of the command line: small ones, the settings that each holds, and their pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

SMALL = ("--height", 64, "--width", 48, "--device", "cpu", "--dtype", "float32")
SETTINGS = {
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "steps",
    "cfg",
    "seed",
    "n",
    "index",
    "batch",
    "dtype",
    "device",
    "checkpoint",
    "variant",
    "version",
}

# What the fixture ``generate`` runs: flags to the pictures that they made.
Generate = Callable[..., list[Path]]


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()
