from __future__ import annotations

import torch

from .linear import EAGER_LINEAR, LinearKernels


def choose_linear(device: torch.device, dtype: torch.dtype) -> LinearKernels:
    return EAGER_LINEAR
