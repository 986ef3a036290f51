"""What a loader says where its file is not there: which one, how large, from where, into which folder.

Nothing is downloaded from here: the user clicks a link, or runs the command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import folder_paths

from ...lens_core.errors import first_of
from ...lens_core.sources import LENS_FOLDER, SOURCES, USUAL, Source, published_as

# A combo without options would send nothing, and ComfyUI would only say that an input is missing.
NONE_YET = "none yet: run for links"
_PACK = Path(__file__).parents[2]
_SHOWN = 6
# Of diffusion_models and text_encoders.
_OLD_NAMES = ("unet", "clip")


def or_none_yet(options: list[str]) -> list[str]:
    """A loader's options; where there are none, one that says so, whose error tells where files are."""
    return options or [NONE_YET]


def what_is_missing(component: str, name: str, offered: Sequence[str]) -> str:
    """The sentences of the error; ``offered`` is what the loader's list has."""
    if key := published_as(component, name):
        return f"There is no {_where_from(key)}"
    own = SOURCES[USUAL[component]].mirrors[0].directory
    gone = f"There is no {component} {name!r} in models/{own}, nor a folder of it in models/{LENS_FOLDER}"
    there = [option for option in offered if option != NONE_YET]
    if not there:
        gone = f"There is no {component} yet" if name == NONE_YET else gone
        return f"{gone}. The usual one is {_where_from(USUAL[component])}"
    return f"{gone}. Choose one of {first_of(there, _SHOWN)}, or put the file there and press R."


def _where_from(key: str) -> str:
    """A component's name, size, links, folder and command."""
    source = SOURCES[key]
    first = source.mirrors[0]
    python, models = (
        f'"{path}"' if " " in path else path for path in (sys.executable, folder_paths.models_dir)
    )
    return (
        f"{first.name} ({source.what}, {first.gigabytes:.2f} GB): download {_by_hand(source)}, or run, in "
        f"{_PACK}: {python} -m lens_core download {key} --to {models}. Then press R."
    )


def _by_hand(source: Source) -> str:
    """What to click, and where to put it."""
    first, *others = [mirror for mirror in source.mirrors if mirror.place == source.mirrors[0].place]
    folders = _folders(first.directory)
    if not first.is_folder:
        same = "".join(f" (or, saved under that name, {mirror.url})" for mirror in others)
        return f"it from {first.url}{same} into {folders}"
    parts = ", ".join(first.paths) if first.paths[0].endswith("/") else "its files"
    same = "".join(f" (or {mirror.url})" for mirror in others)
    return f"{parts} from {first.url}{same} into a folder {first.name} in {folders}"


def _folders(directory: str) -> str:
    """The folders where ComfyUI looks, without its output and those of older versions."""
    aside = [Path(folder_paths.models_dir, name) for name in _OLD_NAMES]
    aside.append(Path(folder_paths.get_output_directory()))
    roots = dict.fromkeys(folder_paths.get_folder_paths(directory))
    own = [root for root in roots if not any(Path(root).is_relative_to(folder) for folder in aside)]
    return " or ".join(own or roots)
