"""What the steps of one picture share, so that each step computes only what changes."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.block import SCORE_LIMIT, score_bound
from .block import JointAttention, run_blocks
from .modulation import Modulation, ModulationBank
from .rope import joint_positions, rotary_table
from .step_cache import RunBlocks, StepCache

if TYPE_CHECKING:
    from .graph import BlockGraphs
    from .transformer import LensDenoiser


log = logging.getLogger(__name__)


class DenoiserRun:
    """Modulation of every noise level, and rotation tables by size and text length.

    Valid while the weights stay as they are. Levels unknown before are evaluated when they come.
    """

    def __init__(
        self,
        levels: Iterable[float] = (),
        before: DenoiserRun | None = None,
        cache: StepCache | None = None,
    ) -> None:
        """``levels`` are the noise levels to come, in order; ``before`` is what ``in_ram`` gave of a run with
        the same levels and weights; without a ``cache`` every step is computed in full."""
        self.cache = cache
        self._levels = list(levels)
        # By denoiser: a guider may ask several in one run, and each GPU has its own.
        self._ram: dict[tuple[LensDenoiser, torch.dtype], ModulationBank]
        self._ram = {} if before is None else before._ram
        self._banks: dict[tuple[LensDenoiser, torch.device, torch.dtype], ModulationBank] = {}
        self._bounded: dict[LensDenoiser, frozenset[JointAttention]] = {}
        self._rotary: dict[tuple[tuple[int, int], int, torch.device], Tensor] = {}

    def modulation(self, denoiser: LensDenoiser, sigma: Tensor, dtype: torch.dtype) -> Modulation:
        """Modulation for noise levels sigma [B]."""
        name = (denoiser, sigma.device, dtype)
        if name not in self._banks:
            kept = self._ram.get((denoiser, dtype))
            self._banks[name] = ModulationBank(self._levels) if kept is None else kept.to(sigma.device)
        return self._banks[name].at(denoiser, sigma, dtype)

    def in_ram(self) -> DenoiserRun:
        """Its modulation alone, off the GPU: a later run with the same levels need not compute it again."""
        run = DenoiserRun(self._levels, self)
        run._ram = {(model, dtype): bank.to("cpu") for (model, _, dtype), bank in self._banks.items()}
        return run

    def share_modulation(self, denoiser: LensDenoiser, copy: LensDenoiser, device: torch.device) -> None:
        """What is known of ``denoiser``, for a ``copy`` with the same weights on ``device`` too: its own are
        not touched for it, and levels are rounded alike whenever its first step is."""
        here = torch.empty(0, device=device).device  # as tensors say it
        for (model, _, dtype), bank in list(self._banks.items()):
            if model is denoiser:
                self._banks[copy, here, dtype] = bank.to(here)

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

    def through(self, graphs: BlockGraphs | None, entry: Hashable, sigma: Tensor) -> RunBlocks:
        """How a forward of ``entry`` at noise level sigma [B] runs its blocks: by ``graphs`` and with the
        step cache, where there are any."""
        launch: RunBlocks = run_blocks if graphs is None else graphs.run_blocks
        return launch if self.cache is None else self.cache.through(entry, sigma, launch)

    def bounded(self, denoiser: LensDenoiser, like: Tensor) -> frozenset[JointAttention]:
        """The attention layers whose norms keep scores small enough for the kernels' own attention."""
        if denoiser not in self._bounded:
            layers = [block.attn for block in denoiser.blocks]
            weights = [denoiser.weight_of(norm, like) for layer in layers for norm in layer.norms()]
            largest = torch.stack(torch._foreach_norm(weights, float("inf"))).unflatten(0, (-1, 4)).tolist()
            dim = denoiser.config.attention_head_dim
            bounded = self._bounded[denoiser] = frozenset(
                layer
                for layer, (q, k, added_q, added_k) in zip(layers, largest, strict=True)
                if score_bound(max(q, added_q), max(k, added_k), dim) <= SCORE_LIMIT
            )
            if len(bounded) < len(layers):
                log.info(
                    "Attention of %d of %d blocks runs in PyTorch: their scores may exceed %.0f.",
                    len(layers) - len(bounded),
                    len(layers),
                    SCORE_LIMIT,
                )
        return self._bounded[denoiser]
