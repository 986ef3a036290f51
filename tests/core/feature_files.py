"""Features and entries for the tests of the feature cache."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor

from lens_core.feature_cache import FeatureCache, feature_key

IDS = (200006, 17360, 200008, 64, 3592, 68347)
LAYERS = (5, 11, 17, 23)
KEYS = [feature_key("weights", "bf16", (number,), LAYERS) for number in range(12)]
KEY = KEYS[0]


def features(seed: int = 0, tokens: int = 7, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, 4, 24, generator=generator).to(dtype)


def entry(cache: FeatureCache, key: str = KEY) -> Path:
    return cache.folder / f"{key}.safetensors"


def names(cache: FeatureCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()}


def aged(cache: FeatureCache, key: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(entry(cache, key), (then, then))
