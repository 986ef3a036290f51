"""A Lens folder in diffusers' layout, one part at a time; the sizes come from the configurations.

Byte for byte the same for the same weights: keys are sorted, JSON is written with fixed separators, and
safetensors' own writer is deterministic.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..config import CAPTURED_LAYERS, DenoiserConfig, EncoderConfig
from .tokenizer import tokenizer_config

Weights = dict[str, Tensor]


class Written:
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


def write_index(written: Written, folder: str) -> None:
    """model_index.json and the scheduler's configuration."""
    written.json(f"{folder}/model_index.json", _MODEL_INDEX)
    written.json(f"{folder}/scheduler/scheduler_config.json", _SCHEDULER)


def write_denoiser_config(written: Written, folder: str, config: DenoiserConfig) -> None:
    """transformer/config.json."""
    content = {
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
    written.json(f"{folder}/transformer/config.json", content)


def write_encoder_config(written: Written, folder: str, config: EncoderConfig) -> None:
    """text_encoder/config.json."""
    content = {
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
    written.json(f"{folder}/text_encoder/config.json", content)


def write_vae(written: Written, folder: str, config: dict[str, Any], weights: Weights) -> None:
    """vae/: its configuration and one file."""
    written.json(f"{folder}/vae/config.json", {"_class_name": "AutoencoderKLFlux2", **config})
    written.tensors(f"{folder}/vae/diffusion_pytorch_model.safetensors", weights)


def write_tokenizer(written: Written, folder: str, tokenizer_json: str) -> None:
    """tokenizer/: the tokenizer and its configuration for transformers."""
    written.text(f"{folder}/tokenizer/tokenizer.json", tokenizer_json)
    written.text(f"{folder}/tokenizer/tokenizer_config.json", tokenizer_config())


_MODEL_INDEX = {
    "_class_name": "LensPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["lens", "LensGptOssEncoder"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["lens", "LensTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
}
