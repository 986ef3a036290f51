"""Writes the tiny models: the diffusers folder and the single files.

Byte for byte the same for one seed: keys are sorted, JSON is written with fixed separators, and
safetensors' own writer is deterministic.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import CAPTURED_LAYERS, LENS, LENS_TURBO, EncoderConfig, Variant
from . import models
from .comfy import to_comfy_nvfp4
from .tokenizer import tiny_tokenizer, tokenizer_config

Weights = dict[str, Tensor]


def write_everything(out: Path, seed: int) -> list[Path]:
    """Write every layout below ``out``; returns the files. Existing files are never replaced."""
    tokenizer = tiny_tokenizer().to_str(pretty=True)
    config = models.encoder_config(tiny_tokenizer().get_vocab_size())
    generator = torch.Generator().manual_seed(seed)
    encoder = models.encoder_weights(config, generator)
    vae = models.vae_weights(generator)
    written = _Written(out)
    for variant in (LENS, LENS_TURBO):
        denoiser = models.denoiser_weights(generator)
        folder = f"lens/{variant.name}-tiny"
        _write_folder(written, folder, denoiser, encoder, vae, config, tokenizer)
        stem = variant.name.lower().replace("-", "_")
        single = {name: value.bfloat16() for name, value in denoiser.items()}
        written.tensors(f"diffusion_models/{stem}_tiny_bf16.safetensors", single, _metadata(variant))
    embedded = torch.tensor(list(tokenizer.encode()), dtype=torch.uint8)
    with_tokenizer = {**encoder, "tokenizer_json": embedded}
    written.tensors("text_encoders/gpt_oss_tiny_mxfp4.safetensors", with_tokenizer)
    comfy = {**to_comfy_nvfp4(encoder), "tokenizer_json": embedded}
    written.tensors("text_encoders/gpt_oss_tiny_nvfp4.safetensors", comfy)
    written.tensors("vae/flux2_tiny_vae.safetensors", _to_ldm(vae))
    lora = models.lora_weights(generator)
    written.tensors("loras/lens_tiny_lora.safetensors", lora, models.LORA_METADATA)
    return written.files


class _Written:
    """Files below one folder; refuses to replace anything."""

    def __init__(self, root: Path) -> None:
        self.root, self.files = root, []  # type: Path, list[Path]

    def path(self, name: str) -> Path:
        path = self.root / name
        if path.exists():
            raise FileExistsError(f"{path} exists already; choose an empty folder.")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.files.append(path)
        return path

    def text(self, name: str, content: str) -> None:
        self.path(name).write_text(content, encoding="utf-8", newline="\n")

    def json(self, name: str, content: dict[str, Any]) -> None:
        self.text(name, json.dumps(content, indent=2) + "\n")

    def tensors(self, name: str, weights: Weights, metadata: dict[str, str] | None = None) -> None:
        # At most one metadata entry: safetensors writes several in random order.
        contiguous = {key: value.contiguous() for key, value in weights.items()}
        save_file(contiguous, self.path(name), metadata=metadata or {"format": "pt"})

    def shards(self, folder: str, stem: str, weights: Weights, count: int) -> None:
        """Split by key order into ``count`` shards with Hugging Face's index."""
        names = sorted(weights)
        total = sum(value.nbytes for value in weights.values())
        where = {}
        for index in range(count):
            part = names[index * len(names) // count : (index + 1) * len(names) // count]
            file = f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"
            self.tensors(f"{folder}/{file}", {name: weights[name] for name in part})
            where.update(dict.fromkeys(part, file))
        index_json = {"metadata": {"total_size": total}, "weight_map": where}
        self.json(f"{folder}/{stem}.safetensors.index.json", index_json)


def _write_folder(
    written: _Written,
    folder: str,
    denoiser: Weights,
    encoder: Weights,
    vae: Weights,
    config: EncoderConfig,
    tokenizer: str,
) -> None:
    written.json(f"{folder}/model_index.json", _model_index())
    written.json(f"{folder}/transformer/config.json", _denoiser_json())
    written.shards(f"{folder}/transformer", "diffusion_pytorch_model", denoiser, 2)
    written.json(f"{folder}/text_encoder/config.json", _encoder_json(config))
    written.shards(f"{folder}/text_encoder", "model", encoder, 3)
    written.json(f"{folder}/vae/config.json", {"_class_name": "AutoencoderKLFlux2", **models.VAE})
    written.tensors(f"{folder}/vae/diffusion_pytorch_model.safetensors", vae)
    written.text(f"{folder}/tokenizer/tokenizer.json", tokenizer)
    written.text(f"{folder}/tokenizer/tokenizer_config.json", tokenizer_config())
    written.json(f"{folder}/scheduler/scheduler_config.json", _scheduler_json())


def _metadata(variant: Variant) -> dict[str, str]:
    return {"lens.variant": variant.name}


def _model_index() -> dict[str, Any]:
    return {
        "_class_name": "LensPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["lens", "LensGptOssEncoder"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["lens", "LensTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }


def _denoiser_json() -> dict[str, Any]:
    config = models.DENOISER
    return {
        "_class_name": "LensTransformer2DModel",
        "patch_size": 2,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels // 4,
        "num_layers": config.num_layers,
        "attention_head_dim": config.attention_head_dim,
        "num_attention_heads": config.num_attention_heads,
        "enc_hidden_dim": config.enc_hidden_dim,
        "axes_dims_rope": list(config.axes_dims_rope),
        "multi_layer_encoder_feature": True,
        "selected_layer_index": list(CAPTURED_LAYERS),
    }


def _encoder_json(config: EncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_local_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "sliding_window": config.sliding_window,
        "rms_norm_eps": config.rms_norm_eps,
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4"},
    }


def _scheduler_json() -> dict[str, Any]:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "time_shift_type": "exponential",
    }


def _to_ldm(vae: Weights) -> Weights:
    """The same VAE under CompVis names, its attention projections as 1x1 convolutions."""
    result = {}
    for name, value in vae.items():
        new = name
        for pattern, replacement in _LDM:
            new = re.sub(pattern, replacement, new)
        convolution = "attn_1" in new and value.ndim == 2
        result[new] = value[:, :, None, None] if convolution else value
    return dict(sorted(result.items()))


_LDM = (
    (r"^quant_conv", "encoder.quant_conv"),
    (r"^post_quant_conv", "decoder.post_quant_conv"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    *((rf"up_blocks\.{i}\.resnets", f"up.{3 - i}.block") for i in range(4)),
    *((rf"up_blocks\.{i}\.upsamplers\.0", f"up.{3 - i}.upsample") for i in range(4)),
)
