"""LoRA files for a few layers of the tiny denoiser, and its weights changed by hand as the files say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.lora_files import Change, write

LAYERS = (
    "transformer_blocks.0.attn.img_qkv",
    "transformer_blocks.1.attn.to_out.0",  # as many rows as columns
    "transformer_blocks.1.attn.to_add_out",
    "transformer_blocks.2.txt_mod.1",
)


def write_kind(
    path: Path,
    kind: str,
    network: Any,
    layers: Collection[str] = LAYERS,
    spelling: str = "OneTrainer",
    **more: Any,
) -> dict[str, Change]:
    """Save an adapter of one kind; returns what it makes of each layer's weight."""
    modules = {name: network.get_submodule(name) for name in layers}
    sizes = {name: (module.out_features, module.in_features) for name, module in modules.items()}
    return write(path, sizes, kind, spelling, **more)


def changed(weight: torch.Tensor, change: Change, strength: float) -> torch.Tensor:
    """A weight with an adapter at a strength, in fp64."""
    return weight.double() + strength * (change(weight) - weight.double())


def merge(network: Any, changes: Mapping[str, Change], strength_of: Callable[[str], float]) -> None:
    """Change a network's weights by hand."""
    for name, change in changes.items():
        module = network.get_submodule(name)
        value = changed(module.weight, change, strength_of(name)).float()
        module.weight = torch.nn.Parameter(value, requires_grad=False)
