"""Every layout that GPT-OSS is published in, as one table: names, parts that need more than a rename.

A layout is recognised by ``kind``; sizes come from shapes under the renamed names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import EncoderConfig
from ..errors import CheckpointError
from ..quant.mxfp4 import BLOCK
from .banks import DENSE, ExpertQuantizer, Shape3, dense_bank, gguf_banks, is_mxfp4, nvfp4_bank
from .detect import count, shape_reader
from .keymap import (
    ENCODER,
    ENCODER_COMFY,
    ENCODER_GGUF,
    ENCODER_ORIGINAL,
    Table,
    rename,
)
from .kind import require
from .loader import AnyCheckpoint, Part, Source, Stored

_LONGEST_ENTRY = 2**16  # bytes of a comfy_quant tensor
Banks = Callable[[str, EncoderConfig, ExpertQuantizer], "list[Part]"]


@dataclass(frozen=True)
class EncoderLayout:
    """Names of a layout (``table``), and the parts of a layer's banks from their common prefix.

    ``fused`` layouts hold q, k and v in one tensor. ``expert_format`` is the one that the banks are
    loaded as.
    """

    table: Table
    banks: Banks
    fused: bool = False
    expert_format: str = "mxfp4"


def _shapes(config: EncoderConfig) -> dict[str, Shape3]:
    """[E, N, K] of the two banks of a layer."""
    experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
    return {"gate_up_proj": (experts, 2 * inner, hidden), "down_proj": (experts, hidden, inner)}


def _as_stored(prefix: str, config: EncoderConfig, quantize: ExpertQuantizer) -> list[Part]:
    return []


def _dense(transposed: bool) -> Banks:
    def banks(prefix: str, config: EncoderConfig, quantize: ExpertQuantizer) -> list[Part]:
        return [
            dense_bank(f"{prefix}.{name}", shape, quantize, transposed=transposed)
            for name, shape in _shapes(config).items()
        ]

    return banks


def _nvfp4(prefix: str, config: EncoderConfig, quantize: ExpertQuantizer) -> list[Part]:
    exact = config.expert_format == "mxfp4"
    return [nvfp4_bank(f"{prefix}.{name}", shape, exact=exact) for name, shape in _shapes(config).items()]


def _gguf(prefix: str, config: EncoderConfig, quantize: ExpertQuantizer) -> list[Part]:
    sizes = (config.hidden_size, config.intermediate_size, config.num_local_experts)
    return gguf_banks(prefix, *sizes, quantize)


# By what ``kind.describe`` calls the file.
LAYOUTS: dict[str, EncoderLayout] = {
    "a GPT-OSS encoder in MXFP4": EncoderLayout(ENCODER, _as_stored),
    "a GPT-OSS encoder in OpenAI's own layout": EncoderLayout(ENCODER_ORIGINAL, _as_stored, fused=True),
    "a GPT-OSS encoder quantised for ComfyUI": EncoderLayout(ENCODER_COMFY, _nvfp4, expert_format="nvfp4"),
    "a GPT-OSS encoder in bf16": EncoderLayout(ENCODER, _dense(transposed=True)),
    "a GPT-OSS encoder in bf16 for ComfyUI": EncoderLayout(ENCODER_COMFY, _dense(transposed=False)),
    "a GPT-OSS encoder in GGUF": EncoderLayout(ENCODER_GGUF, _gguf),
}


def encoder_layout(checkpoint: AnyCheckpoint) -> EncoderLayout:
    """The layout of a GPT-OSS checkpoint; raises CheckpointError where it is something else, or holds
    its experts in a format that is not read."""
    layout = LAYOUTS[require(checkpoint, "encoder")]
    _check_comfy_formats(checkpoint)
    _check_gguf_types(checkpoint)
    return layout


def encoder_config(checkpoint: AnyCheckpoint, layout: EncoderLayout) -> EncoderConfig:
    """Sizes of a GPT-OSS encoder, from its header; ``expert_format`` is the layout's."""
    source = rename(checkpoint.header, layout.table, file=checkpoint.name)
    shape = shape_reader(checkpoint, source)
    vocabulary, hidden = shape("embed_tokens.weight", 2)
    experts, inner = shape("layers.0.mlp.experts.down_proj_bias", 2)[0], _inner(source, shape)
    heads = shape("layers.0.self_attn.sinks", 1)[0]
    head_dim = max(1, shape("layers.0.self_attn.o_proj.weight", 2)[1] // heads)
    if layout.fused:
        key_rows = (shape("layers.0.self_attn.qkv.weight", 2)[0] - heads * head_dim) // 2
    else:
        key_rows = shape("layers.0.self_attn.k_proj.weight", 2)[0]
    if hidden % BLOCK or inner % BLOCK:
        raise CheckpointError(
            f"{checkpoint.name} has experts of {hidden} by {inner} numbers; expected multiples of {BLOCK}, "
            "the size of an MXFP4 block. Choose a GPT-OSS file."
        )
    return EncoderConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=count(source, r"^layers\.(\d+)\."),
        num_attention_heads=heads,
        num_key_value_heads=max(1, key_rows // head_dim),
        head_dim=head_dim,
        num_local_experts=experts,
        expert_format=layout.expert_format,
    )


def encoder_parts(
    layout: EncoderLayout, config: EncoderConfig, quantize: ExpertQuantizer | None = None
) -> list[Part]:
    """The parts of every layer that need more than a rename."""
    quantize = ExpertQuantizer() if quantize is None else quantize
    parts = []
    for layer in range(config.num_hidden_layers):
        parts += layout.banks(f"layers.{layer}.mlp.experts", config, quantize)
        if layout.fused:
            parts += [_split_qkv(f"layers.{layer}.self_attn", config, kind) for kind in ("weight", "bias")]
    return parts


def settled(checkpoint: AnyCheckpoint, layout: EncoderLayout, config: EncoderConfig) -> EncoderConfig:
    """The config with the format that the banks are loaded as: nvfp4 banks that are MXFP4 in another
    dress become that, all or none. Reads every scale of an nvfp4 file (1.2 GB of GPT-OSS-20B)."""
    if layout.expert_format != "nvfp4":
        return config
    header = {new: checkpoint.header[old] for new, old in rename(checkpoint.header, layout.table).items()}
    exact = all(
        is_mxfp4(header[f"{bank}.weight_scale"], header[f"{bank}.weight_scale_2"], shape)
        for layer in range(config.num_hidden_layers)
        for name, shape in _shapes(config).items()
        for bank in [f"layers.{layer}.mlp.experts.{name}"]
    )
    return replace(config, expert_format="mxfp4") if exact else config


def _inner(source: dict[str, str], shape: Callable[[str, int], tuple[int, ...]]) -> int:
    """The experts' inner width, from a bias that every layout has in one of two forms."""
    gate = "layers.0.mlp.experts.gate.bias"
    if gate in source:
        return shape(gate, 2)[1]
    return shape("layers.0.mlp.experts.gate_up_proj_bias", 2)[1] // 2


def _split_qkv(prefix: str, config: EncoderConfig, kind: str) -> Part:
    """Rows of q, k and v of one tensor; the module gets views of it."""
    head, keys = config.head_dim, config.num_key_value_heads
    sizes = [config.num_attention_heads * head, keys * head, keys * head]
    shape = (sum(sizes), config.hidden_size) if kind == "weight" else (sum(sizes),)

    def make(sources: Sequence[Source], dtype: torch.dtype | None) -> Sequence[Tensor]:
        return sources[0].read(dtype).split(sizes)

    targets = tuple(f"{prefix}.{name}_proj.{kind}" for name in "qkv")
    return Part((Stored(f"{prefix}.qkv.{kind}", (shape,)),), targets, make)


def _check_comfy_formats(checkpoint: AnyCheckpoint) -> None:
    for name, info in checkpoint.header.items():
        if name.endswith(".comfy_quant"):
            try:
                found = json.loads(info.bytes().flatten()[:_LONGEST_ENTRY].numpy().tobytes())["format"]
            except (ValueError, KeyError, TypeError, RecursionError):
                found = "something unreadable"
            if found != "nvfp4" or ".mlp.experts." not in name:
                raise CheckpointError(
                    f"{checkpoint.name} holds {name.removesuffix('.comfy_quant')} as {found}; expected "
                    "experts as nvfp4 and the rest in bf16. Choose ComfyUI's nvfp4 file, or GPT-OSS-20B in "
                    "MXFP4 as OpenAI publishes it."
                )


def _check_gguf_types(checkpoint: AnyCheckpoint) -> None:
    for name, info in checkpoint.header.items():
        if "_exps.weight" in name and info.dtype not in ("MXFP4", *DENSE):
            raise CheckpointError(
                f"{checkpoint.name} holds its experts as {info.dtype} ({name}); expected MXFP4, which they "
                "were trained in, or F16, BF16 or F32: turning one 4-bit format into another would lose "
                "quality. Choose a GGUF of GPT-OSS-20B with MXFP4 experts."
            )
