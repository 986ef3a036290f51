"""GPT-OSS as a feature extractor: token ids in, residual streams of four layers out.

Parameter names are the Hugging Face checkpoint's without ``model.``. Nothing after the last
captured layer runs, so neither the final norm nor the language-model head is built.

The residual stream is fp32 whatever the layers compute in: it is small, and 48 roundings to bf16 would
cost the features more than all layers together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import CAPTURED_LAYERS, EncoderConfig
from ..kernels import AttentionPlan, Kernels
from ..ops import CastingOperations, Operations
from .attention import SinkAttention
from .moe import DenseExperts, MixtureOfExperts, PackedExperts
from .packing import Packing

OnLayer = Callable[[int, int], None]


class GptOssLayer(nn.Module):
    """Norm, attention, norm, experts, each around a residual. All layers have the same structure; which
    ones slide is the caller's to say, so a layer's tensors can be put into any other's place."""

    def __init__(self, config: EncoderConfig, operations: Operations, **place: Any) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = operations.RMSNorm(hidden, eps=eps, **place)
        self.self_attn = SinkAttention(config, operations, **place)
        self.post_attention_layernorm = operations.RMSNorm(hidden, eps=eps, **place)
        self.mlp = MixtureOfExperts(config, operations, **place)

    def forward(
        self,
        x: Tensor,
        pending: Tensor | None,
        plan: AttentionPlan,
        past: Tensor | None,
        sliding: bool,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Residual stream x fp32 [T, H] and what is still to be added to it [T, K, H], which happens with
        the next norm -> the same after this layer, and the prefix's keys and values."""
        norm = self.input_layernorm
        x, y = kernels.add_norm(x, pending, norm.weight, norm.eps, plan.dtype)
        update, past = self.self_attn(y, plan, past, sliding, kernels)
        norm = self.post_attention_layernorm
        x, y = kernels.add_norm(x, update.unsqueeze(1), norm.weight, norm.eps, plan.dtype)
        return x, self.mlp(y, kernels), past


class GptOssEncoder(nn.Module):
    """The first layers of GPT-OSS, up to the last captured one."""

    def __init__(
        self,
        config: EncoderConfig,
        operations: Operations = CastingOperations,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.operations = config, operations
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        self.embed_tokens = operations.Embedding(config.vocab_size, config.hidden_size, **place)
        self.layers = nn.ModuleList(
            GptOssLayer(config, operations, **place) for _ in range(config.num_hidden_layers)
        )

        self._largest_scale: int | None = None

    @property
    def experts(self) -> list[PackedExperts | DenseExperts]:
        """Every layer's experts."""
        return [cast(GptOssLayer, layer).mlp.experts for layer in self.layers]

    def largest_scale(self) -> int:
        """The largest e8m0 scale byte of all layers (0: the format has others); looked for once."""
        if self._largest_scale is None:
            self._largest_scale = max(experts.largest_scale() for experts in self.experts)
        return self._largest_scale

    def forward(
        self,
        packing: Packing,
        plan: AttentionPlan,
        past: Sequence[Tensor] | None,
        kernels: Kernels,
        layers: Iterable[nn.Module] | None = None,
        captured: Sequence[int] = CAPTURED_LAYERS,
        on_layer: OnLayer | None = None,
        lead: tuple[Packing, AttentionPlan] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """A packed batch -> features [T, L, H] in the plan's dtype, and each layer's prefix keys and values.

        ``past`` are those from an earlier run; where there was none, ``lead`` is the prefix, which takes
        every layer just before the batch does: apart from it, or the batch would round otherwise than in
        later runs. ``layers`` stand in for this module's own (the same tensors elsewhere). Rows of the
        embedding are looked up where it lies. ``on_layer(done, total)`` is called after each layer; it may
        raise to cancel.
        """
        x, first = self._embed(packing, plan), None if lead is None else self._embed(*lead)
        last = max(captured)
        pending: Tensor | None = None
        due: Tensor | None = None  # what is pending for the prefix
        features, prefix = [], []
        for index, layer in enumerate(self.layers if layers is None else layers):
            before, sliding = None if past is None else past[index], self.config.is_sliding(index)
            if lead is not None:
                first, due, before = layer(first, due, lead[1], None, sliding, kernels)
            x, pending, keys = layer(x, pending, plan, before, sliding, kernels)
            prefix.append(keys)
            if index in captured:
                x, _ = kernels.add_norm(x, pending, None, 0.0, plan.dtype)
                pending = None
                features.append(x.to(plan.dtype))
            if on_layer is not None:
                on_layer(index + 1, last + 1)
            if index == last:
                break
        return torch.stack(features, dim=1), prefix

    def _embed(self, packing: Packing, plan: AttentionPlan) -> Tensor:
        rows = self.embed_tokens(packing.ids.to(self.embed_tokens.weight.device))
        return rows.to(plan.device, torch.float32)
