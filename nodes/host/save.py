"""The denoiser of a MODEL with all its patches merged, written to a file a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...lens_core.config import Variant
from ...lens_core.errors import CheckpointError, SettingError
from ...lens_core.loading import open_denoiser
from ...lens_core.quantize_file import variant_of_file
from ...lens_core.weights import variant_metadata, variant_of
from ...lens_core.weights.writer import SteppedWriter
from . import paths
from .lora import LORAS, PREFIX
from .model import require_lens, source_of
from .progress import on_progress

# Bytes of memory that merging takes for each of a weight's numbers, with room to spare: fp32 and its change.
_BYTES_A_NUMBER = 24


def save_model(model: Any, file_name: str, overwrite: bool) -> tuple[str, str]:
    """Write the file; returns it as the loaders list it, and what to tell the user.

    Quantised weights stay so, those that a patch changes are quantised again. Raises SettingError for a name
    that cannot be, and for a MODEL that is not Lens.
    """
    require_lens(model, "saves", ", or use ModelSave")
    target, option = _new_file(model, file_name, overwrite)
    _unload(model)
    steps = _steps(model.model.diffusion_model)
    writer = SteppedWriter(target, list(steps.values()), _metadata(model), resume=False)
    writer.check_room()
    update = on_progress()
    with writer:
        for done, (name, tensors) in enumerate(steps.items(), 1):
            patched = PREFIX + name in model.patches
            writer.write(_as_stored(_merged(model, name)) if patched else tensors)
            update(done, len(steps))
        writer.finish()
    return option, _text(model, steps, option, target)


def fingerprint(file_name: str) -> str:
    """Changes when the file to be written comes or goes."""
    try:
        return str(_path(file_name)[0].is_file())
    except SettingError:  # said when the node runs
        return ""


def _path(file_name: str) -> tuple[Path, str]:
    wanted = file_name.strip()
    if not wanted:
        raise SettingError("file_name is empty. Give the file to write in models/diffusion_models a name.")
    return paths.new_path("denoiser", wanted)


def _new_file(model: Any, file_name: str, overwrite: bool) -> tuple[Path, str]:
    target, option = _path(file_name)
    if not target.exists():
        return target, option
    source = source_of(model)
    if source is not None and source.exists() and target.samefile(source):
        raise SettingError(f"{target} would replace the file that the model is from. Give another name.")
    if not overwrite or target.is_dir():
        raise SettingError(f"{target} exists already. Give another name, or switch overwrite on.")
    return target, option


def _unload(model: Any) -> None:
    """Its weights as they were loaded, and room for one of them on the GPU."""
    management = comfy.model_management
    others = [
        loaded
        for loaded in management.current_loaded_models
        if loaded.model is None or not model.is_clone(loaded.model)
    ]
    management.free_memory(1e30, model.load_device, others)
    largest = max(tensor.numel() for tensor in model.model.diffusion_model.parameters())
    management.free_memory(_BYTES_A_NUMBER * largest, model.load_device)


def _steps(network: torch.nn.Module) -> dict[str, dict[str, Tensor]]:
    """Each weight's tensors under the names that the file has, by the name that patches know it by.

    Those whose size would put what follows them at odd bytes come last.
    """
    owners = {
        part: name
        for name, weight in network.named_parameters()
        if isinstance(weight, QuantizedTensor)
        for part in weight.state_dict(name)
    }
    steps: dict[str, dict[str, Tensor]] = {}
    for name, tensor in network.state_dict().items():
        steps.setdefault(owners.get(name, name), {})[name] = _plain(tensor)
    return dict(sorted(steps.items(), key=lambda step: any(t.nbytes % 4 for t in step[1].values())))


def _merged(model: Any, name: str) -> dict[str, Tensor]:
    """A weight's tensors with its patches, by ComfyUI's own merging."""
    weight = model.patch_weight_to_device(PREFIX + name, model.load_device, return_weight=True)
    return weight.state_dict(name) if isinstance(weight, QuantizedTensor) else {name: weight}


def _as_stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _plain(tensor) for name, tensor in tensors.items()}


def _plain(tensor: Tensor) -> Tensor:
    """Scales of 8 bits as the bytes that they are, as LensQuantizeModel's files have them."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor


def _metadata(model: Any) -> dict[str, str]:
    told, variant, loras = {"format": "pt"}, _variant(model), model.attachments.get(LORAS)
    if variant is not None:
        told |= variant_metadata(variant)
    if loras:
        told["lens.loras"] = json.dumps(loras)
    return told


def _variant(model: Any) -> Variant | None:
    """Which published checkpoint a MODEL is, by the file that it is from."""
    source = source_of(model)
    if source is None:
        return None
    try:
        return variant_of_file(open_denoiser(source))
    except CheckpointError:  # it is gone, or has been replaced
        return variant_of(source.name)


def _text(model: Any, steps: Iterable[str], option: str, target: Path) -> str:
    merged = sum(PREFIX + name in model.patches for name in steps)
    text = (
        f"{option}, {target.stat().st_size / 1e6:,.0f} MB, {merged} weights merged. Press R to have it in "
        "the loaders' lists."
    )
    if model.injections:
        text += " A LoRA in bypass mode is no part of the weights, and not in it."
    return text
