"""Joins adapters that were trained on q, k and v of a fused layer apart.

The fused layers' rows are all of q, then of k, then of v (``kernels.block``), so a part's change is a third of
the rows: of a LoRA or LoHa the factors that make rows go into a block-diagonal matrix and the others on top of
each other; blocks of an OFT follow each other. Of a LoKr there is no such factor, so its change is written out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .delta import change, scale_of

Layer = dict[str, Tensor]
_PAIRS = {
    "lora_up.weight": (("lora_up.weight", "lora_down.weight"),),
    "hada_w1_a": (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
}


def join(parts: Mapping[int, Layer], rows: int, columns: int) -> Layer | None:
    """One adapter for a weight [3 ``rows``, ``columns``] from those of its q, k and v (0, 1, 2), of which some
    may lack. None where they make none: a DoRA lacks a part, or has a magnitude for each input."""
    joined: Layer = {}
    if any("diff_b" in part for part in parts.values()):
        biases = [parts[i]["diff_b"] if i in parts and "diff_b" in parts[i] else None for i in range(3)]
        joined["diff_b"] = torch.cat([torch.zeros(rows) if b is None else b.float() for b in biases])
        if all(set(part) == {"diff_b"} for part in parts.values()):
            return joined
    weights = {i: {k: v for k, v in part.items() if k != "diff_b"} for i, part in parts.items()}
    weights = {i: part for i, part in weights.items() if part}
    if any("dora_scale" in part for part in weights.values()):
        magnitude = _magnitudes(weights)
        if magnitude is None:
            return None
        joined["dora_scale"] = magnitude
    if any("oft_R.weight" in part for part in weights.values()):
        return None
    if any("oft_blocks" in part for part in weights.values()):
        turned = _oft(weights, rows)
        return None if turned is None else joined | turned
    for name, pairs in _PAIRS.items():
        plain = not any(key.endswith(("mid.weight", "_t1")) for part in weights.values() for key in part)
        if plain and all(name in part for part in weights.values()):
            return joined | _factors(weights, pairs, rows)
    written = [
        change(weights[i], (rows, columns)) if i in weights else torch.zeros(rows, columns) for i in range(3)
    ]
    if "dora_scale" in joined:
        return None
    return joined | {"diff": torch.cat(written)}


def _factors(parts: Mapping[int, Layer], pairs: Sequence[tuple[str, str]], rows: int) -> Layer:
    joined = {}
    for index, (tall, wide) in enumerate(pairs):
        blocks, stacked = [], []
        for number in range(3):
            if number not in parts:
                blocks.append(torch.zeros(rows, 0))
                continue
            part = parts[number]
            scale = scale_of(part, part[wide].shape[0]) if index == 0 else 1.0
            blocks.append(part[tall].float() * scale)
            stacked.append(part[wide].float())
        joined |= {tall: torch.block_diag(*blocks), wide: torch.cat(stacked)}
    return joined


def _magnitudes(parts: Mapping[int, Layer]) -> Tensor | None:
    found = [parts[i].get("dora_scale") if i in parts else None for i in range(3)]
    if any(one is None or one.shape[1] != 1 for one in found):
        return None
    return torch.cat([one.float() for one in found if one is not None])


def _oft(parts: Mapping[int, Layer], rows: int) -> Layer | None:
    sizes = {part["oft_blocks"].shape[1] if "oft_blocks" in part else 0 for part in parts.values()}
    if len(sizes) > 1:
        return None
    size = sizes.pop()
    still, one = torch.zeros(rows // size, size, size), torch.ones(rows, 1)
    blocks = [parts[i]["oft_blocks"].float() if i in parts else still for i in range(3)]
    joined = {"oft_blocks": torch.cat(blocks)}
    if any("rescale" in part for part in parts.values()):
        rescale = [parts[i].get("rescale", one) if i in parts else one for i in range(3)]
        joined["rescale"] = torch.cat([r.float().reshape(rows, 1) for r in rescale])
    return joined
