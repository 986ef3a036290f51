"""Several GPUs that learn together: each by itself, their weights averaged every so many steps (local SGD).

``torchrun --standalone --nproc-per-node 4 -m tools.nano.train ...`` starts a process for each GPU. Steps are
recorded as CUDA graphs and take milliseconds, so gradients stay at home; what is averaged goes over the CPU,
because NCCL's own thread would disturb a recording.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .training import Masters

# Steps between two averages: about a second.
EVERY = 100


class Team:
    """This process among those that torchrun started; alone where it did not."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if self.size > 1:
            dist.init_process_group("gloo")

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """One for each process."""
        return seed + 1000 * self.rank

    def goes_on(self, step: int, over: Callable[[], bool], masters: Masters) -> bool:
        """Whether step ``step`` is to be done: until ``over``. In a team the first process decides that,
        whenever all have averaged their ``masters``."""
        if self.size == 1:
            return not over()
        if step % EVERY:
            return True
        self._average([*masters.values, *masters.average])
        masters.show(masters.values)
        decided = torch.tensor(float(over()))
        dist.broadcast(decided, src=0)
        return not decided.item()

    def _average(self, values: Sequence[Tensor]) -> None:
        joined = torch.cat([value.flatten() for value in values]).cpu()
        dist.all_reduce(joined)
        joined = (joined / self.size).to(values[0].device)
        for value, part in zip(values, joined.split([value.numel() for value in values]), strict=True):
            value.copy_(part.view_as(value))
