"""Writes an encoder in every layout that it is published in, from Hugging Face's MXFP4 tensors.

Independent of the loaders: tiled scales come from comfy_kitchen, dense experts from transformers, GGUF
blocks from numpy and the gguf package's own writer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]
BANK = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.(?:gate_up|down)_proj)_blocks$")


def banks(weights: Weights) -> list[str]:
    """Names of the expert banks, without ``_blocks`` and ``_scales``."""
    return [match[1] for match in map(BANK.match, weights) if match]


def others(weights: Weights) -> Weights:
    """Everything but the packed experts."""
    return {name: tensor for name, tensor in weights.items() if not name.endswith(("_blocks", "_scales"))}


def original(weights: Weights) -> Weights:
    """OpenAI's ``original/`` layout."""
    direct = {
        "model.embed_tokens.weight": "embedding.weight",
        "lm_head.weight": "unembedding.weight",
        "model.norm.weight": "norm.scale",
    }
    in_layer = {
        "input_layernorm.weight": "attn.norm.scale",
        "post_attention_layernorm.weight": "mlp.norm.scale",
        "self_attn.o_proj.weight": "attn.out.weight",
        "self_attn.o_proj.bias": "attn.out.bias",
        "self_attn.sinks": "attn.sinks",
        "mlp.router.weight": "mlp.gate.weight",
        "mlp.router.bias": "mlp.gate.bias",
        "mlp.experts.gate_up_proj_blocks": "mlp.mlp1_weight.blocks",
        "mlp.experts.gate_up_proj_scales": "mlp.mlp1_weight.scales",
        "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
        "mlp.experts.down_proj_blocks": "mlp.mlp2_weight.blocks",
        "mlp.experts.down_proj_scales": "mlp.mlp2_weight.scales",
        "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
    }
    result = {}
    for name, tensor in weights.items():
        if name in direct:
            result[direct[name]] = tensor
            continue
        _, _, layer, rest = name.split(".", 3)
        if rest in in_layer:
            result[f"block.{layer}.{in_layer[rest]}"] = tensor
        elif ".q_proj." in name:
            parts = [weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            result[f"block.{layer}.attn.qkv.{rest.rpartition('.')[2]}"] = torch.cat(parts)
    return result


def dense(weights: Weights, dtype: torch.dtype) -> Weights:
    """As transformers saves a dequantised model: banks [E, in, out]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    result = {name: tensor.to(dtype) for name, tensor in others(weights).items()}
    for bank in banks(weights):
        result[bank] = convert_moe_packed_tensors(
            weights[f"{bank}_blocks"].clone(), weights[f"{bank}_scales"].clone(), dtype=dtype
        ).contiguous()
    return result


def comfy_dense(weights: Weights, dtype: torch.dtype) -> Weights:
    """As ComfyUI's experts without quantisation: banks ``.weight`` [E, out, in], no ``model.``."""
    result = {}
    for name, tensor in dense(weights, dtype).items():
        key = name.removeprefix("model.")
        if name in banks(weights):
            result[f"{key}.weight"] = tensor.transpose(1, 2).contiguous()
        else:
            result[re.sub(r"(experts\.\w+_proj)_bias$", r"\1.bias", key)] = tensor
    return result


def comfy_nvfp4(
    weights: Weights, bank_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
) -> Weights:
    """ComfyUI's nvfp4 file. ``bank_of`` (blocks, scales) -> bytes [E, N, K/2] with the first value
    high, e4m3 scales [E, N, K/16], factors [E]."""
    from comfy_kitchen.float_utils import to_blocked

    result = {}
    for name, tensor in others(weights).items():
        key = name.removeprefix("model.")
        result[re.sub(r"(experts\.\w+_proj)_bias$", r"\1.bias", key)] = tensor
    for bank in banks(weights):
        packed, scales, factors = bank_of(weights[f"{bank}_blocks"], weights[f"{bank}_scales"])
        key = bank.removeprefix("model.")
        result[f"{key}.weight"] = packed
        tiled = [to_blocked(expert.view(torch.uint8), flatten=False) for expert in scales]
        result[f"{key}.weight_scale"] = torch.stack(tiled).view(torch.float8_e4m3fn)
        result[f"{key}.weight_scale_2"] = factors
        content = json.dumps({"format": "nvfp4", "num_experts": len(packed)})
        result[f"{key}.comfy_quant"] = torch.tensor(list(content.encode()), dtype=torch.uint8)
    return result


def rebundled(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An MXFP4 bank as nvfp4 without loss: each scale twice, split into e4m3 and a power of two."""
    top = scales.flatten(1).amax(1).int() - 127
    factors = torch.exp2((top - 8).float())
    e4m3 = torch.exp2(scales.float() - 127) / factors[:, None, None]
    packed = ((blocks & 15) << 4 | blocks >> 4).flatten(-2)
    return packed, e4m3.to(torch.float8_e4m3fn).repeat_interleave(2, -1), factors


def ggml_mxfp4(blocks: Tensor, scales: Tensor) -> np.ndarray:
    """[..., G, 16] and [..., G] -> ggml's type 39, u8 [..., 17 G]."""
    data = blocks.numpy()
    codes = np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], 32)
    halves = codes[..., :16] | (codes[..., 16:] << 4)
    whole = np.concatenate([scales.numpy()[..., None], halves], axis=-1)
    return np.ascontiguousarray(whole.reshape(*whole.shape[:-2], -1))


