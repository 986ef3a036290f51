"""What the steps of one picture share, so that each step computes only what changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .modulation import Modulation, ModulationBank
from .rope import joint_positions, rotary_table
from .step_cache import StepCache

if TYPE_CHECKING:
    from .transformer import LensDenoiser


class DenoiserRun:
    """Modulation of every noise level, and rotation tables by size and text length.

    Valid while the weights stay as they are. Levels unknown before are evaluated when they come.
    """

    def __init__(self, levels: Iterable[float] = (), cache: StepCache | None = None) -> None:
        """``levels`` are the noise levels to come, in order; ``cache`` None computes every step in full."""
        self.cache = cache
        self._levels = list(levels)
        self._banks: dict[tuple[torch.device, torch.dtype], ModulationBank] = {}
        self._rotary: dict[tuple[tuple[int, int], int, torch.device], Tensor] = {}

    def modulation(self, denoiser: LensDenoiser, sigma: Tensor, dtype: torch.dtype) -> Modulation:
        """Modulation for noise levels sigma [B]."""
        bank = self._banks.setdefault((sigma.device, dtype), ModulationBank(self._levels))
        return bank.at(denoiser, sigma, dtype)

    def rotary(
        self, denoiser: LensDenoiser, grid: tuple[int, int], text_length: int, device: torch.device
    ) -> Tensor:
        """Rotation table [2, N + S, D / 2] of the joint sequence."""
        name = (grid, text_length, device)
        if name not in self._rotary:
            config = denoiser.config
            positions = joint_positions(*grid, text_length, device)
            table = rotary_table(positions, config.axes_dims_rope, config.rope_theta)
            self._rotary[name] = table.to(device)
        return self._rotary[name]
