"""The expert layer in fp64, one token and one slot at a time, from nothing but the dequantised weights."""

from __future__ import annotations

import torch
from torch import Tensor

from lens_core.kernels import Bank
from lens_core.kernels.eager import dense


def expert_loop(x: Tensor, chosen: Tensor, routing: Tensor, bank: Bank) -> Tensor:
    """x [T, H], chosen and routing [T, K] -> fp64 [T, K, H]."""
    gate_up, down = (dense(matrices, torch.float32).double() for matrices in (bank.gate_up, bank.down))
    gate_up_bias, down_bias = bank.gate_up.bias.double(), bank.down.bias.double()
    out = torch.empty(*chosen.shape, x.shape[1], dtype=torch.float64)
    for token in range(len(x)):
        for slot, expert in enumerate(chosen[token].tolist()):
            both = gate_up[expert] @ x[token].double() + gate_up_bias[expert]
            gate, up = both[::2].clamp(max=bank.limit), both[1::2].clamp(-bank.limit, bank.limit)
            hidden = gate / (1 + torch.exp(-bank.alpha * gate)) * (up + 1)
            out[token, slot] = routing[token, slot].double() * (down[expert] @ hidden + down_bias[expert])
    return out
