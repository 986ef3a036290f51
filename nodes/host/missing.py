"""What a loader says where its file is not there: which one, how large, from where, into which folder.

Nothing is downloaded from here: the user clicks a link, or runs the command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import folder_paths

from ...lens_core.sources import LENS_FOLDER, SOURCES, USUAL, published_as

_PACK = Path(__file__).parents[2]
_SHOWN = 6


def what_is_missing(component: str, name: str, offered: Sequence[str]) -> str:
    """The sentences of the error; ``offered`` is what the loader's list has."""
    if key := published_as(component, name):
        return f"{name} is not there yet. {_where_from(key)}"
    folders = _folders(SOURCES[USUAL[component]].mirrors[0].directory)
    gone = f"There is no {component} {name!r} in {folders}, nor a folder of that name in models/{LENS_FOLDER}"
    if not offered:
        return f"{gone}. {_where_from(USUAL[component])}"
    more = f" and {len(offered) - _SHOWN} more" if len(offered) > _SHOWN else ""
    listed = ", ".join(offered[:_SHOWN]) + more
    return f"{gone}. Choose one of {listed}, or put the file there and press R."


def _where_from(key: str) -> str:
    source = SOURCES[key]
    first = source.mirrors[0]
    links = " or ".join(mirror.url for mirror in source.mirrors if mirror.place == first.place)
    command = f'python -m lens_core download {key} --to "{folder_paths.models_dir}"'
    return (
        f"Put {first.name} ({first.gigabytes:.2f} GB, {source.what}) into {_folders(first.directory)}, from "
        f"{links}. Or run, in {_PACK}: {command}. Then press R."
    )


def _folders(directory: str) -> str:
    """The folders where ComfyUI looks, without those that it keeps for older versions."""
    roots = folder_paths.get_folder_paths(directory)
    return " or ".join(dict.fromkeys([root for root in roots if Path(root).name == directory] or roots))
