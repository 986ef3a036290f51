"""A prompt's text features: encode the chat text, keep what follows the constant prefix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gpt_oss import GptOssEncoder, OnLayer


def encode_prompt(
    encoder: GptOssEncoder,
    ids: Sequence[int],
    prefix_length: int,
    device: torch.device | str,
    dtype: torch.dtype,
    on_layer: OnLayer | None = None,
) -> Tensor:
    """Features [1, S, L, H] of one prompt's chat text: its own tokens and the suffix's."""
    features = encoder(torch.tensor([ids], device=device), dtype, on_layer=on_layer)
    return features[:, prefix_length:]


def no_features(encoder: GptOssEncoder, captured: int, dtype: torch.dtype) -> Tensor:
    """Features [1, 0, L, H] of an empty negative prompt: no text tokens, and no encoder run."""
    return torch.zeros(1, 0, captured, encoder.config.hidden_size, dtype=dtype)
