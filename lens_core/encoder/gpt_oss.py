"""GPT-OSS as a feature extractor: token ids in, residual streams of four layers out.

Parameter names are the Hugging Face checkpoint's without ``model.``. Nothing after the last
captured layer runs, so neither the final norm nor the language-model head is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import CAPTURED_LAYERS, EncoderConfig
from ..ops import Operations
from .attention import SinkAttention, yarn_table
from .moe import MixtureOfExperts

OnLayer = Callable[[int, int], None]


class GptOssLayer(nn.Module):
    """Norm, attention, norm, experts, each around a residual."""

    def __init__(self, config: EncoderConfig, layer: int, operations: Operations, **place: Any) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = operations.RMSNorm(hidden, eps=eps, **place)
        self.self_attn = SinkAttention(config, layer, operations, **place)
        self.post_attention_layernorm = operations.RMSNorm(hidden, eps=eps, **place)
        self.mlp = MixtureOfExperts(config, operations, **place)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class GptOssEncoder(nn.Module):
    """The first layers of GPT-OSS, up to the last captured one."""

    def __init__(
        self,
        config: EncoderConfig,
        operations: Operations = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        self.embed_tokens = operations.Embedding(config.vocab_size, config.hidden_size, **place)
        self.layers = nn.ModuleList(
            GptOssLayer(config, layer, operations, **place) for layer in range(config.num_hidden_layers)
        )

    def forward(
        self,
        ids: Tensor,
        dtype: torch.dtype,
        captured: Sequence[int] = CAPTURED_LAYERS,
        on_layer: OnLayer | None = None,
    ) -> Tensor:
        """Token ids [B, S] of equal length, unpadded -> features [B, S, L, H] in ``dtype``.

        ``on_layer(done, total)`` is called after each layer; it may raise to cancel.
        """
        x = self.embed_tokens(ids).to(dtype)
        rotary = yarn_table(self.config, ids.shape[1], x.device)
        last = max(captured)
        features = []
        for index, layer in enumerate(self.layers[: last + 1]):
            x = layer(x, rotary)
            if index in captured:
                features.append(x)
            if on_layer is not None:
                on_layer(index + 1, last + 1)
        return torch.stack(features, dim=2)
