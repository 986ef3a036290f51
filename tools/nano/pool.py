"""Pictures that wait to be learnt from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .feed import Batch
from .models import Models
from .scenes import SIZES, Size
from .train_vae import pictures


class Pool:
    """Pictures as latents, and their captions' features, on the device and by size.

    Drawing and encoding a picture takes longer than learning from it: each is used several times, at other
    noise levels, until newer ones take its place.
    """

    def __init__(self, models: Models, feed: Iterator[Batch], room: int) -> None:
        """``room``: pictures of each size; it is filled at once."""
        self.models, self.feed, self.room = models, feed, room
        self._kept: dict[Size, list[Tensor]] = {}
        self._count = dict.fromkeys(SIZES, 0)
        while min(self._count.values()) < room:
            self.add()

    def add(self) -> None:
        """A new batch in place of the oldest of its size."""
        batch, device = next(self.feed), self.models.device
        text = self.models.features(batch.tails.to(device))
        new = (self.models.latents(pictures(batch, device)), batch.real.to(device), text)
        if batch.size not in self._kept:
            self._kept[batch.size] = [part.new_zeros(self.room, *part.shape[1:]) for part in new]
        start = self._count[batch.size] % self.room
        for kept, part in zip(self._kept[batch.size], new, strict=True):
            kept[start : start + len(part)] = part[: self.room - start]
        self._count[batch.size] += len(text)

    def draw(self, size: Size, count: int) -> list[Tensor]:
        """Latents [B, C, h, w], which tokens are real [B, S], and features [B, S, L, H], of ``count``
        pictures by chance."""
        rows = torch.randint(self.room, (count,), device=self.models.device)
        return [part[rows] for part in self._kept[size]]
