"""Writes a Lens denoiser as a GGUF, each linear in a chosen type, and tells what its numbers are.

Independent of the loaders: the gguf package's own writer, its ``quantize``, and for K-quants, which that
cannot make, the quantisers below.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lens_core.tiny.models import denoiser_weights

K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")
PLAIN = ("F32", "F16", "BF16")


def tiny_weights(seed: int = 0) -> dict[str, Tensor]:
    """The tiny denoiser's fp32 tensors, hidden size 128, under the checkpoint's names."""
    return denoiser_weights(torch.Generator().manual_seed(seed))


def write_denoiser(
    path: Path,
    kind: str | Callable[[str], str] = "Q8_0",
    weights: dict[str, Tensor] | None = None,
    *,
    vectors: str = "F32",
    prefix: str = "",
    architecture: str = "lens",
) -> dict[str, tuple[str, Tensor]]:
    """Write ``weights`` (None: the tiny denoiser's) to ``path``, 1-d tensors as ``vectors``, all under
    ``prefix``.

    ``kind`` is the type of all linears, or tells it by a weight's name; see ``type_for`` for rows that it
    cannot hold. Returns, under the names without prefix, the type that each tensor got and the fp32 values
    that it then stands for.
    """
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    written = {}
    for name, tensor in (tiny_weights() if weights is None else weights).items():
        wanted = vectors if tensor.ndim == 1 else kind if isinstance(kind, str) else kind(name)
        used = type_for(wanted, tensor.shape[-1])
        raw = quantize(tensor.float().numpy(), used)
        number = gguf.GGMLQuantizationType[used]
        writer.add_tensor(prefix + name, raw, raw_dtype=number)
        written[name] = used, torch.from_numpy(gguf.quants.dequantize(raw, number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def type_for(kind: str, columns: int) -> str:
    """``kind`` or, for rows that are no whole blocks of it, Q8_0, or F16 for those of no block type.

    In the tiny denoiser K-quants fit ``txt_in`` and ``linear_1`` of the time embedding (256 inputs), and no
    block type fits ``w2`` (341 inputs).
    """
    if kind in PLAIN or columns % (256 if kind in K_QUANTS else 32) == 0:
        return kind
    return "Q8_0" if columns % 32 == 0 else "F16"


def quantize(weight: np.ndarray, kind: str) -> np.ndarray:
    """fp32 [N, K] -> as the type stores it: u8 [N, bytes of a row], or plain numbers."""
    import gguf

    if kind not in K_QUANTS:
        return gguf.quants.quantize(np.ascontiguousarray(weight), gguf.GGMLQuantizationType[kind])
    blocks = weight.reshape(-1, 256)
    rows = _q6_k(blocks) if kind == "Q6_K" else _q45_k(blocks, 5 if kind == "Q5_K" else 4)
    return rows.reshape(len(weight), -1)


def _factor(largest: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """[B, groups] of scales -> a block's fp16 factor [B, 1], and integers up to ``top``, [B, groups]."""
    factor = (np.abs(largest).max(-1, keepdims=True) / top).astype(np.float16)
    wide = np.maximum(factor.astype(np.float32), 1e-30)
    return factor, np.clip(np.round(largest / wide), -top, top).astype(np.int8)


def _q45_k(blocks: np.ndarray, bits: int) -> np.ndarray:
    """[B, 256] -> Q4_K or Q5_K, u8 [B, 144 or 176]: a group from its smallest, at most 0, to its largest."""
    groups = blocks.reshape(-1, 8, 32)
    low = np.minimum(groups.min(-1), 0)
    d, scales = _factor((groups.max(-1) - low) / (2**bits - 1), 63)
    dmin, minima = _factor(-low, 63)
    step = d.astype(np.float32) * scales
    raised = groups + (dmin.astype(np.float32) * minima)[..., None]
    numbers = np.round(raised / np.maximum(step, 1e-30)[..., None]).clip(0, 2**bits - 1).astype(np.uint8)
    s, m = scales.astype(np.uint8), minima.astype(np.uint8)
    packed = (
        s[:, :4] | (s[:, 4:] >> 4 << 6),
        m[:, :4] | (m[:, 4:] >> 4 << 6),
        (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
    )
    low_bits = numbers & 15
    nibbles = (low_bits[:, 0::2] | low_bits[:, 1::2] << 4).reshape(-1, 128)
    fifth = [np.packbits(numbers >> 4, axis=1, bitorder="little").reshape(-1, 32)] if bits == 5 else []
    return np.concatenate([d.view(np.uint8), dmin.view(np.uint8), *packed, *fifth, nibbles], axis=-1)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """[B, 256] -> Q6_K, u8 [B, 210]: the largest of each 16 at 31."""
    groups = blocks.reshape(-1, 16, 16)
    d, scales = _factor(np.abs(groups).max(-1) / 31, 127)
    step = np.maximum(d.astype(np.float32) * scales, 1e-30)[..., None]
    numbers = (np.round(groups / step).clip(-32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = numbers & 15, numbers >> 4
    ql = low[:, :, :2] | low[:, :, 2:] << 4
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    parts = [ql.reshape(-1, 128), qh.reshape(-1, 64), scales.view(np.uint8), d.view(np.uint8)]
    return np.concatenate(parts, axis=-1)
