"""Prompts' text features: packed, after a prefix whose keys and values are computed once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import kernels
from ..config import CAPTURED_LAYERS
from ..kernels import AttentionPlan
from .attention import yarn_table
from .gpt_oss import GptOssEncoder, OnLayer
from .packing import Packing, pack


class Layers(Protocol):
    """Where the layers are: hands them out in order on a device, from wherever they lie."""

    def on(self, device: torch.device) -> Iterable[nn.Module]: ...


class PrefixCache:
    """Keys and values of the last prefix, [layers, 2, P, kv heads, D]: 4.8 MB in bf16 at full size.

    Belongs to one set of weights. Another prefix (another date), dtype or backend replaces it: they
    round differently.
    """

    def __init__(self) -> None:
        self._name: tuple | None = None
        self._values: Tensor | None = None

    def get(self, name: tuple, device: torch.device) -> Tensor | None:
        """What was put under this name, on ``device``, or None."""
        if self._values is None or self._name != name:
            return None
        self._values = self._values.to(device)
        return self._values

    def put(self, name: tuple, values: Tensor) -> None:
        """Keep ``values``; what was there goes."""
        self._name, self._values = name, values

    def evict(self) -> None:
        """Leave the GPU."""
        if self._values is not None:
            self._values = self._values.cpu()


def encode_prompts(
    encoder: GptOssEncoder,
    prefix: Sequence[int],
    tails: Sequence[Sequence[int]],
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    cache: PrefixCache | None = None,
    layers: Layers | None = None,
    captured: Sequence[int] = CAPTURED_LAYERS,
    on_layer: OnLayer | None = None,
) -> list[Tensor]:
    """Features [1, S, L, H] of each prompt: of its own tokens and the template's end, in ``tails``.

    ``prefix`` are the ids that every prompt's chat text begins with; ``layers`` says where the encoder's
    layers are if not in it.
    """
    device = torch.device(device)
    if not any(tails):
        return [no_features(encoder, len(captured), dtype).to(device) for _ in tails]
    chosen = kernels.choose(device, dtype, encoder.experts[0].bank(), encoder.largest_scale())
    name = (tuple(prefix), dtype, chosen.name, tuple(captured))
    past = None if cache is None else cache.get(name, device)

    def planned(packing: Packing) -> tuple[Packing, AttentionPlan]:
        rotary = yarn_table(encoder.config, packing.positions.to(device))
        window = encoder.config.sliding_window
        plan = AttentionPlan(packing.blocks, packing.positions, rotary, len(prefix), window, dtype)
        return packing, plan

    packing, plan = planned(pack(tails, after=len(prefix)))
    features, keys = encoder(
        packing,
        plan,
        past,
        chosen,
        layers=None if layers is None else layers.on(device),
        captured=captured,
        on_layer=on_layer,
        lead=planned(pack([prefix], after=0)) if past is None and prefix else None,
    )
    if cache is not None and past is None:
        cache.put(name, torch.stack(keys))
    return [part.unsqueeze(0) for part in packing.unpack(features)]


def no_features(encoder: GptOssEncoder, captured: int, dtype: torch.dtype) -> Tensor:
    """Features [1, 0, L, H] of an empty negative prompt: no text tokens, and no encoder run."""
    return torch.zeros(1, 0, captured, encoder.config.hidden_size, dtype=dtype)
