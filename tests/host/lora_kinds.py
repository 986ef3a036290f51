"""Small adapters of every kind for the tiny denoiser, as files and as what they make of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lens_core.lora.delta import merged, merged_bias

LAYERS = (
    "transformer_blocks.0.attn.img_qkv",
    "transformer_blocks.1.attn.to_out.0",  # as many rows as columns
    "transformer_blocks.1.attn.to_add_out",
    "transformer_blocks.2.txt_mod.1",
)
RANK = 4
Layer = dict[str, Tensor]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape) / shape[-1] ** 0.5


def _lora(rows: int, columns: int) -> Layer:
    return {
        "lora_up.weight": 2 * _normal(rows, RANK),
        "lora_down.weight": _normal(RANK, columns),
        "alpha": torch.tensor(3.0),
    }


def _loha(rows: int, columns: int) -> Layer:
    sides = {"a": (rows, RANK), "b": (RANK, columns)}
    return {f"hada_w{n}_{side}": 5 * _normal(*shape) for n in "12" for side, shape in sides.items()}


def _tucker(rows: int, columns: int) -> Layer:
    """LoHa around cores, whose outer factors lie the other way round."""
    layer = {
        f"hada_w{n}_{side}": 9 * _normal(RANK, s)
        for n in "12"
        for side, s in zip("ab", (rows, columns), strict=True)
    }
    return layer | {f"hada_t{n}": _normal(RANK, RANK) for n in "12"} | {"alpha": torch.tensor(2.0)}


KINDS: dict[str, Callable[[int, int], Layer]] = {
    "LoRA": _lora,
    "LoHa": _loha,
    "LoHa with cores": _tucker,
    "LoKr": lambda rows, columns: {
        "lokr_w1": _normal(4, 4),
        "lokr_w2_a": 2 * _normal(rows // 4, RANK),
        "lokr_w2_b": _normal(RANK, columns // 4),
        "alpha": torch.tensor(2.0),
    },
    "DoRA by row": lambda rows, columns: _lora(rows, columns) | {"dora_scale": torch.rand(rows, 1)},
    "DoRA by column": lambda rows, columns: _lora(rows, columns) | {"dora_scale": torch.rand(1, columns)},
    "OFT": lambda rows, columns: {
        "oft_blocks": _normal(rows // 16, 16, 16),
        "rescale": 1 + torch.rand(rows, 1),
        "alpha": torch.tensor(0.01),
    },
    "OFT on inputs": lambda rows, columns: {"oft_R.weight": _normal(columns // 16, 16 * 15 // 2)},
    "full": lambda rows, columns: {"diff": _normal(rows, columns), "diff_b": torch.randn(rows)},
}


def write_kind(path: Path, kind: str, network: Any, layers: tuple[str, ...] = LAYERS) -> dict[str, Layer]:
    """Save a LoRA of one kind; returns each layer's tensors."""
    torch.manual_seed(7)
    written = {}
    for name in layers:
        module = network.get_submodule(name)
        written[name] = KINDS[kind](module.out_features, module.in_features)
    stored = {
        f"diffusion_model.{name}.{key}": t for name, layer in written.items() for key, t in layer.items()
    }
    save_file(stored, path)
    return written


def merge(network: Any, layers: Mapping[str, Layer], strengths: Callable[[str], float]) -> None:
    """Change a network's weights and biases by lens_core's definition of each kind."""
    for name, layer in layers.items():
        module = network.get_submodule(name)
        for key, change in (("weight", merged), ("bias", merged_bias)):
            value = change(getattr(module, key), layer, strengths(name))
            setattr(module, key, torch.nn.Parameter(value, requires_grad=False))
