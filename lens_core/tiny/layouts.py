"""Writes the tiny models: the diffusers folder and the single files, the same bytes for one seed."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..config import LENS, LENS_TURBO
from ..weights import variant_metadata
from . import models
from .comfy import to_comfy_nvfp4
from .folder import (
    Weights,
    Written,
    write_denoiser_config,
    write_encoder_config,
    write_index,
    write_tokenizer,
    write_vae,
)
from .tokenizer import tiny_tokenizer


def write_everything(out: Path, seed: int) -> list[Path]:
    """Write every layout below ``out``; returns the files. Existing files are never replaced."""
    tokenizer = tiny_tokenizer().to_str(pretty=True)
    config = models.encoder_config(tiny_tokenizer().get_vocab_size())
    generator = torch.Generator().manual_seed(seed)
    encoder = models.packed_encoder(models.encoder_weights(config, generator))
    vae = models.vae_weights(generator)
    written = Written(out)
    for variant in (LENS, LENS_TURBO):
        denoiser = models.denoiser_weights(generator)
        folder = f"lens/{variant.name}-tiny"
        write_index(written, folder)
        write_denoiser_config(written, folder, models.DENOISER)
        written.shards(f"{folder}/transformer", "diffusion_pytorch_model", denoiser, 2)
        write_encoder_config(written, folder, config)
        written.shards(f"{folder}/text_encoder", "model", encoder, 3)
        write_vae(written, folder, models.VAE, vae)
        write_tokenizer(written, folder, tokenizer)
        stem = variant.name.lower().replace("-", "_")
        single = {name: value.bfloat16() for name, value in denoiser.items()}
        written.tensors(f"diffusion_models/{stem}_tiny_bf16.safetensors", single, variant_metadata(variant))
    embedded = torch.tensor(list(tokenizer.encode()), dtype=torch.uint8)
    with_tokenizer = {**encoder, "tokenizer_json": embedded}
    written.tensors("text_encoders/gpt_oss_tiny_mxfp4.safetensors", with_tokenizer)
    comfy = {**to_comfy_nvfp4(encoder), "tokenizer_json": embedded}
    written.tensors("text_encoders/gpt_oss_tiny_nvfp4.safetensors", comfy)
    written.tensors("vae/flux2_tiny_vae.safetensors", _to_ldm(vae))
    lora = models.lora_weights(generator)
    written.tensors("loras/lens_tiny_lora.safetensors", lora, models.LORA_METADATA)
    return written.files


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
