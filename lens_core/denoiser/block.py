"""One of the 48 blocks: joint attention and SwiGLU on an image and a text stream, each modulated by the
noise level.

Module names are the checkpoint's own (LoRA files address them): ``img_mod.1`` is the linear behind a SiLU,
``attn.to_out.0`` sits in a list. Streams come as a sequence, the image's first: without a text stream no
text layer runs. What lies between the matrix products is ``lens_core.kernels.block``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DenoiserConfig
from ..kernels import BlockKernels, Inputs, LinearKernels
from ..kernels.block import (
    ATTENTION_GATE,
    ATTENTION_SHIFT,
    MLP_GATE,
    MLP_SHIFT,
    PARTS,
    HeadNorms,
    Rows,
)
from ..kernels.linear import linears
from ..ops import Attention, Operations, fastest_attention
from ..quant.layer_format import LayerFormat
from ..quant.linear import Packed
from .nag import TwoPrompts, guide

# One block's tables [B, 6 H]: the image's and the text's.
Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shared:
    """What all blocks of one forward share.

    ``rotary`` [2, N + S, D / 2] in fp32, ``mask`` None or additive [B, 1, 1, N + S]. ``attention`` None is
    the kernels' own in the ``bounded`` layers, PyTorch's in others and under a mask. ``weight_of`` gives a
    norm's weight as its caller's operations would use it beside x, ``form_of`` how a linear is quantised, if
    it is, and ``packed_of`` its weight where it is at hand on a device. ``text_queries``: the last block too
    asks with the text's queries, though no one reads the answers (an attention override may count on them).
    ``prompts``: the text stream holds an unwanted prompt after the wanted one (see ``nag``).
    """

    kernels: BlockKernels
    linears: LinearKernels
    attention: Attention | None
    rotary: Tensor
    mask: Tensor | None
    weight_of: Callable[[Any, Tensor], Tensor]
    form_of: Callable[[nn.Module], LayerFormat | None]
    packed_of: Callable[[nn.Module, torch.device], Packed | None]
    bounded: Collection[JointAttention] = ()
    text_queries: bool = False
    prompts: TwoPrompts | None = None

    def kind(self, *layers: Any) -> str | None:
        """What the inputs of these linears, alike in size, are to be quantised to, if they agree on it."""
        form = self.form_of(layers[0])
        if form is None or form.inputs is None or form.rotation:
            return None
        others = [self.form_of(layer) for layer in layers[1:]]
        if any(other is not form and other != form for other in others):
            return None
        return self.linears.inputs_of(form, (layers[0].out_features, layers[0].in_features))

    def apply(self, layers: Sequence[Any], streams: Sequence[Inputs]) -> list[Tensor]:
        """Each stream [B, T, K] through its layer; there are fewer streams than layers without a text."""
        layers = layers[: len(streams)]
        weights = [self.packed_of(layer, streams[0].device) for layer in layers]
        packed = [weight for weight in weights if weight is not None]
        if len(packed) < len(layers):
            return [layer(x) for layer, x in zip(layers, streams, strict=True)]
        return linears(streams, packed, [layer.bias for layer in layers], self.linears)


class SwiGLU(nn.Module):
    """The linears of w2(silu(w1 x) * w3 x), without biases."""

    def __init__(self, hidden: int, inner: int, operations: Operations, **place: Any) -> None:
        super().__init__()
        self.w1 = operations.Linear(hidden, inner, bias=False, **place)
        self.w2 = operations.Linear(inner, hidden, bias=False, **place)
        self.w3 = operations.Linear(hidden, inner, bias=False, **place)


class JointAttention(nn.Module):
    """Attention over image and text tokens together, image first, with a QKV projection a stream."""

    def __init__(self, config: DenoiserConfig, operations: Operations, **place: Any) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.attention_head_dim
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (
            operations.RMSNorm(dim, eps=config.qk_norm_eps, **place) for _ in range(4)
        )
        self.img_qkv = operations.Linear(hidden, 3 * hidden, **place)
        self.txt_qkv = operations.Linear(hidden, 3 * hidden, **place)
        self.to_out = nn.ModuleList([operations.Linear(hidden, hidden, **place)])
        self.to_add_out = operations.Linear(hidden, hidden, **place)

    def norms(self) -> tuple[Any, Any, Any, Any]:
        """Of the image's queries and keys, then of the text's."""
        return self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k

    def projections(self) -> tuple[nn.Module, nn.Module]:
        """To queries, keys and values: the image's and the text's."""
        return self.img_qkv, self.txt_qkv

    def forward(self, normed: Sequence[Inputs], shared: Shared, image_only: bool) -> list[Tensor]:
        """Norms of streams [B, T, H] -> the updates; only the image's if no one will read the text's."""
        qkv = shared.apply(self.projections(), normed)
        outs = (self.to_out[0], self.to_add_out)
        if shared.prompts is None or len(qkv) == 1:
            return shared.apply(outs, self._answers(qkv, shared.rotary, shared.mask, shared, image_only))
        return shared.apply(outs, self._guided(qkv, shared.prompts, shared, image_only))

    def _guided(
        self, qkv: list[Tensor], prompts: TwoPrompts, shared: Shared, image_only: bool
    ) -> list[Tensor]:
        """``_answers`` where the text is two prompts: the image's are moved away from the unwanted."""
        img, txt = qkv
        tokens = img.shape[1]
        rotary = prompts.split(shared.rotary, tokens, 1)
        masks = (None, None) if shared.mask is None else prompts.split(shared.mask, tokens, -1)
        ours, theirs = txt.tensor_split((prompts.wanted,), 1)
        pairs = [list(streams_of(img.clone(), ours)), list(streams_of(img, theirs))]  # a copy to overwrite
        qkv.clear()
        del img, txt, ours, theirs
        wanted, unwanted = (
            self._answers(pair, turns, mask, shared, image_only)
            for pair, turns, mask in zip(pairs, rotary, masks, strict=True)
        )
        guided = guide(wanted[0], unwanted[0], prompts.options)
        rest = [*wanted[1:], *unwanted[1:]]
        return [guided, torch.cat(rest, dim=1)] if rest else [guided]

    def _answers(
        self,
        qkv: list[Tensor],
        rotary: Tensor,
        mask: Tensor | None,
        shared: Shared,
        image_only: bool,
    ) -> list[Tensor]:
        """Projections [B, T, 3 H] of each stream -> what its tokens, or the image's alone, get [B, T, H].

        They may be overwritten, and the list is emptied: their memory may be wanted for the attention.
        """
        pairs = ((self.norm_q, self.norm_k), (self.norm_added_q, self.norm_added_k))[: len(qkv)]
        norms = [HeadNorms(shared.weight_of(q, qkv[0]), shared.weight_of(k, qkv[0]), q.eps) for q, k in pairs]
        attend = shared.kernels.attend
        if attend is not None and shared.attention is None and mask is None and self in shared.bounded:
            return attend(qkv, norms, rotary, image_only)
        image, count = qkv[0].shape[1], len(qkv)
        q, k, v = shared.kernels.joint_heads(qkv, norms, rotary)
        qkv.clear()
        if image_only and not shared.text_queries:
            q = q[:, :image]
        attention = shared.attention or fastest_attention(q.device)
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return [out[:, :image], out[:, image:]][: 1 if image_only else count]


