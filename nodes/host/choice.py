"""Whether a loader's choice is there, asked by ComfyUI before it runs a prompt."""

from __future__ import annotations

from ...lens_core.errors import CheckpointError
from .paths import path_of


def check_choice(component: str, name: str | None) -> bool | str:
    """True where the file or folder exists, and for None, a linked name; else what is missing and where to
    get it. What kind of file it is, the loader says."""
    if name is None:
        return True
    try:
        # A request may hold anything.
        path_of(component, str(name))
    except CheckpointError as error:
        return str(error)
    return True
