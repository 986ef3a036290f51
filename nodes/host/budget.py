"""What a choice of files would need of this machine, before anything is loaded: for the page's badges."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import comfy.model_management
import torch

from ...lens_core.config import Variant
from ...lens_core.file_needs import denoiser_file_needs, encoder_file_needs
from ...lens_core.loading import DTYPES, component_path, open_denoiser, open_encoder
from ...lens_core.memory.plan import Component, Components
from ...lens_core.memory.verdict import NOTHING, Device, Verdict, judge, lighter
from ...lens_core.needs import Picture
from ...lens_core.quant.policy import AUTO, NONE
from . import paths
from .kinds import variant_in
from .missing import NONE_YET
from .model import dtypes_for
from .quantized import free_for_models

# What is proposed where a denoiser does not fit whole, the nearest to bf16 first.
_LIGHTER = ("int8_dynamic", "uint4_sdnq")
# ``auto`` looks at what is free; in these steps, so that the answers can be kept.
_STEP = 1 << 28


@dataclass(frozen=True)
class Choice:
    """Options of the loaders' lists ("": that loader is not there), their settings, and the picture."""

    model: str
    dtype: str = "auto"
    quantization: str = NONE
    encoder: str = ""
    placement: str = "auto"
    dense: bool = False
    picture: Picture = field(default_factory=lambda: Picture(1024, 1024))


def verdict(choice: Choice) -> Verdict:
    """Whether it fits this machine. Raises CheckpointError for a file that is no longer as it was listed."""
    device = _device()
    free = free_for_models(device)
    is_cpu = device.type == "cpu"
    there = comfy.model_management.get_free_memory(device) if free is None else free
    reserve = 0 if is_cpu else comfy.model_management.extra_reserved_memory()
    machine = Device(there - reserve, comfy.model_management.get_total_memory(device), is_cpu)

    def denoiser(quantization: str) -> Component:
        rounded = None if free is None or quantization != AUTO else free // _STEP * _STEP
        path = component_path(paths.path_of("denoiser", choice.model), "denoiser")
        stamp = paths.stamp("denoiser", choice.model)
        return _denoiser(path, stamp, choice.dtype, quantization, choice.picture, device, rounded)

    encoder = NOTHING
    if choice.encoder:
        path = component_path(paths.path_of("encoder", choice.encoder), "encoder")
        placement = "gpu" if is_cpu else choice.placement
        stamp = paths.stamp("encoder", choice.encoder)
        encoder = _encoder(path, stamp, placement, choice.dense, choice.picture, device)
    parts = Components(encoder, denoiser(choice.quantization), NOTHING)
    smaller = {} if is_cpu or choice.quantization != NONE else {name: denoiser(name) for name in _LIGHTER}
    advice = _advice(choice, lighter(parts, smaller, machine.free), is_cpu)
    return judge(parts, machine, _covered(choice), advice)


def variants() -> dict[str, Variant]:
    """Which published checkpoint each option of LensModelLoader is, by its name and header."""
    names = (name for name in paths.choices("denoiser") if name != NONE_YET)
    found = {name: variant_in(component_path(paths.path_of("denoiser", name), "denoiser")) for name in names}
    return {name: variant for name, variant in found.items() if variant is not None}


def _device() -> torch.device:
    return comfy.model_management.get_torch_device()


def _covered(choice: Choice) -> str:
    """What the figures are of."""
    picture = choice.picture
    models = "the text encoder and the denoiser" if choice.encoder else "the denoiser"
    size = f"{picture.batch} x {picture.width}x{picture.height}"
    return f"For {size}: {models}; without the VAE and other programs."


def _advice(choice: Choice, quantization: str | None, is_cpu: bool) -> list[str]:
    if is_cpu:
        return ["Close other programs, or choose a smaller file: one in 8 or 4 bits."]
    tips = [] if quantization is None else [f"With quantization {quantization} it fits whole."]
    if choice.encoder and choice.placement == "gpu":
        tips.append("LensEncoderLoader's placement auto streams what does not fit.")
    return [*tips, "Or a smaller size, fewer pictures at once, other programs closed."]


@lru_cache(maxsize=64)
def _denoiser(
    path: Path,
    stamp: str,
    dtype: str,
    quantization: str,
    picture: Picture,
    device: torch.device,
    free: int | None,
) -> Component:
    file = open_denoiser(path)
    held, computing = dtypes_for(file.checkpoint, DTYPES.get(dtype), device)
    mode, _ = file.meant(quantization, device, free)
    return denoiser_file_needs(file, mode, device, held, computing, picture)


@lru_cache(maxsize=64)
def _encoder(
    path: Path, stamp: str, placement: str, dense: bool, picture: Picture, device: torch.device
) -> Component:
    bf16 = comfy.model_management.should_use_bf16(device)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return encoder_file_needs(open_encoder(path), placement, dtype, picture, dense=dense)
