"""The encoder in ComfyUI's nvfp4 layout: no ``model.``, and a bank as a module of its own."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import mxfp4, nvfp4


def to_comfy_nvfp4(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's MXFP4 tensors, requantised."""
    result = {}
    for name, tensor in encoder.items():
        key = name.removeprefix("model.")
        bank, _, part = key.rpartition("_")
        if ".experts." not in key:
            result[key] = tensor
        elif part == "bias":
            result[f"{bank}.bias"] = tensor
        elif part == "blocks":
            scales = encoder[name.removesuffix("blocks") + "scales"]
            for kind, stored in _bank(mxfp4.dequantize(tensor, scales, torch.float32)).items():
                result[f"{bank}.{kind}"] = stored
    del result["lm_head.weight"]
    return dict(sorted(result.items()))


def _bank(weight: Tensor) -> dict[str, Tensor]:
    """weight [E, N, K] -> what ComfyUI stores of a bank."""
    blocks, scales, factors = nvfp4.quantize(weight)
    content = json.dumps({"format": "nvfp4", "num_experts": len(weight)}).encode()
    return {
        "weight": ((blocks << 4) | (blocks >> 4)).flatten(-2),
        "weight_scale": torch.stack([_tiled(expert) for expert in scales]).view(torch.float8_e4m3fn),
        "weight_scale_2": factors,
        "comfy_quant": torch.tensor(list(content), dtype=torch.uint8),
    }


def _tiled(scales: Tensor) -> Tensor:
    """u8 [N, K/16] -> cuBLAS' order, padded to tiles of 128 by 4 (see weights.banks.unblocked)."""
    rows, columns = scales.shape
    padded = F.pad(scales, (0, -columns % 4, 0, -rows % 128))
    tiles = padded.view(-1, 4, 32, padded.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(padded.shape)
