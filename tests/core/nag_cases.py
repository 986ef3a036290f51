"""One attention layer that reads an image and two prompts: what a forward would share with it."""

from __future__ import annotations

import torch
from torch import Tensor

from lens_core.config import DenoiserConfig
from lens_core.denoiser.block import JointAttention, Shared
from lens_core.denoiser.nag import TwoPrompts
from lens_core.denoiser.rope import joint_positions, rotary_table
from lens_core.kernels import EAGER_LINEAR, BlockKernels
from lens_core.quantized import form_of


def joint_rotary(config: DenoiserConfig, grid: tuple[int, int], wanted: int, unwanted: int) -> Tensor:
    """Rotations [2, N + S + M, D / 2]: both prompts begin at the same place."""
    tokens = grid[0] * grid[1]
    positions = joint_positions(*grid, max(wanted, unwanted), torch.device("cpu"))
    table = rotary_table(positions, config.axes_dims_rope, config.rope_theta)
    return torch.cat([table[:, : tokens + wanted], table[:, tokens : tokens + unwanted]], 1)


def shared_by(layer: JointAttention, chosen: BlockKernels, rotary: Tensor, prompts: TwoPrompts) -> Shared:
    """What a forward would share, for this layer alone."""
    return Shared(
        chosen,
        EAGER_LINEAR,
        None,
        rotary,
        None,
        lambda norm, _: norm.weight,
        form_of,
        lambda *_: None,
        bounded=(layer,),
        prompts=prompts,
    )
