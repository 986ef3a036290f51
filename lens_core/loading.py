"""From a path to a working component: recognise the file, build its module, fill it strictly.

A path is a single file, a component's folder, or a whole Lens folder in diffusers' layout, of which
the fitting sub-folder is taken. Modules are built without memory and receive the file's tensors, so
a component in its stored dtype is never copied.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .denoiser import LensDenoiser
from .denoiser_file import DenoiserFile
from .encoder import GptOssEncoder
from .encoder_file import EncoderFile
from .errors import CheckpointError, MissingPackage
from .lora.merge import NO_LORAS, Merge
from .ops import CastingOperations, Operations
from .prompt import PromptTokenizer
from .quant.policy import NONE
from .vae import LensVAE
from .weights import load_into, open_checkpoint, vae_config
from .weights.detect import is_ldm_vae
from .weights.keymap import VAE_DIFFUSERS, VAE_LDM, Table
from .weights.kind import part_of, require
from .weights.loader import AnyCheckpoint, OnTensor, plan_load
from .weights.opening import SUBFOLDERS, component_path
from .weights.reader import read_json

__all__ = [
    "DTYPES",
    "SUBFOLDERS",
    "build_denoiser",
    "check_component",
    "component_path",
    "load_denoiser",
    "load_encoder",
    "load_vae",
    "open_denoiser",
    "open_encoder",
]
# What models may be held in. Not float16: Lens overflows in it.
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Of the batch norm's training; some files lack it.
_COUNTER = ("model.bn.num_batches_tracked",)
_MOST_VAE_LAYERS = 16  # FLUX.2's has 2 in each of 4 blocks


def load_denoiser(
    path: str | Path,
    dtype: torch.dtype,
    operations: Operations = nn,
    on_tensor: OnTensor | None = None,
    quantization: str = NONE,
    device: torch.device | str = "cpu",
) -> LensDenoiser:
    """The denoiser on the CPU in ``dtype``, quantised as its file is or on ``device`` by ``quantization``."""
    file = open_denoiser(path)
    return build_denoiser(
        file, dtype, operations, on_tensor, file.mode(quantization, torch.device(device)), device
    )


def build_denoiser(
    file: DenoiserFile,
    dtype: torch.dtype,
    operations: Operations = nn,
    on_tensor: OnTensor | None = None,
    mode: str = NONE,
    device: torch.device | str = "cpu",
    loras: Merge = NO_LORAS,
) -> LensDenoiser:
    """The same of a file that is open, by the ``mode`` that it gave, with ``loras`` in its weights."""
    model = LensDenoiser(file.config, operations, dtype, device="meta")
    file.load(model, dtype, mode=mode, device=device, on_tensor=on_tensor, loras=loras)
    return model.eval()


def open_denoiser(path: str | Path) -> DenoiserFile:
    """A denoiser's file or folder, opened and checked but not read."""
    return DenoiserFile(component_path(path, "denoiser"))


def open_encoder(path: str | Path, tokenizer_places: Sequence[Path] = ()) -> EncoderFile:
    """An encoder's file or folder, opened and checked but not read.

    ``tokenizer_places`` are folders or files to look for a tokenizer.json in after the usual ones.
    """
    return EncoderFile(component_path(path, "encoder"), tokenizer_places)


def load_encoder(
    path: str | Path,
    dtype: torch.dtype | None,
    operations: Operations = CastingOperations,
    on_tensor: OnTensor | None = None,
) -> tuple[GptOssEncoder, PromptTokenizer]:
    """The encoder on the CPU, experts packed, the rest in ``dtype`` (None: as stored), and its
    tokenizer."""
    file = open_encoder(path)
    tokenizer = file.tokenizer
    model = GptOssEncoder(file.config, operations, dtype, device="meta")
    file.load(model, dtype, on_tensor)
    return model.eval(), tokenizer


def load_vae(path: str | Path, dtype: torch.dtype, on_tensor: OnTensor | None = None) -> LensVAE:
    """The VAE on the CPU in ``dtype``, from either naming of its tensors."""
    vae, checkpoint, table = _open_vae(component_path(path, "vae"))
    load_into(vae, checkpoint, table, dtype, optional=_COUNTER, on_tensor=on_tensor)
    return vae.eval()


def check_component(path: str | Path, component: str, tokenizer_places: Sequence[Path] = ()) -> None:
    """Raise the error that loading a denoiser, encoder or vae would, from the header alone."""
    if component == "denoiser":
        open_denoiser(path).check()
    elif component == "encoder":
        _ = open_encoder(path, tokenizer_places).tokenizer
    else:
        vae, checkpoint, table = _open_vae(component_path(path, "vae"))
        plan_load(vae, checkpoint, table, optional=_COUNTER)


def _open_vae(path: Path) -> tuple[LensVAE, AnyCheckpoint, Table]:
    """A VAE without memory, its tensors in the file, and how they are renamed."""
    whole = open_checkpoint(path)
    require(whole, "vae")
    checkpoint = part_of(whole, "vae")
    beside = path / "config.json"
    config: dict[str, Any] = read_json(beside) if os.path.isfile(beside) else vae_config(checkpoint)
    source = beside if os.path.isfile(beside) else checkpoint.name
    try:
        _check_counts(config)
        with torch.device("meta"):
            vae = LensVAE(config)
    except MissingPackage:
        raise
    except Exception as error:  # whatever diffusers and torch raise at odd numbers
        raise CheckpointError(
            f"The sizes in {source} make no FLUX.2 VAE ({error}). Download the file again."
        ) from error
    table: Table = VAE_LDM if is_ldm_vae(checkpoint) else VAE_DIFFUSERS
    return vae, checkpoint, table


def _check_counts(config: dict[str, Any]) -> None:
    """Raise ValueError where the VAE would be built of so many layers that this would take minutes."""
    layers = config.get("layers_per_block", 2)
    if isinstance(layers, int) and layers > _MOST_VAE_LAYERS:
        raise ValueError(f"{layers:,} layers_per_block")
    for name, value in config.items():
        if isinstance(value, list) and len(value) > _MOST_VAE_LAYERS:
            raise ValueError(f"{len(value):,} {name}")
