"""The next token from its logits: the likeliest, or one of the likeliest 50, the same for the same seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SettingError


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy; the others are the reference's (top_k 50 is transformers' default).

    Raises SettingError where a value is out of its range.
    """

    temperature: float = 0.7
    top_k: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 2):
            raise SettingError(f"temperature must be from 0 (greedy) to 2, got {self.temperature}.")
        if self.top_k < 1:
            raise SettingError(f"top_k must be at least 1, got {self.top_k}.")
        if not 0 <= self.seed < 2**64:
            raise SettingError(f"seed must be from 0 to 2**64 - 1, got {self.seed}.")


class Sampler:
    """Draws tokens below ``vocabulary``; one seed gives one sequence on one kind of device."""

    def __init__(self, sampling: Sampling, device: torch.device, vocabulary: int) -> None:
        self.sampling, self.vocabulary = sampling, vocabulary
        self.generator = torch.Generator(device).manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """Logits fp32 [V] -> a token; waits for the device."""
        logits = logits[: self.vocabulary]
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        logits = logits / self.sampling.temperature
        last = logits.topk(min(self.sampling.top_k, len(logits))).values[-1]
        chances = logits.masked_fill(logits < last, -math.inf).softmax(-1)
        # Over the whole vocabulary, as transformers draws: the same seed gives its tokens.
        return int(torch.multinomial(chances, 1, generator=self.generator))
