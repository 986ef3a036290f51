"""Joins adapters that were trained on q, k and v of a fused layer apart.

A fused layer's rows are all of q, then of k, then of v, so a part's change is in a third of the rows. Of a
LoRA or LoHa the factors that make rows go into a block-diagonal matrix and the others on top of each other;
blocks of an OFT and magnitudes of a DoRA follow each other. Of a LoKr there is no such factor, so its change
is written out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .delta import change, scale_of

Layer = dict[str, Tensor]
_PARTS = range(3)
# (tall, wide) factors, the first of which take the scale.
_LORA = (("lora_up.weight", "lora_down.weight"),)
_LOHA = (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))
_TUCKER = ("lora_mid.weight", "hada_t1", "hada_t2")


def join(parts: Mapping[int, Layer], rows: int, columns: int) -> Layer | None:
    """One adapter for a weight [3 ``rows``, ``columns``] from those of its q, k and v (0, 1, 2), of which
    some may lack.

    None where they make none: of a DoRA a part lacks or is no LoRA, or it has a magnitude for each input;
    OFTs turn inputs, or outputs in blocks of several sizes.
    """
    joined: Layer = {}
    if any("diff_b" in part for part in parts.values()):
        joined["diff_b"] = _rows(parts, "diff_b", torch.zeros(rows))
    weights = {i: {k: v for k, v in part.items() if k != "diff_b"} for i, part in parts.items()}
    weights = {i: part for i, part in weights.items() if part}
    if not weights:
        return joined
    names = {name for part in weights.values() for name in part}
    made = _joined_weights(weights, names, rows, columns)
    if made is None or "dora_scale" not in names:
        return None if made is None else joined | made
    magnitudes = [part.get("dora_scale") for part in weights.values()]
    whole = len(weights) == len(_PARTS) and "diff" not in made
    if not whole or any(one is None or one.shape != (rows, 1) for one in magnitudes):
        return None
    return joined | made | {"dora_scale": _rows(weights, "dora_scale", torch.empty(0, 1))}


def _joined_weights(parts: Mapping[int, Layer], names: set[str], rows: int, columns: int) -> Layer | None:
    if "oft_R.weight" in names:
        return None
    if "oft_blocks" in names:
        return _oft(parts, rows)
    if not names & set(_TUCKER):
        for pairs in (_LORA, _LOHA):
            if all(pairs[0][0] in part for part in parts.values()):
                return _factors(parts, pairs, rows)
    none = torch.zeros(rows, columns)
    return {"diff": torch.cat([change(parts[i], (rows, columns)) if i in parts else none for i in _PARTS])}


def _factors(parts: Mapping[int, Layer], pairs: tuple[tuple[str, str], ...], rows: int) -> Layer:
    """The factors joined, with one alpha where the scales are alike; else they go into a factor."""
    wide = pairs[0][1]
    scales = {i: scale_of(part, part[wide].shape[0]) for i, part in parts.items()}
    alike = len(set(scales.values())) == 1
    joined: Layer = {}
    for index, (tall, wide) in enumerate(pairs):
        blocks = [torch.zeros(rows, 0)] * len(_PARTS)
        for i, part in parts.items():
            folded = not alike and index == 0
            blocks[i] = part[tall].float() * scales[i] if folded else part[tall]
        joined[tall] = torch.block_diag(*blocks)
        joined[wide] = torch.cat([parts[i][wide] for i in sorted(parts)])
    if alike and any("alpha" in part for part in parts.values()):
        joined["alpha"] = torch.tensor(scales.popitem()[1] * joined[pairs[0][1]].shape[0])
    return joined


def _oft(parts: Mapping[int, Layer], rows: int) -> Layer | None:
    sizes = {part["oft_blocks"].shape[1] if "oft_blocks" in part else 0 for part in parts.values()}
    if len(sizes) > 1:
        return None
    size = sizes.pop()
    still = torch.zeros(rows // size, size, size)
    joined = {"oft_blocks": torch.cat([parts[i]["oft_blocks"] if i in parts else still for i in _PARTS])}
    if any("rescale" in part for part in parts.values()):
        joined["rescale"] = _rows(parts, "rescale", torch.ones(rows, 1))
    return joined


def _rows(parts: Mapping[int, Layer], name: str, default: Tensor) -> Tensor:
    """Tensors of the parts after each other, ``default`` where there is none."""
    found = [parts.get(i, {}).get(name, default) for i in _PARTS]
    return torch.cat([tensor.float().reshape(-1, *default.shape[1:]) for tensor in found])
