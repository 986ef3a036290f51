"""GPT-OSS for training: the same function as ``lens_core.encoder``, of padded batches and with gradients.

Each kind of weight is one tensor over all layers, and all experts run for every token (the unchosen with
weight zero): a few large operations where 24 tiny layers would be thousands. The experts pass through MXFP4
as they are used, so what is trained is what the exported file holds. ``state`` names the weights as Hugging
Face does.
"""

from __future__ import annotations

import math

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
        length, (batch, width) = len(prefix), tails.shape
        x = F.embedding(torch.cat([prefix, tails.flatten()]), self.embed)
        positions = torch.arange(length + width, device=x.device)
        rotary = yarn_table(self.config, positions)
        own = torch.cat([rotary[:, :length], rotary[:, length:].repeat(1, batch, 1)], dim=1)
        weights = self._weights()
        features = []
        for layer in range(self.config.num_hidden_layers):
            window = self.config.sliding_window if self.config.is_sliding(layer) else None
            masks = [
                causal_mask(count, keys, window, x.device)
                for count, keys in ((length, length), (width, length + width))
            ]
            w = {name: tensor[layer] for name, tensor in weights.items()}
            y = self._norm(x, self.input_norm[layer])
            x = x + F.linear(self._attention(y, w, own, masks, batch), w["out"], w["out_bias"])
            x = x + self._experts(self._norm(x, self.post_norm[layer]), layer, w)
            if layer in CAPTURED_LAYERS:
                features.append(x[length:].to(self.dtype).view(batch, width, -1))
        final = self._norm(x[length:], self.norm).view(batch, width, -1)
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

    def _weights(self) -> dict[str, Tensor]:
        names = ("qkv", "qkv_bias", "out", "out_bias", "sinks", "gate_up_bias", "down_bias")
        weights = {name: getattr(self, name).to(self.dtype) for name in names}
        return weights | {name: self._rounded(getattr(self, name)) for name in ("gate_up", "down")}

    def _rounded(self, weight: Tensor) -> Tensor:
        """Through MXFP4 and back; gradients pass as if nothing was rounded."""
        with torch.no_grad():
            stored = mxfp4.dequantize(*mxfp4.quantize(weight), torch.float32)
        return (weight + (stored - weight).detach()).to(self.dtype)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.config.rms_norm_eps).to(self.dtype)

    def _attention(
        self, y: Tensor, w: dict[str, Tensor], rotary: Tensor, masks: list[Tensor], batch: int
    ) -> Tensor:
        """y [P + B S, H] -> [P + B S, heads D]: the prefix by itself, every tail after it."""
        dim, length = self.config.head_dim, len(masks[0])
        q, k, v = (
            part.unflatten(-1, (-1, dim))
            for part in F.linear(y, w["qkv"], w["qkv_bias"]).split(self._rows, dim=-1)
        )
        q, k = rotate_halves(q, rotary), rotate_halves(k, rotary)
        before = [x[:length].unsqueeze(0) for x in (q, k, v)]
        tails = [x[length:].unflatten(0, (batch, -1)) for x in (q, k, v)]
        keys, values = (
            torch.cat([first.expand(batch, -1, -1, -1), own], dim=1)
            for first, own in zip(before[1:], tails[1:], strict=True)
        )
        first = _sink_attention(before[0], before[1], before[2], masks[0], w["sinks"])
        others = _sink_attention(tails[0], keys, values, masks[1], w["sinks"])
        return torch.cat([first.flatten(0, 1), others.flatten(0, 1)])

    def _experts(self, y: Tensor, layer: int, w: dict[str, Tensor]) -> Tensor:
        config = self.config
        logits = F.linear(y.float(), self.router[layer], self.router_bias[layer])
        values, chosen = logits.topk(config.num_experts_per_tok, dim=-1)
        routing = torch.zeros_like(logits).scatter(-1, chosen, values.softmax(-1)).to(y.dtype)
        gate_up = F.linear(y, w["gate_up"].flatten(0, 1), w["gate_up_bias"].flatten())
        hidden = clamped_swiglu(
            gate_up.unflatten(-1, (config.num_local_experts, -1)), config.swiglu_alpha, config.swiglu_limit
        )
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
