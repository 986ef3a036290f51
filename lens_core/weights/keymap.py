"""Tensor names of the layouts in circulation, as tables of (pattern, replacement).

Each table turns a file's names into the module's; a name that no row matches stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import CheckpointError

Table = tuple[tuple[str, str], ...]

# What may stand before every name of a component: alone in a file, or beside others.
PREFIXES: dict[str, Table] = {
    "denoiser": ((r"^(?:model\.diffusion_model|diffusion_model|transformer|net)\.", ""),),
    "encoder": (
        (
            r"^(?:text_encoders?|cond_stage_model|conditioner\.embedders\.\d+)\."
            r"(?:gpt[_-]?oss[\w-]*\.)?(?:transformer\.)?",
            "",
        ),
    ),
    "vae": ((r"^(?:first_stage_model|vae)\.", ""),),
}
COMPONENTS = tuple(PREFIXES)
_OWNER = re.compile("|".join(f"(?P<{component}>{table[0][0]})" for component, table in PREFIXES.items()))
DENOISER: Table = PREFIXES["denoiser"]

# Hugging Face's GPT-OSS, which are the module's names too but for ``model.``; the layouts below add
# names of banks that are converted, by weights.banks.
ENCODER: Table = (*PREFIXES["encoder"], (r"^model\.", ""))
# ComfyUI's: a bank is a module of its own.
ENCODER_COMFY: Table = (*ENCODER, (r"(\.mlp\.experts\.(?:gate_up|down)_proj)\.bias$", r"\1_bias"))
# OpenAI's ``original/`` folder.
ENCODER_ORIGINAL: Table = (
    *PREFIXES["encoder"],
    (r"^embedding\.", "embed_tokens."),
    (r"^unembedding\.", "lm_head."),
    (r"^norm\.scale$", "norm.weight"),
    (r"^block\.", "layers."),
    (r"\.attn\.norm\.scale$", ".input_layernorm.weight"),
    (r"\.mlp\.norm\.scale$", ".post_attention_layernorm.weight"),
    (r"\.attn\.out\.", ".self_attn.o_proj."),
    (r"\.attn\.(qkv|sinks)", r".self_attn.\1"),
    (r"\.mlp\.gate\.", ".mlp.router."),
    (r"\.mlp\.mlp1_(?:weight\.)?", ".mlp.experts.gate_up_proj_"),
    (r"\.mlp\.mlp2_(?:weight\.)?", ".mlp.experts.down_proj_"),
)
# llama.cpp's.
ENCODER_GGUF: Table = (
    (r"^token_embd\.", "embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"^output_norm\.", "norm."),
    (r"^blk\.", "layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.post_attention_norm\.", ".post_attention_layernorm."),
    (r"\.attn_output\.", ".self_attn.o_proj."),
    (r"\.attn_sinks(?:\.weight)?$", ".self_attn.sinks"),
    (r"\.attn_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.ffn_gate_inp\.", ".mlp.router."),
    (r"\.ffn_down_exps\.bias$", ".mlp.experts.down_proj_bias"),
    (r"\.ffn_(gate|up|down)_exps\.", r".mlp.experts.\1."),
)
# Held by full GPT-OSS checkpoints, of no use to a feature extractor.
ENCODER_UNUSED = (r"^lm_head\.weight$", r"^norm\.weight$", r"^tokenizer_json$")
# All but what turns the last layer into words.
HEAD_UNUSED = (r"^(?!(?:lm_head|norm)\.weight$)",)

VAE_DIFFUSERS: Table = (*PREFIXES["vae"], (r"^", "model."))
# CompVis/BFL naming of the same autoencoder; its up blocks count from the output side.
VAE_LDM: Table = (
    *PREFIXES["vae"],
    (r"^", "model."),
    (r"\.(?:encoder\.)?quant_conv\.", ".quant_conv."),
    (r"\.(?:decoder\.)?post_quant_conv\.", ".post_quant_conv."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.down\.(\d)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    *((rf"\.up\.{3 - i}\.block\.", f".up_blocks.{i}.resnets.") for i in range(4)),
    *((rf"\.up\.{3 - i}\.upsample\.", f".up_blocks.{i}.upsamplers.0.") for i in range(4)),
)


def owner(name: str) -> str:
    """The component whose prefix stands before a stored name; "" where none does."""
    match = _OWNER.match(name)
    return (match.lastgroup or "") if match else ""


def rename(
    names: Iterable[str], table: Table, unused: Iterable[str] = (), *, file: str = "The file"
) -> dict[str, str]:
    """Module name -> file name, without the names that match ``unused`` after renaming.

    Raises CheckpointError where two names become one; it speaks of ``file``.
    """
    dropped = [re.compile(pattern) for pattern in unused]
    rows = [(re.compile(pattern), replacement) for pattern, replacement in table]
    result: dict[str, str] = {}
    for name in names:
        new = name
        for pattern, replacement in rows:
            new = pattern.sub(replacement, new, count=1)
        if any(pattern.search(new) for pattern in dropped):
            continue
        if new in result:
            raise CheckpointError(
                f"{file} holds {new} twice, as {result[new]} and as {name}. Download it again."
            )
        result[new] = name
    return result