def write_gguf(
    path: Path,
    weights: Weights,
    matrices: str = "F16",
    experts: str = "MXFP4",
    architecture: str = "gpt-oss",
    tokenizer: dict | None = None,
) -> None:
    """llama.cpp's GGUF: ``matrices`` is the type of attention and embedding, norms and biases are F32.

    ``tokenizer`` is the content of a tokenizer.json, written as llama.cpp's converter writes it.
    """
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer, len(weights["model.embed_tokens.weight"]))
    for name, tensor in others(weights).items():
        key = _gguf_name(name)
        if ".mlp.experts.gate_up_proj_bias" in name:
            for index, part in enumerate(("gate", "up")):
                data = np.ascontiguousarray(tensor[:, index::2].float().numpy())
                writer.add_tensor(key.replace("gate_up", part), data)
            continue
        kind = matrices if tensor.ndim == 2 and "router" not in name and "experts" not in name else "F32"
        _add(writer, key, tensor.float().numpy(), kind)
    for bank in banks(weights):
        key = _gguf_name(bank + ".weight")
        blocks, scales = weights[f"{bank}_blocks"], weights[f"{bank}_scales"]
        split = (
            {"gate": slice(0, None, 2), "up": slice(1, None, 2)} if "gate_up" in key else {"": slice(None)}
        )
        for part, rows in split.items():
            raw = ggml_mxfp4(blocks[:, rows].contiguous(), scales[:, rows].contiguous())
            kind = gguf.GGMLQuantizationType.MXFP4
            target = key.replace("gate_up", part)
            if experts == "MXFP4":
                writer.add_tensor(target, raw, raw_dtype=kind)
            else:
                _add(writer, target, gguf.quants.dequantize(raw, kind), experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_plain_gguf(path: Path, architecture: str, weights: Weights) -> None:
    """Any GGUF of Q8_0 or F32 tensors under these names."""
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    for name, tensor in weights.items():
        _add(writer, name, tensor.float().numpy(), "Q8_0" if tensor.shape[-1] % 32 == 0 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer, name: str, data: np.ndarray, kind: str) -> None:
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(data), number), raw_dtype=number)


def _gguf_name(name: str) -> str:
    for old, new in (
        ("model.embed_tokens.", "token_embd."),
        ("lm_head.", "output."),
        ("model.norm.", "output_norm."),
        ("model.layers.", "blk."),
        ("post_attention_layernorm", "post_attention_norm"),
        ("input_layernorm", "attn_norm"),
        ("self_attn.sinks", "attn_sinks.weight"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.router", "ffn_gate_inp"),
    ):
        name = name.replace(old, new)
    name = re.sub(r"self_attn\.([qkv])_proj", r"attn_\1", name)
    return re.sub(r"mlp\.experts\.(\w+)_proj[._](bias|weight)", r"ffn_\1_exps.\2", name)


def add_tokenizer(writer, tokenizer: dict, rows: int) -> None:
    """As llama.cpp's converter: every row of the embedding is a token, control ones are type 3, and
    rows that no token has are named [PADn], of type 5."""
    vocabulary = {**tokenizer["model"]["vocab"]}
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    by_id = {index: token for token, index in {**vocabulary, **special}.items()}
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(rows)]
    kinds = [3 if token in special else 1 if index in by_id else 5 for index, token in enumerate(tokens)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])


def save(path: Path, weights: Weights) -> Path:
    """As one safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})
    return path
