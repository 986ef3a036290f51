"""A tiny decoder of FLUX.2's latents (TAEF2) as a VAE for drafts: ComfyUI's own class, under the name that
its previews and its VAELoader know. A decoder alone is enough; with the encoder it encodes too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.taesd.taesd
import folder_paths
import torch
from torch import Tensor

from ...lens_core.config import LATENT_CHANNELS, PIXELS_PER_TOKEN
from ...lens_core.errors import CheckpointError, CheckpointMismatch, SettingError
from ...lens_core.weights import open_checkpoint

DRAFT = "taef2"
_FOLDER, _SUFFIX = "vae_approx", ".safetensors"


class DraftVAE(comfy.sd.VAE):
    """comfy.sd.VAE of a decoder, which says so where it is asked to encode."""

    can_encode = True

    def encode(self, *args: Any, **kwargs: Any) -> Tensor:
        """Latents; raises SettingError without the encoder."""
        if not self.can_encode:
            raise SettingError(
                f"{DRAFT} has no encoder here, so it only decodes. Use flux2-vae to encode pictures, or put "
                f"{DRAFT}_encoder{_SUFFIX} into models/{_FOLDER}."
            )
        return super().encode(*args, **kwargs)


def draft_choices() -> list[str]:
    """LensVAELoader's option for it, if its decoder is there."""
    return [DRAFT] if _part("decoder") else []


def load_draft_vae() -> DraftVAE:
    """The decoder, and the encoder if it is there; raises CheckpointError for other files of their names."""
    files = {part: path for part in ("decoder", "encoder") if (path := _part(part)) is not None}
    if "decoder" not in files:
        raise CheckpointError(
            f"There is no {DRAFT}_decoder{_SUFFIX} in models/{_FOLDER}. Put it there and press R, or choose "
            "another VAE."
        )
    with torch.device("meta"):
        structure = comfy.taesd.taesd.TAESD(latent_channels=LATENT_CHANNELS[0]).state_dict()
    # What is never used is not left to chance either; neither scale nor shift is stored.
    weights = {name: torch.zeros(value.shape) for name, value in structure.items()}
    weights["vae_scale"] = torch.ones(())
    for part, path in files.items():
        weights |= _read(path, f"taesd_{part}.", structure)
    vae = DraftVAE(sd=weights, metadata={"tae_latent_channels": LATENT_CHANNELS[0]})
    vae.downscale_ratio = vae.upscale_ratio = PIXELS_PER_TOKEN
    vae.can_encode = "encoder" in files
    return vae


def _read(path: Path, prefix: str, structure: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under the network's names; raises CheckpointMismatch where they are not its own."""
    checkpoint = open_checkpoint(path)
    there = {prefix + name: tuple(info.shape) for name, info in checkpoint.header.items()}
    wanted = {name: tuple(value.shape) for name, value in structure.items() if name.startswith(prefix)}
    missing, unexpected = sorted(wanted.keys() - there.keys()), sorted(there.keys() - wanted.keys())
    wrong = [(name, wanted[name], there[name]) for name in wanted.keys() & there.keys()]
    wrong = [entry for entry in wrong if entry[1] != entry[2]]
    if missing or unexpected or wrong:
        raise CheckpointMismatch(str(path), missing, unexpected, wrong)
    return {prefix + name: checkpoint.read(name) for name in checkpoint.header}


def _part(which: str) -> Path | None:
    name = f"{DRAFT}_{which}{_SUFFIX}"
    path = folder_paths.get_full_path(_FOLDER, name)
    return None if path is None else Path(path)
