"""Whether a loader's choice is there, asked by ComfyUI before it runs a prompt."""

from __future__ import annotations

from typing import Any

from ...lens_core.errors import CheckpointError, SettingError
from .paths import path_of
from .settings import listed


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


def check_choices(component: str, names: Any) -> bool | str:
    """The same of a list of names."""
    try:
        answers = [check_choice(component, name) for name in listed("checkpoints", names)]
    except SettingError as error:
        return str(error)
    return next((answer for answer in answers if answer is not True), True)
