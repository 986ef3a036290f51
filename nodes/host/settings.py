"""Values that ComfyUI checks in a widget, but not where they come through a link."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ...lens_core.errors import SettingError


def one_of(name: str, value: Any, options: Collection[str]) -> Any:
    """``value``; raises SettingError unless it is one of a combo's options."""
    if value not in options:
        raise SettingError(f"{name} is {value!r}; expected one of {', '.join(options)}. Choose one of them.")
    return value


def listed(name: str, value: Any) -> list[str]:
    """What is chosen of a list, where None is nothing; raises SettingError for other things than names."""
    chosen = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(chosen, list) or not all(isinstance(each, str) for each in chosen):
        raise SettingError(f"{name} is {value!r}; expected a list of names. Choose some of its list.")
    return chosen
