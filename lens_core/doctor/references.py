"""The reference implementations that parity is checked against, with the weights of a file.

transformers' GptOssModel in bf16 takes 40 GB, so a reference is built without memory and its blocks have
weights only while each runs (``fill``). Weights come from the file itself wherever it holds them as plain
numbers under the reference's own names: a fault in this pack's loading then shows. Others are those loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config import CAPTURED_LAYERS, DenoiserConfig
from ..denoiser import LensDenoiser
from ..denoiser_file import DenoiserFile
from ..encoder import PackedExperts
from ..errors import MissingPackage
from ..quantized import QuantizedLinear
from ..text_encoder import TextEncoder
from ..vae import LensVAE
from ..vae.autoencoder import unpack
from ..weights import DENOISER
from ..weights.keymap import rename
from ..weights.tensor_info import DTYPES

# transformers' names of an encoder's sizes, which are EncoderConfig's too.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "sliding_window",
    "rms_norm_eps",
)
# Name and dtype -> the tensor on the CPU.
Weights = Callable[[str, torch.dtype], Tensor]


class DenoiserReference(Protocol):
    """Builds another implementation of the denoiser on the meta device, its parameters under the checkpoint's
    names; its forward takes latents [B, C, h, w], sigma [B] and text features [B, S, L * text hidden]."""

    def __call__(self, config: DenoiserConfig, dtype: torch.dtype) -> nn.Module: ...


def fill(model: nn.Module, blocks: Sequence[nn.Module], weights: Weights, place: dict[str, Any]) -> None:
    """Give a model on the meta device its weights by name, those of ``blocks`` only while each one runs.

    ``place`` is dtype and device.
    """

    def tensors(names: Sequence[str], prefix: str) -> dict[str, Tensor]:
        return {name: weights(prefix + name, place["dtype"]).to(**place) for name in names}

    def arrive(prefix: str) -> Callable[..., None]:
        return lambda block, *_: _assign(block, tensors(list(block.state_dict()), prefix))

    def leave(block: nn.Module, *_: Any) -> None:
        block.to_empty(device="meta")

    model.requires_grad_(False)
    inside = {id(block) for block in blocks}
    prefixes = {id(module): f"{name}." for name, module in model.named_modules() if id(module) in inside}
    for block in blocks:
        block.register_forward_pre_hook(arrive(prefixes[id(block)]))
        block.register_forward_hook(leave)
    outer = [name for name in model.state_dict() if not name.startswith(tuple(prefixes.values()))]
    _assign(model, tensors(outer, ""), strict=False)


def _assign(module: nn.Module, tensors: dict[str, Tensor], strict: bool = True) -> None:
    module.load_state_dict(tensors, strict=strict, assign=True)


def denoiser_weights(file: DenoiserFile, model: LensDenoiser) -> Weights:
    """Of a denoiser, dequantised."""
    header = file.checkpoint.header
    source = rename(header, DENOISER)

    def weight(name: str, dtype: torch.dtype) -> Tensor:
        module, _, leaf = name.rpartition(".")
        if module not in file.stored and name in source and header[source[name]].dtype in DTYPES:
            return file.checkpoint.read(source[name], dtype)
        layer = model.get_submodule(module)
        if isinstance(layer, QuantizedLinear) and leaf == "weight":
            return layer.dequantized(dtype)
        return getattr(layer, leaf).to(dtype)

    return weight


def transformers_classes() -> tuple[Any, Any]:
    """GptOssConfig and GptOssModel; raises MissingPackage."""
    try:
        from transformers import GptOssConfig, GptOssModel
    except ImportError as error:
        raise MissingPackage(
            "The encoder's reference is transformers 4.55 or newer: pip install 'transformers>=4.55'."
        ) from error
    return GptOssConfig, GptOssModel


def transformers_features(text: TextEncoder, ids: Sequence[int], place: dict[str, Any]) -> Tensor:
    """Features [S, L, H] of a whole chat's ids by transformers; ``place`` is dtype and device."""
    GptOssConfig, GptOssModel = transformers_classes()  # noqa: N806
    sizes = text.file.config
    # RoPE's settings are that class' defaults, GPT-OSS-20B's own; Lens' config.json leaves them out.
    config = GptOssConfig(**{name: getattr(sizes, name) for name in _SIZES})
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.device("meta"):
        model = GptOssModel(config).eval()
    model.rotary_emb = type(model.rotary_emb)(config=config).to(place["device"])
    model.norm, model.embed_tokens = nn.Identity(), nn.Identity()  # after the last feature; rows are given
    captured: list[Tensor] = []
    for index in CAPTURED_LAYERS:
        model.layers[index].register_forward_hook(lambda module, args, out: captured.append(_first(out)[0]))
    weights = _encoder_weights(text)
    fill(model, list(model.layers), weights, place)
    rows = text.model.embed_tokens(torch.tensor([list(ids)])).to(**place)
    model(inputs_embeds=rows, use_cache=False)
    return torch.stack(captured, dim=1)


def _first(out: Any) -> Tensor:
    """A layer's output [1, S, H], which older versions put into a tuple."""
    return out[0] if isinstance(out, tuple) else out


def _encoder_weights(text: TextEncoder) -> Weights:
    header, own = text.file.checkpoint.header, text.model.state_dict()

    def stored(name: str) -> Tensor:
        found = f"model.{name}"  # as Hugging Face has it
        return text.file.checkpoint.read(found) if found in header else own[name]

    def weight(name: str, dtype: torch.dtype) -> Tensor:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return stored(name).to(dtype)
        module, _, leaf = name.rpartition(".")
        experts = text.model.get_submodule(module)
        assert isinstance(experts, PackedExperts)
        if experts.format.has_scale:  # nvfp4, which transformers has not: by this pack's own definition
            return getattr(experts.dense(dtype), leaf).transpose(1, 2)
        return _unpacked(stored(f"{name}_blocks"), stored(f"{name}_scales"), dtype)

    return weight


def _unpacked(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """A bank [E, K, N] by transformers' own conversion, one expert at a time: it takes memory."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    experts, rows, groups, _ = blocks.shape
    bank = torch.empty(experts, 32 * groups, rows, dtype=dtype)
    for index in range(experts):
        part = slice(index, index + 1)
        bank[part] = convert_moe_packed_tensors(blocks[part], scales[part], dtype=dtype)
    return bank


def diffusers_pictures(path: Path, vae: LensVAE, latents: Tensor, place: dict[str, Any]) -> Tensor:
    """Pictures [B, 3, 16 h, 16 w] of packed latents [B, C, h, w] by diffusers' AutoencoderKLFlux2.

    Loaded by diffusers itself from a folder; from a single file, whose names it does not read without the
    network, with the tensors that ``vae`` has.
    """
    from diffusers import AutoencoderKLFlux2

    if (path / "config.json").is_file():
        model = AutoencoderKLFlux2.from_pretrained(path, local_files_only=True)
    else:
        model = AutoencoderKLFlux2.from_config(vae.model.config)
        model.load_state_dict(vae.model.state_dict())
    model = nn.Module.to(model, torch.float32).eval().requires_grad_(False)
    mean = model.bn.running_mean.view(1, -1, 1, 1)
    deviation = torch.sqrt(model.bn.running_var + model.config.batch_norm_eps).view(1, -1, 1, 1)
    plain = unpack(latents.cpu().float() * deviation + mean)
    return nn.Module.to(model, **place).decode(plain.to(**place), return_dict=False)[0]
