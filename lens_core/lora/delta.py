"""What an adapter makes of a weight: the plain definition of each kind, in fp32.

A layer's tensors are under the names that ComfyUI's weight adapters know; s is its scale, alpha / rank, or 1
where there is no alpha. W is [O, I].

- LoRA (arXiv 2106.09685): W + s up down; with ``lora_mid``, up mid down (LyCORIS' Tucker form).
- LoHa (arXiv 2108.06098): W + s (w1_a w1_b) * (w2_a w2_b), elementwise.
- LoKr (LyCORIS, arXiv 2309.14859): W + s kron(w1, w2), each whole or a product; s = 1 where both are whole.
- DoRA (arXiv 2402.09353): m V / |V| with V = W + change; the norm is over a row where ``dora_scale`` is
  [O, 1] (the paper's, PEFT's, LyCORIS' ``wd_on_output``) and over a column where it is [1, I] (LyCORIS
  before).
- OFT (arXiv 2306.07280): blocks of outputs turned by the Cayley transform of Q = B - B^T, then ``rescale``,
  as LyCORIS' Diag-OFT; or blocks of inputs (``oft_R.weight``, the numbers above Q's diagonal), as PEFT's and
  OneTrainer's OFTv2 (arXiv 2506.19847), whose inverse is a series of ``oft_terms``, 0 for the inverse itself.
- ``diff``: W + diff.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .kinds import block_size
from .metadata import TERMS

Layer = Mapping[str, Tensor]


def merged(weight: Tensor, layer: Layer, strength: float) -> Tensor:
    """Weight [O, I] in fp32 with the adapter at ``strength``: W + strength (changed W - W)."""
    weight = weight.float()
    if "oft_blocks" in layer or "oft_R.weight" in layer:
        turn = _turned_outputs if "oft_blocks" in layer else _turned_inputs
        changed = turn(weight, layer)
    elif set(layer) <= {"diff_b"}:
        return weight
    else:
        changed = weight + change(layer, (weight.shape[0], weight.shape[1])).to(weight.device)
    if "dora_scale" in layer:
        changed = _decomposed(changed, layer["dora_scale"].to(weight.device, torch.float32))
    return weight + strength * (changed - weight)


def merged_bias(bias: Tensor, layer: Layer, strength: float) -> Tensor:
    """Bias [O] in fp32 with the adapter's ``diff_b``, if it has one."""
    if "diff_b" not in layer:
        return bias.float()
    return bias.float() + strength * layer["diff_b"].to(bias.device, torch.float32)


def change(layer: Layer, size: tuple[int, int]) -> Tensor:
    """What a LoRA, LoHa, LoKr or ``diff`` adds to a weight of ``size`` (O, I), before DoRA, in fp32."""
    wide = {name: tensor.float() for name, tensor in layer.items()}
    if "diff" in wide:
        return wide["diff"].reshape(size)
    if "lora_up.weight" in wide:
        up, down = wide["lora_up.weight"].flatten(1), wide["lora_down.weight"].flatten(1)
        scale = scale_of(layer, down.shape[0])
        if "lora_mid.weight" in wide:
            down = wide["lora_mid.weight"].flatten(1) @ down
        return scale * (up @ down)
    if "hada_w1_a" in wide:
        rank = wide["hada_w1_b"].shape[0]
        first = _product(wide, "hada_w1_a", "hada_w1_b", "hada_t1")
        return scale_of(layer, rank) * first * _product(wide, "hada_w2_a", "hada_w2_b", "hada_t2")
    return _kronecker(wide, layer)


def constrained(blocks: Tensor, layer: Layer, rows: int) -> Tensor:
    """An OFT's Q = B - B^T, its norm over all blocks at most alpha * O where there is an alpha above 0."""
    skew = blocks - blocks.transpose(1, 2)
    limit = float(layer["alpha"]) * rows if "alpha" in layer else 0.0
    norm = float(skew.norm()) + 1e-8
    return skew * (limit / norm) if 0 < limit < norm else skew


def scale_of(layer: Layer, rank: int) -> float:
    """alpha / rank, or 1 without alpha."""
    return float(layer["alpha"]) / rank if "alpha" in layer else 1.0


def _kronecker(wide: Layer, layer: Layer) -> Tensor:
    factors, rank = [], None
    for number in "12":
        if f"lokr_w{number}" in wide:
            factors.append(wide[f"lokr_w{number}"].flatten(1))
            continue
        names = f"lokr_w{number}_a", f"lokr_w{number}_b", f"lokr_t{number}"
        factors.append(_product(wide, *names))
        rank = wide[names[1]].shape[0]
    return (1.0 if rank is None else scale_of(layer, rank)) * torch.kron(*factors)


def _product(wide: Layer, a: str, b: str, core: str) -> Tensor:
    if core not in wide:
        return wide[a].flatten(1) @ wide[b].flatten(1)
    return wide[a].flatten(1).T @ wide[core].flatten(1) @ wide[b].flatten(1)


def _decomposed(changed: Tensor, magnitude: Tensor) -> Tensor:
    by_row = magnitude.shape[0] == changed.shape[0]
    norm = changed.norm(dim=1 if by_row else 0, keepdim=True)
    # LyCORIS' guard against rows of zeros.
    return changed * (magnitude / (norm + torch.finfo(torch.float32).eps))


def _turned_outputs(weight: Tensor, layer: Layer) -> Tensor:
    blocks = layer["oft_blocks"].to(weight.device, torch.float32)
    rotation = _cayley(constrained(blocks, layer, weight.shape[0]))
    groups = weight.view(len(blocks), -1, weight.shape[1])
    turned = (rotation.transpose(1, 2) @ groups).view_as(weight)
    if "rescale" in layer:
        turned = turned * layer["rescale"].to(weight.device, torch.float32).reshape(-1, 1)
    return turned


def _cayley(skew: Tensor) -> Tensor:
    one = torch.eye(skew.shape[-1], device=skew.device)
    return torch.linalg.solve(one - skew, one + skew, left=False)


def _turned_inputs(weight: Tensor, layer: Layer) -> Tensor:
    numbers = layer["oft_R.weight"].to(weight.device, torch.float32)
    side = block_size(numbers.shape[1])
    rows, columns = torch.triu_indices(side, side, 1, device=weight.device)
    skew = numbers.new_zeros(len(numbers), side, side)
    skew[:, rows, columns] = numbers
    skew = skew - skew.transpose(1, 2)
    terms = int(layer["oft_terms"]) if "oft_terms" in layer else TERMS
    # PEFT's inverse has the other sign than its series.
    rotation = _neumann(skew, terms) if terms else _cayley(-skew)
    groups = weight.view(weight.shape[0], -1, side).transpose(0, 1)
    return (groups @ rotation.transpose(1, 2)).transpose(0, 1).reshape(weight.shape)


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """(1 + Q)(1 - Q)^-1 as 1 + 2 Q + 2 Q^2 + ..., the last of so many terms once, as PEFT has it."""
    terms = max(terms, 4) if terms > 2 else terms  # of 3, PEFT adds a fourth
    total, power = torch.eye(skew.shape[-1], device=skew.device).expand_as(skew), skew
    for term in range(1, terms):
        total = total + (1 if term == terms - 1 and terms > 2 else 2) * power
        power = power @ skew
    return total
