"""GPT-OSS for training: the same function as ``lens_core.encoder``, of padded batches and with gradients.

Each kind of weight is one tensor over all layers, and all experts run for every token (the unchosen with
weight zero): a few large operations where 24 tiny layers would be thousands. The experts pass through MXFP4
as they are used, so what is trained is what the exported file holds. ``state`` names the weights as Hugging
Face does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens_core.config import CAPTURED_LAYERS, EncoderConfig
from lens_core.encoder.attention import yarn_table
from lens_core.kernels.eager import clamped_swiglu, rotate_halves
from lens_core.kernels.plan import causal_mask
from lens_core.quant import mxfp4

# A layer's tensors that are stored as they are held here.
_PLAIN = {
    "input_norm": "input_layernorm.weight",
    "post_norm": "post_attention_layernorm.weight",
    "out": "self_attn.o_proj.weight",
    "out_bias": "self_attn.o_proj.bias",
    "sinks": "self_attn.sinks",
    "router": "mlp.router.weight",
    "router_bias": "mlp.router.bias",
    "gate_up": "mlp.experts.gate_up_proj",
    "gate_up_bias": "mlp.experts.gate_up_proj_bias",
    "down": "mlp.experts.down_proj",
    "down_bias": "mlp.experts.down_proj_bias",
}


class TrainedEncoder(nn.Module):
    """Weights fp32, computed in bf16 around an fp32 residual stream."""

    def __init__(self, config: EncoderConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        layers, hidden, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        heads, dim, experts = config.num_attention_heads, config.head_dim, config.num_local_experts
        self._rows = [heads * dim, config.num_key_value_heads * dim, config.num_key_value_heads * dim]
        update = 1 / math.sqrt(2 * layers)

        def matrix(*shape: int, gain: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(layers, *shape) * gain / math.sqrt(shape[-1]))

        def constant(*shape: int, value: float = 0.0) -> nn.Parameter:
            return nn.Parameter(torch.full((layers, *shape), value))

        self.embed = nn.Parameter(torch.randn(config.vocab_size, hidden))
        self.input_norm, self.post_norm = (constant(hidden, value=1.0) for _ in range(2))
        self.qkv, self.qkv_bias = matrix(sum(self._rows), hidden), constant(sum(self._rows))
        self.out, self.out_bias = matrix(hidden, heads * dim, gain=update), constant(hidden)
        self.sinks = constant(heads)
        self.router, self.router_bias = matrix(experts, hidden), constant(experts)
        self.gate_up, self.gate_up_bias = matrix(experts, 2 * inner, hidden), constant(experts, 2 * inner)
        self.down, self.down_bias = matrix(experts, hidden, inner, gain=update), constant(experts, hidden)
        self.norm = nn.Parameter(torch.ones(hidden))
        self.lm_head = nn.Parameter(torch.randn(config.vocab_size, hidden) / math.sqrt(hidden))

    def forward(self, prefix: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of the common prefix [P] and of what follows it, padded at the end, [B, S] -> features
        [B, S, L, H] and the next tokens' logits [B, S, V], both in the computing dtype."""
        config, length, (batch, width) = self.config, len(prefix), tails.shape
        x = F.embedding(torch.cat([prefix, tails.flatten()]), self.embed)
        rotary = yarn_table(config, torch.arange(length + width, device=x.device))
        rotary = torch.cat([rotary[:, :length], rotary[:, length:].repeat(1, batch, 1)], dim=1)
        masks = {
            window: (
                causal_mask(length, length, window, x.device),
                causal_mask(width, length + width, window, x.device),
            )
            for window in (None, config.sliding_window)
        }
        run = _compiled() if x.is_cuda else _layer
        features = []
        for index, weights in enumerate(self._weights()):
            window = config.sliding_window if config.is_sliding(index) else None
            x = run(x, weights, rotary, masks[window], config)
            if index in CAPTURED_LAYERS:
                features.append(x[length:].to(self.dtype).view(batch, width, -1))
        final = _norm(x[length:], self.norm, config, self.dtype).view(batch, width, -1)
        return torch.stack(features, dim=2), F.linear(final, self.lm_head.to(self.dtype))

    def state(self) -> dict[str, Tensor]:
        """Under Hugging Face's names, experts dense."""
        state = {
            "model.embed_tokens.weight": self.embed,
            "model.norm.weight": self.norm,
            "lm_head.weight": self.lm_head,
        }
        for layer in range(self.config.num_hidden_layers):
            for name, key in _PLAIN.items():
                state[f"model.layers.{layer}.{key}"] = getattr(self, name)[layer]
            parts = (tensor[layer].split(self._rows) for tensor in (self.qkv, self.qkv_bias))
            for letter, weight, bias in zip("qkv", *parts, strict=True):
                state[f"model.layers.{layer}.self_attn.{letter}_proj.weight"] = weight
                state[f"model.layers.{layer}.self_attn.{letter}_proj.bias"] = bias
        return {name: tensor.detach() for name, tensor in state.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """What ``state`` gave, of any floating dtype."""
        for name, mine in self.state().items():
            mine.copy_(state[name])

    def _weights(self) -> list[dict[str, Tensor]]:
        """Each layer's, as it computes with them; unbound at once, or every layer's gradient were as large
        as all layers'."""
        weights = {name: getattr(self, name) for name in ("input_norm", "post_norm", "router", "router_bias")}
        for name in ("qkv", "qkv_bias", "out", "out_bias", "sinks", "gate_up_bias", "down_bias"):
            weights[name] = getattr(self, name).to(self.dtype)
        weights |= {name: self._rounded(getattr(self, name)) for name in ("gate_up", "down")}
        layers = zip(*(tensor.unbind() for tensor in weights.values()), strict=True)
        return [dict(zip(weights, layer, strict=True)) for layer in layers]

    def _rounded(self, weight: Tensor) -> Tensor:
        """Through MXFP4 and back; gradients pass as if nothing was rounded."""
        with torch.no_grad():
            stored = mxfp4.dequantize(*mxfp4.quantize(weight), torch.float32)
        return (weight + (stored - weight).detach()).to(self.dtype)


@cache
def _compiled() -> Callable[..., Tensor]:
    """A layer's many small operations, fused; all layers are alike, so it is compiled once."""
    return torch.compile(_layer, fullgraph=True)


def _layer(
    x: Tensor, w: dict[str, Tensor], rotary: Tensor, masks: tuple[Tensor, Tensor], config: EncoderConfig
) -> Tensor:
    """Residual stream x fp32 [P + B S, H] -> the same after this layer."""
    dtype = w["qkv"].dtype
    y = _attention(_norm(x, w["input_norm"], config, dtype), w, rotary, masks, config)
    x = x + F.linear(y, w["out"], w["out_bias"])
    return x + _experts(_norm(x, w["post_norm"], config, dtype), w, config)


def _norm(x: Tensor, weight: Tensor, config: EncoderConfig, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, config.rms_norm_eps).to(dtype)


def _attention(
    y: Tensor, w: dict[str, Tensor], rotary: Tensor, masks: tuple[Tensor, Tensor], config: EncoderConfig
) -> Tensor:
    """y [P + B S, H] -> [P + B S, heads D]: the prefix by itself, every tail after it."""
    length, width = len(masks[0]), len(masks[1])
    batch, dim = (len(y) - length) // width, config.head_dim
    rows = [config.num_attention_heads * dim, *[config.num_key_value_heads * dim] * 2]
    q, k, v = (
        part.unflatten(-1, (-1, dim)) for part in F.linear(y, w["qkv"], w["qkv_bias"]).split(rows, dim=-1)
    )
    q, k = rotate_halves(q, rotary), rotate_halves(k, rotary)
    before = [x[:length].unsqueeze(0) for x in (q, k, v)]
    tails = [x[length:].unflatten(0, (batch, width)) for x in (q, k, v)]
    keys, values = (
        torch.cat([first.expand(batch, -1, -1, -1), own], dim=1)
        for first, own in zip(before[1:], tails[1:], strict=True)
    )
    first = _sink_attention(before[0], before[1], before[2], masks[0], w["sinks"])
    others = _sink_attention(tails[0], keys, values, masks[1], w["sinks"])
    return torch.cat([first.flatten(0, 1), others.flatten(0, 1)])


def _experts(y: Tensor, w: dict[str, Tensor], config: EncoderConfig) -> Tensor:
    """y [T, H] -> [T, H]: every expert runs, those not chosen count nothing."""
    logits = F.linear(y.float(), w["router"], w["router_bias"])
    values, chosen = logits.topk(config.num_experts_per_tok, dim=-1)
    routing = torch.zeros_like(logits).scatter(-1, chosen, values.softmax(-1)).to(y.dtype)
    gate_up = F.linear(y, w["gate_up"].flatten(0, 1), w["gate_up_bias"].flatten())
    gate_up = gate_up.unflatten(-1, (config.num_local_experts, -1))
    hidden = clamped_swiglu(gate_up, config.swiglu_alpha, config.swiglu_limit)
    weighted = (hidden * routing.unsqueeze(-1)).flatten(1)
    return F.linear(weighted, w["down"].transpose(0, 1).flatten(1)) + routing @ w["down_bias"]


def _sink_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, sinks: Tensor) -> Tensor:
    """q [B, n, heads, D], k and v [B, m, kv heads, D], keep [n, m] -> [B, n, heads D]."""
    batch, length, heads, dim = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2) for x in (k, v))
    scores = (q.transpose(1, 2) @ k.transpose(2, 3)).float() / math.sqrt(dim)
    scores = scores.masked_fill(~keep, -math.inf)
    sink = sinks.float().view(1, heads, 1, 1).expand(batch, heads, length, 1)
    shares = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    return (shares.to(v.dtype) @ v).transpose(1, 2).flatten(2)
