"""A denoiser of the models folder, quantised into a file beside it, on ComfyUI's device."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management

from ...lens_core.loading import open_denoiser
from ...lens_core.quant.layer_format import AFFINE
from ...lens_core.quant.policy import MODES
from ...lens_core.quantize_file import SUFFIX, quantize_file
from . import paths
from .progress import on_progress

# Bytes of memory that quantising a weight takes for each of its numbers, with room to spare (nvfp4: 32).
_BYTES_A_NUMBER = 48


def quantize_model(model_name: str, mode: str, file_name: str, overwrite: bool) -> tuple[str, str]:
    """Write the file; returns it as the loaders list it, and what to tell the user."""
    file = open_denoiser(paths.path_of("denoiser", model_name))
    target, option = new_file(model_name, mode, file_name)
    device = comfy.model_management.get_torch_device()
    # Other models stay on the GPU unless there is no room for the one weight at a time.
    largest = max(rows * columns for rows, columns in file.sizes.values())
    comfy.model_management.free_memory(_BYTES_A_NUMBER * largest, device)
    quantize_file(file, mode, target, device, on_progress(), overwrite=overwrite)
    text = f"{option}, {target.stat().st_size / 1e6:,.0f} MB. Press R to have it in the loaders' lists."
    if MODES[mode].form.name == AFFINE:
        text += " LensModelLoader reads it, ComfyUI's own loader does not."
    return option, text


def new_file(model_name: str, mode: str, file_name: str) -> tuple[Path, str]:
    """Where the file is to be written, and the option that it will be; raises SettingError for a bad name."""
    wanted = file_name.strip()
    if not wanted:
        name = Path(model_name).name
        stem = Path(name).stem if name.endswith((SUFFIX, ".gguf")) else name
        wanted = f"{stem}_{mode}"
    return paths.new_path("denoiser", wanted)


def fingerprint(model_name: str, mode: str, file_name: str) -> str:
    """Changes with the source's files, and when the file to be written comes or goes."""
    return f"{paths.stamp('denoiser', model_name)} {new_file(model_name, mode, file_name)[0].is_file()}"
