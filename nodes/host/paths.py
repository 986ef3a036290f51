"""Where ComfyUI keeps the files: combo options, and a chosen option's path.

Single files come from ComfyUI's own folders, files with several components from ``models/checkpoints``; whole
Lens folders (diffusers' layout) from ``models/lens`` and ``models/diffusers``; a component's folder of shards
may lie anywhere below the component's own folder. A list has only what its loader takes; a path is found for
any name, so that a loader can say what an old workflow's file is. Last come the models that the pack itself
brings, so that it draws without any download.
"""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...lens_core.errors import CheckpointError, SettingError
from ...lens_core.loading import SUBFOLDERS, component_path
from ...lens_core.quantize_file import SUFFIX
from ...lens_core.weights.opening import is_shard
from .kinds import holds
from .missing import or_none_yet, what_is_missing
from .stamp import stamp_of

_HOST_FOLDER = {"denoiser": "diffusion_models", "encoder": "text_encoders", "vae": "vae"}
_INDEX = ".safetensors.index.json"
LENS_FOLDER = "lens"
_BROUGHT_ALONG = Path(__file__).parents[2] / "checkpoints"
# Where files with several components lie, and folders of whole models.
_CHECKPOINTS, _WHOLE_MODELS = "checkpoints", (LENS_FOLDER, "diffusers")


def register_folders() -> None:
    """Make ``models/lens`` and the pack's own models known to ComfyUI; extra_model_paths.yaml may add more
    places."""
    default = os.path.join(folder_paths.models_dir, LENS_FOLDER)
    folder_paths.add_model_folder_path(LENS_FOLDER, default)
    folder_paths.add_model_folder_path(LENS_FOLDER, str(_BROUGHT_ALONG))


def choices(component: str) -> list[str]:
    """Combo options of a loader: single files that hold the component, then folders."""
    found = {**_singles(component), **_folders(component)}
    fitting = (name for name, path in found.items() if holds(component_path(path, component), component))
    return or_none_yet(list(fitting))


def path_of(component: str, name: str) -> Path:
    """The file or folder of an option; raises CheckpointError where there is none."""
    for key in (_HOST_FOLDER[component], _CHECKPOINTS):
        single = folder_paths.get_full_path(key, name)
        if single is not None:
            return Path(single)
    # A workflow may come from another system, with other separators.
    folder = _folders(component).get(os.path.normpath(name))
    if folder is None:
        raise CheckpointError(what_is_missing(component, name, choices(component)))
    return folder


def new_path(component: str, name: str) -> tuple[Path, str]:
    """Where a file called ``name``, with or without its suffix, is to be written, and the option that it will
    be; raises SettingError for a name that leaves the component's folder, or that stands for another file."""
    name = name if name.endswith(SUFFIX) else f"{name}{SUFFIX}"
    key = _HOST_FOLDER[component]
    roots = folder_paths.get_folder_paths(key)
    # ComfyUI searches models/unet too, and first.
    root = Path(os.path.abspath(next((root for root in roots if os.path.basename(root) == key), roots[0])))
    path = Path(os.path.abspath(root / name))
    if not path.is_relative_to(root) or path.name.startswith(".") or not name.isprintable():
        raise SettingError(
            f"The file name {name!r} is none below {root}. Give a name, or a folder in there and a name."
        )
    option = str(path.relative_to(root))
    found = folder_paths.get_full_path(key, option)
    if found is not None and os.path.abspath(found) != str(path):
        raise SettingError(
            f"{option} is in {found} already, where it would be found first. Give another name."
        )
    return path, option


def stamp(component: str, name: str | None) -> str:
    """Changes with an option's files; "" where there are none (a linked name is None)."""
    return stamp_of(_files(component, name))


def size(component: str, name: str | None) -> int:
    """Bytes of an option's files."""
    return sum(file.stat().st_size for file in _files(component, name))


def _files(component: str, name: str | None) -> list[Path]:
    try:
        path = component_path(path_of(component, name or ""), component)
    except CheckpointError:
        return []
    return sorted(filter(Path.is_file, path.rglob("*") if path.is_dir() else [path]))


def roots() -> list[Path]:
    """The folders that the lists are made from."""
    keys = (*_HOST_FOLDER.values(), _CHECKPOINTS, *_WHOLE_MODELS)
    found = (Path(root) for key in keys for root in folder_paths.get_folder_paths(key))
    return list(dict.fromkeys(root for root in found if root.is_dir()))


def tokenizer_places() -> list[Path]:
    """Folders where a tokenizer.json may lie that an encoder file does not bring along."""
    encoders = [Path(root) for root in folder_paths.get_folder_paths("text_encoders")]
    inside = [folder for root in encoders if root.is_dir() for folder in sorted(root.iterdir())]
    lens = _whole_models("tokenizer/tokenizer.json").values()
    # The nano model's tokenizer would fit any encoder by its special tokens, and none by its words.
    users = (folder for folder in lens if not folder.is_relative_to(_BROUGHT_ALONG))
    return [*encoders, *filter(Path.is_dir, inside), *(folder / "tokenizer" for folder in users)]


def _singles(component: str) -> dict[str, Path]:
    """Files by option, in the component's own folder and among the checkpoints."""
    own = _HOST_FOLDER[component]
    names = [(own, name) for name in folder_paths.get_filename_list(own)]
    # ComfyUI's own list leaves them out.
    names += [(own, name) for _, name in _below(own) if name.lower().endswith(".gguf")]
    checkpoints = folder_paths.get_filename_list(_CHECKPOINTS)
    names += [(_CHECKPOINTS, name) for name in checkpoints if name.endswith(".safetensors")]
    found: dict[str, Path] = {}
    for key, name in names:
        path = None if is_shard(name) else folder_paths.get_full_path(key, name)
        if path is not None:
            found.setdefault(name, Path(path))
    return found


def _folders(component: str) -> dict[str, Path]:
    """Folders by option: of shards below the component's own folder, and of whole models."""
    indexes = [(root, name) for root, name in _below(_HOST_FOLDER[component]) if name.endswith(_INDEX)]
    shards = ((Path(root), os.path.dirname(name)) for root, name in reversed(indexes))
    own = {folder: root / folder for root, folder in shards if folder}
    whole = _whole_models(*(f"{SUBFOLDERS[component]}/*.{ending}" for ending in ("safetensors*", "gguf")))
    last = sorted(whole, key=lambda name: (whole[name].is_relative_to(_BROUGHT_ALONG), name))
    return dict(sorted(own.items())) | {name: whole[name] for name in last}


def _below(key: str) -> list[tuple[str, str]]:
    """Every file below the folders that ComfyUI searches for ``key``: the folder, and the name in it."""
    return [
        (root, name)
        for root in folder_paths.get_folder_paths(key)
        for name in folder_paths.recursive_search(root, [".git"])[0]
    ]


def _whole_models(*holding: str) -> dict[str, Path]:
    """Folders <name> or <organisation>/<name> in which something matches one of the patterns."""
    roots = [Path(root) for key in _WHOLE_MODELS for root in folder_paths.get_folder_paths(key)]
    return {
        str(folder.relative_to(root)): folder
        for root in reversed(roots)  # of two alike the first counts, as for ComfyUI
        for folder in (*root.glob("*/"), *root.glob("*/*/"))
        if any(any(folder.glob(pattern)) for pattern in holding)
    }
