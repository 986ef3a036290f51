"""A sampling run in words: the step, the seconds that are left, and at its end what it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...lens_core.config import PIXELS_PER_TOKEN
from .progress import tell

Callback = Callable[[int, Tensor, Tensor, int], Any]


class Steps:
    """One run's clock and the most memory seen in use. Asking the GPU for that makes it wait for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak, self.taken = device, 0, 0
        self.began = self.first = time.monotonic()

    def told(self, callback: Callback | None) -> Callback:
        """A sampling callback that tells each step as well."""

        def tell_step(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
            if callback is not None:
                callback(step, denoised, x, total)
            tell(self.line(step + 1, total))

        return tell_step

    def line(self, done: int, total: int) -> str:
        """After a step. The first one's time has the loading in it, and says nothing about the others."""
        now = time.monotonic()
        self._look()
        self.taken = done
        if done <= 1:
            self.first = now
        if done <= 1 or done >= total:
            return f"Step {done}/{total}"
        left = (now - self.first) / (done - 1) * (total - done)
        return f"Step {done}/{total}, {left:.0f} s left"

    def summary(self, samples: Tensor) -> str:
        """Of the whole run, for its latents [B, C, h, w]."""
        self._look()
        height, width = (PIXELS_PER_TOKEN * size for size in samples.shape[-2:])
        pictures = f"{len(samples)} x " if len(samples) > 1 else ""
        steps = f"{self.taken} step{'s' if self.taken != 1 else ''}"
        peak = f", {self.peak / 1e9:.1f} GB peak" if self.peak else ""
        return f"{pictures}{width}x{height}, {steps}, {time.monotonic() - self.began:.1f} s{peak}"

    def _look(self) -> None:
        """After a step PyTorch still holds what the step took, so that this sees it."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            self.peak = max(self.peak, total - free)
