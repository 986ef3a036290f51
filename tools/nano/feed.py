"""Batches for training, made by worker processes: scenes of one picture size, and their captions' tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lens_core.prompt.tokenizer import PromptTokenizer

from .captions import caption
from .properties import properties
from .render import collate
from .scenes import SIZES, Scene, Size, sample_scene

# Tokens of a caption and the template's end, padded to this.
WIDTH = 72


@dataclass
class Batch:
    """``scenes`` as ``render`` takes them; ids and which are real, [B, WIDTH]."""

    size: Size
    scenes: dict[str, Tensor]
    tails: Tensor
    real: Tensor


def padded(tails: Sequence[Sequence[int]], width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Ids [B, width] filled up with 0, and which are real; ValueError where one does not fit."""
    ids, real = (
        torch.zeros(len(tails), width, dtype=torch.long),
        torch.zeros(len(tails), width, dtype=torch.bool),
    )
    for row, tail in enumerate(tails):
        if len(tail) > width:
            raise ValueError(f"{len(tail)} tokens where {width} fit.")
        ids[row, : len(tail)] = torch.tensor(tail)
        real[row, : len(tail)] = True
    return ids, real


class Scenes(IterableDataset):
    """Without end; each worker its own stream, all sizes in turn by chance."""

    def __init__(self, tokenizer_json: str | None, batch: int, seed: int) -> None:
        self.tokenizer_json, self.batch, self.seed = tokenizer_json, batch, seed

    def _begin(self) -> tuple[random.Random, PromptTokenizer | None]:
        """Of this worker."""
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(self.seed * 1000 + (worker.id if worker else 0))
        return rng, None if self.tokenizer_json is None else PromptTokenizer.from_json(self.tokenizer_json)

    def __iter__(self) -> Iterator[Any]:
        rng, tokenizer = self._begin()
        while True:
            size = rng.choice(SIZES)
            scenes = [sample_scene(rng, size=size) for _ in range(self.batch)]
            tails, real = torch.zeros(0), torch.zeros(0)
            if tokenizer is not None:
                texts = [self._tail(tokenizer, scene, rng) for scene in scenes]
                tails, real = padded(texts)
            yield Batch(size, collate(scenes), tails, real)

    def _tail(self, tokenizer: PromptTokenizer, scene: Scene, rng: random.Random) -> list[int]:
        while True:  # hardly any caption is too long
            ids = [*tokenizer.encode(caption(scene, rng)), *tokenizer.suffix]
            if len(ids) <= WIDTH:
                return ids


class Captions(Scenes):
    """Captions alone: ids and which are real [B, WIDTH], and what they say as classes [B, properties]."""

    def __iter__(self) -> Iterator[Any]:
        rng, tokenizer = self._begin()
        assert tokenizer is not None
        while True:
            scenes = [sample_scene(rng) for _ in range(self.batch)]
            told = torch.tensor([properties(scene) for scene in scenes])
            yield *padded([self._tail(tokenizer, scene, rng) for scene in scenes]), told


def captions(tokenizer_json: str, batch: int, workers: int, seed: int) -> Iterator[list[Tensor]]:
    """Captions without end."""
    return _loader(Captions(tokenizer_json, batch, seed), workers)


def batches(tokenizer_json: str | None, batch: int, workers: int, seed: int) -> Iterator[Batch]:
    """Batches without end."""
    return _loader(Scenes(tokenizer_json, batch, seed), workers)


def _loader(scenes: Scenes, workers: int) -> Iterator[Any]:
    options: dict[str, Any] = {"prefetch_factor": 6, "pin_memory": False} if workers else {}
    return iter(DataLoader(scenes, batch_size=None, num_workers=workers, **options))