class LensBlock(nn.Module):
    """Modulated joint attention, then a modulated SwiGLU, on both streams.

    After the ``last`` block only the image is used, so its text stream ends at K and V.
    """

    def __init__(
        self, config: DenoiserConfig, operations: Operations, last: bool = False, **place: Any
    ) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.mlp_hidden_size
        self.last = last
        self.attn = JointAttention(config, operations, **place)
        self.img_mod, self.txt_mod = (
            nn.Sequential(nn.SiLU(), operations.Linear(hidden, PARTS * hidden, **place)) for _ in range(2)
        )
        self.img_norm1, self.img_norm2, self.txt_norm1, self.txt_norm2 = (
            operations.RMSNorm(hidden, eps=config.norm_eps, **place) for _ in range(4)
        )
        self.img_mlp, self.txt_mlp = (SwiGLU(hidden, inner, operations, **place) for _ in range(2))

    def tables(self, temb: Tensor) -> Tables:
        """Modulation [B, 6 H] of image and text by a time embedding [B, H]."""
        return self.img_mod(temb), self.txt_mod(temb)

    def forward(
        self, streams: Sequence[Tensor], normed: Sequence[Inputs], tables: Tables, shared: Shared
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Streams [B, T, H] and ``enter``'s norms of them -> streams, and the MLPs' updates to them.

        The updates are not added yet: that is one step with the next block's first norm.
        """
        kernels = shared.kernels
        updates = self.attn(normed, shared, self.last)
        norms = (self.img_norm2, self.txt_norm2)
        rows = _rows(norms, zip(streams, updates, tables, strict=False), tables, shared)
        mlps = (self.img_mlp, self.txt_mlp)[: len(rows)]
        gates, ups, downs = zip(*((mlp.w1, mlp.w3, mlp.w2) for mlp in mlps), strict=True)
        streams, normed = kernels.add_modulate(rows, ATTENTION_GATE, MLP_SHIFT, shared.kind(*gates, *ups))
        hidden = shared.apply(gates, normed), shared.apply(ups, normed)
        return streams, shared.apply(downs, kernels.swiglu(*hidden, shared.kind(*downs)))

    def enter(
        self,
        streams: Sequence[Tensor],
        updates: Sequence[Tensor] | None,
        before: Tables,
        after: Tables,
        shared: Shared,
    ) -> tuple[list[Tensor], list[Inputs]]:
        """Add the block before's updates, if any, by its tables; -> streams, and their first norms."""
        norms = (self.img_norm1, self.txt_norm1)
        pending = zip(streams, updates or (None, None), before, strict=False)
        rows = _rows(norms, pending, after, shared)
        kind = shared.kind(*self.attn.projections()[: len(rows)])
        return shared.kernels.add_modulate(rows, MLP_GATE, ATTENTION_SHIFT, kind)


def _rows(
    norms: Sequence[Any],
    pending: Iterable[tuple[Tensor, Tensor | None, Tensor]],
    after: Tables,
    shared: Shared,
) -> list[Rows]:
    """What ``kernels.add_modulate`` needs of each stream that goes on: x, update, table; norm, table."""
    return [
        Rows(x, update, before, shared.weight_of(norm, x), norm.eps, table)
        for norm, (x, update, before), table in zip(norms, pending, after, strict=False)
    ]


def run_blocks(
    blocks: Sequence[LensBlock], streams: Sequence[Tensor], tables: Sequence[Tables], shared: Shared
) -> list[Tensor]:
    """Streams [B, T, H] after ``blocks``, each with its tables; the image alone after the last block."""
    updates: list[Tensor] | None = None
    before = tables[0]
    for block, after in zip(blocks, tables, strict=True):
        streams, normed = block.enter(streams, updates, before, after, shared)
        streams, updates = block(streams, normed, after, shared)
        before = after
    assert updates is not None
    rows = [Rows(*row) for row in zip(streams, updates, before, strict=False)]
    return shared.kernels.add_modulate(rows, MLP_GATE, ATTENTION_SHIFT)[0]


def streams_of(img: Tensor, txt: Tensor) -> tuple[Tensor, ...]:
    """What runs through the blocks: img [B, N, H], and txt [B, S, H] unless it is empty."""
    return (img, txt) if txt.shape[1] else (img,)
