"""What the page's settings say, where the server needs to know.

ComfyUI keeps them for each of its users; work that no request belongs to follows those of the default one,
who is the only one unless ComfyUI was started with --multi-user.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import folder_paths

_FILE = Path("default", "comfy.settings.json")


def number(name: str, *, usual: float, most: float) -> float:
    """A setting from 0 to ``most``; ``usual`` where there is none, or no such number."""
    value = _settings().get(name)
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known and 0 <= value <= most else usual


def _settings() -> dict[str, Any]:
    """All of them; none where the file is not there, or is being written."""
    try:
        found = json.loads(Path(folder_paths.get_user_directory(), _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
