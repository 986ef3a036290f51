"""From a path to a working component: recognise the file, build its module, fill it strictly.

A path is a single file, a component's folder, or a whole Lens folder in diffusers' layout, of which
the fitting sub-folder is taken. Modules are built without memory and receive the file's tensors, so
a component in its stored dtype is never copied.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import LensDenoiser
from .encoder import GptOssEncoder
from .errors import CheckpointError, MissingPackage
from .ops import Operations
from .prompt import PromptTokenizer
from .vae import LensVAE
from .weights import (
    Checkpoint,
    denoiser_config,
    encoder_config,
    load_into,
    open_checkpoint,
    vae_config,
)
from .weights.detect import is_ldm_vae, require
from .weights.keymap import DENOISER, ENCODER, ENCODER_UNUSED, VAE_DIFFUSERS, VAE_LDM
from .weights.loader import OnTensor
from .weights.reader import read_json

SUBFOLDERS = {"denoiser": "transformer", "encoder": "text_encoder", "vae": "vae"}
Read = Callable[[str], Tensor]


def component_path(path: str | Path, component: str) -> Path:
    """The component's own folder if ``path`` is a whole Lens folder, else ``path`` itself."""
    inside = Path(path) / SUBFOLDERS[component]
    return inside if inside.is_dir() else Path(path)


def load_denoiser(
    path: str | Path,
    dtype: torch.dtype,
    operations: Operations = nn,
    on_tensor: OnTensor | None = None,
) -> LensDenoiser:
    """The denoiser on the CPU in ``dtype``."""
    checkpoint = open_checkpoint(component_path(path, "denoiser"))
    model = LensDenoiser(denoiser_config(checkpoint), operations, dtype, device="meta")
    load_into(model, checkpoint, DENOISER, dtype, on_tensor=on_tensor)
    return model.eval()


def load_encoder(
    path: str | Path,
    dtype: torch.dtype | None,
    operations: Operations = nn,
    read: Callable[[Checkpoint], Read] | None = None,
    on_tensor: OnTensor | None = None,
) -> tuple[GptOssEncoder, PromptTokenizer]:
    """The encoder on the CPU, experts packed, the rest in ``dtype`` (None: as stored), and its
    tokenizer. ``read`` gives another way to read a checkpoint's tensors."""
    path = component_path(path, "encoder")
    checkpoint = open_checkpoint(path)
    config = encoder_config(checkpoint)
    tokenizer = _tokenizer(path, checkpoint)
    model = GptOssEncoder(config, operations, dtype, device="meta")
    reader = None if read is None else read(checkpoint)
    load_into(
        model,
        checkpoint,
        ENCODER,
        dtype,
        structure=GptOssEncoder(config, device="meta"),
        unused=ENCODER_UNUSED,
        read=reader,
        on_tensor=on_tensor,
    )
    return model.eval(), tokenizer


def load_vae(path: str | Path, dtype: torch.dtype, on_tensor: OnTensor | None = None) -> LensVAE:
    """The VAE on the CPU in ``dtype``, from either naming of its tensors."""
    path = component_path(path, "vae")
    checkpoint = open_checkpoint(path)
    require(checkpoint, "vae")
    beside = path / "config.json"
    config: dict[str, Any] = read_json(beside) if beside.is_file() else vae_config(checkpoint)
    source = beside if beside.is_file() else checkpoint.name
    try:
        with torch.device("meta"):
            vae = LensVAE(config)
    except MissingPackage:
        raise
    except Exception as error:  # whatever diffusers and torch raise at odd numbers
        raise CheckpointError(
            f"The sizes in {source} make no FLUX.2 VAE ({error}). Download the file again."
        ) from error
    table = VAE_LDM if is_ldm_vae(checkpoint) else VAE_DIFFUSERS
    counter = ("model.bn.num_batches_tracked",)
    load_into(vae, checkpoint, table, dtype, optional=counter, on_tensor=on_tensor)
    return vae.eval()


def _tokenizer(path: Path, checkpoint: Checkpoint) -> PromptTokenizer:
    if "tokenizer_json" in checkpoint.header:
        content = bytes(checkpoint.read("tokenizer_json").tolist()).decode("utf-8", "replace")
        return PromptTokenizer.from_json(content, f"the tokenizer in {checkpoint.name}")
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder / "tokenizer", folder.parent / "tokenizer"):
        if (place / "tokenizer.json").is_file():
            beside = place / "tokenizer.json"
            content = beside.read_text(encoding="utf-8", errors="replace")
            return PromptTokenizer.from_json(content, str(beside))
    raise CheckpointError(
        f"{checkpoint.name} holds no tokenizer and there is no tokenizer.json in {folder} or "
        f"{folder.parent / 'tokenizer'}. Copy gpt-oss-20b's tokenizer.json there."
    )
