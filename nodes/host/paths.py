"""Where ComfyUI keeps the files: combo options, and a chosen option's path.

Single files come from ComfyUI's own folders; whole Lens folders (diffusers' layout) from
``models/lens/<name>``; an encoder may also be a folder of shards below ``models/text_encoders``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

from ...lens_core.errors import CheckpointError, SettingError
from ...lens_core.loading import SUBFOLDERS, component_path
from .missing import or_none_yet, what_is_missing

_HOST_FOLDER = {"denoiser": "diffusion_models", "encoder": "text_encoders", "vae": "vae"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
LENS_FOLDER = "lens"


def register_folders() -> None:
    """Make ``models/lens`` known to ComfyUI; extra_model_paths.yaml may add more places."""
    default = os.path.join(folder_paths.models_dir, LENS_FOLDER)
    folder_paths.add_model_folder_path(LENS_FOLDER, default)


def choices(component: str) -> list[str]:
    """Combo options of a loader: single files, then folders."""
    files = folder_paths.get_filename_list(_HOST_FOLDER[component])
    singles = [name for name in files if not _SHARD.search(name)]
    if component != "vae":
        singles += [name for name in _ggufs(component) if name not in singles]
    return or_none_yet(singles + sorted(_folders(component)))


def path_of(component: str, name: str) -> Path:
    """The file or folder of an option; raises CheckpointError where there is none."""
    single = folder_paths.get_full_path(_HOST_FOLDER[component], name)
    if single is not None:
        return Path(single)
    folder = _folders(component).get(name)
    if folder is None:
        raise CheckpointError(what_is_missing(component, name, choices(component)))
    return folder


def new_path(component: str, name: str) -> tuple[Path, str]:
    """Where a file called ``name`` is to be written, and the option that it will be; raises SettingError for
    a name that leaves the component's folder, or that stands for another file."""
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
    """Size and time of change of an option's files; "" where there are none (a linked name is None).

    By their names alone: ComfyUI writes fingerprints into pictures, where nobody's folders belong.
    """
    files = _files(component, name)
    stats = [(file.name, file.stat()) for file in files]
    return str([(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]) if files else ""


def size(component: str, name: str | None) -> int:
    """Bytes of an option's files."""
    return sum(file.stat().st_size for file in _files(component, name))


def _files(component: str, name: str | None) -> list[Path]:
    try:
        path = component_path(path_of(component, name or ""), component)
    except CheckpointError:
        return []
    return sorted(filter(Path.is_file, path.rglob("*") if path.is_dir() else [path]))


def tokenizer_places() -> list[Path]:
    """Folders where a tokenizer.json may lie that an encoder file does not bring along."""
    encoders = [Path(root) for root in folder_paths.get_folder_paths("text_encoders")]
    inside = [folder for root in encoders if root.is_dir() for folder in sorted(root.iterdir())]
    lens = _subfolders(LENS_FOLDER, "tokenizer/tokenizer.json").values()
    return [*encoders, *filter(Path.is_dir, inside), *(folder / "tokenizer" for folder in lens)]


def _ggufs(component: str) -> list[str]:
    """Names of GGUF files in a component's folders, which ComfyUI's own list leaves out."""
    roots = folder_paths.get_folder_paths(_HOST_FOLDER[component])
    names = (name for root in roots for name in folder_paths.recursive_search(root, [".git"])[0])
    return sorted({name for name in names if name.lower().endswith(".gguf")})


def _folders(component: str) -> dict[str, Path]:
    found = {}
    if component == "encoder":
        found = _subfolders("text_encoders", "*.safetensors.index.json")
    return {**found, **_subfolders(LENS_FOLDER, f"{SUBFOLDERS[component]}/*.safetensors*")}


def _subfolders(key: str, holding: str) -> dict[str, Path]:
    return {
        folder.name: folder
        for root in map(Path, folder_paths.get_folder_paths(key))
        if root.is_dir()
        for folder in root.iterdir()
        if folder.is_dir() and any(folder.glob(holding))
    }
