"""A GPT-OSS file as text features: opened at once, read when first needed, placed, and remembered.

Joins what the encoder's parts do not know of each other: the file, the layers' places, the prefix kept in
memory and the features kept on disk. A prompt seen before costs neither reading nor a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from .config import CAPTURED_LAYERS, EncoderConfig
from .encoder import GptOssEncoder, GptOssLayer, PackedExperts, PrefixCache, encode_prompts
from .encoder_file import EncoderFile
from .feature_cache import FeatureCache, feature_key
from .memory import LayerStore
from .memory.flat import Layout, assign
from .memory.layers import OnLayer
from .ops import CastingOperations
from .weights.loader import OnTensor


class TextEncoder:
    """Features of prompts' token ids, from ``file``.

    ``dtype`` is what layers compute in; weights stay in bf16 and 4 bits. ``dense`` dequantises the
    experts once on their way to the GPU: four times the memory. ``features`` keeps results on disk.
    """

    def __init__(
        self,
        file: EncoderFile,
        dtype: torch.dtype,
        *,
        dense: bool = False,
        features: FeatureCache | None = None,
    ) -> None:
        self.file, self.dtype, self.dense, self.cache = file, dtype, dense, features
        config = file.config
        self.model = GptOssEncoder(config, CastingOperations, torch.bfloat16, device="meta").eval()
        self.prefix = PrefixCache()
        self.layers = LayerStore(
            list(self.model.layers),
            partial(_empty_layer, config),
            partial(_dequantised, dtype) if dense else None,
            _dense_size(config, dtype) if dense else None,
        )
        self.is_read = False
        # Bytes on the GPU beside the layers, for as long as somebody else computes with them.
        self.beside = 0

    @property
    def total(self) -> int:
        """Bytes on the GPU with every layer resident; the embedding is never there."""
        return self.layers.total

    def read(self, on_tensor: OnTensor | None = None, device: torch.device | str = "cpu") -> None:
        """Read the file's tensors if that has not been done; most of them are only mapped. Experts that a
        file holds in 16 bits are packed on ``device``."""
        if not self.is_read:
            self.file.load(self.model, torch.bfloat16, on_tensor, device=device)
            self.is_read = True

    def load(self, device: torch.device, budget: float, on_layer: OnLayer | None = None) -> int:
        """Make as many layers resident on a GPU as ``budget`` bytes hold; returns bytes added."""
        self.read(device=device)
        return self.layers.load(device, budget, on_layer)

    def unload(self, enough: float = float("inf")) -> int:
        """Let layers go until ``enough`` bytes are free, all by default; returns bytes freed."""
        freed = self.layers.unload(enough)
        if not self.layers.loaded:
            self.prefix.evict()
        return freed

    def known(self, ids: Sequence[int]) -> Tensor | None:
        """Features [1, S, L, H] of a chat's ids if they are on disk."""
        return None if self.cache is None else self.cache.get(self._key(ids))

    @torch.inference_mode()
    def encode(
        self, prompts: Sequence[Sequence[int]], device: torch.device, on_layer: OnLayer | None = None
    ) -> list[Tensor]:
        """Features [1, S, L, H] of whole chats' ids, packed into one run; all begin with one prefix.

        Runs where the layers lie: resident ones at once, the others streamed.
        """
        parts = [self.file.tokenizer.split(ids) for ids in prompts]
        if len({prefix for prefix, _ in parts}) != 1:
            raise ValueError("prompts encoded together must be one or more, with the same prefix (date)")
        self.read(device=device)
        results = encode_prompts(
            self.model,
            parts[0][0],
            [tail for _, tail in parts],
            device,
            self.dtype,
            cache=self.prefix,
            layers=self.layers,
            on_layer=on_layer,
        )
        if self.cache is not None:
            for ids, features in zip(prompts, results, strict=True):
                self.cache.put(self._key(ids), features)
        return results

    def _key(self, ids: Sequence[int]) -> str:
        precision = f"{self.file.config.expert_format} {self.dtype} {'dense' if self.dense else 'packed'}"
        return feature_key(self.file.identity, precision, ids, CAPTURED_LAYERS)


def layer_sizes(config: EncoderConfig, dtype: torch.dtype, dense: bool) -> tuple[int, ...]:
    """Bytes of each layer on a GPU, as a TextEncoder of the same settings has them."""
    size = _dense_size(config, dtype) if dense else Layout.of(_empty_layer(config)).size
    return (size,) * config.num_hidden_layers


# Functions of what they need, not methods: the layer store keeps them, and must not keep the encoder.
def _empty_layer(config: EncoderConfig) -> GptOssLayer:
    return GptOssLayer(config, CastingOperations, dtype=torch.bfloat16, device="meta")


def _dense_size(config: EncoderConfig, dtype: torch.dtype) -> int:
    """Bytes of a layer with dequantised experts."""
    layer = _empty_layer(config)
    packed = sum(buffer.nbytes for buffer in layer.mlp.experts.buffers())
    weights = 3 * config.num_local_experts * config.hidden_size * config.intermediate_size
    return Layout.of(layer).size - packed + weights * dtype.itemsize


def _dequantised(dtype: torch.dtype, layer: nn.Module) -> nn.Module:
    """A resident layer with dense experts, none of its tensors in the packed layer's memory."""
    layer = cast(GptOssLayer, layer)
    layer.mlp.experts = cast(PackedExperts, layer.mlp.experts).dense(dtype)
    weights = ("experts.gate_up_proj", "experts.down_proj")
    tensors = layer.state_dict()
    return assign(layer, {k: v if k.endswith(weights) else v.clone() for k, v in tensors.items()})
