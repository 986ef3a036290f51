"""The GPT-OSS encoder as a ComfyUI CLIP: tokenizer and model with the methods that CLIP calls.

The conditioning has the shape of ComfyUI's own Lens encoder, [1, S, L * H], so either can feed
either model. One prompt needs no padding, so there is no attention mask.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from torch import Tensor, nn

from ...lens_core.config import CAPTURED_LAYERS
from ...lens_core.encoder import GptOssEncoder, encode_prompt, no_features
from ...lens_core.loading import load_encoder
from ...lens_core.prompt import PromptTokenizer
from .progress import on_progress
from .reader import host_reader

_KEY = "gpt_oss"


class HostTokenizer:
    """Text to tokens in the form that CLIP nodes pass on: {"gpt_oss": [[(id, weight), ...]]}."""

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        self.tokenizer = tokenizer

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, keep_empty: bool = False, **_: Any
    ) -> dict[str, list]:
        """Blank text has no tokens (the empty negative), unless ``keep_empty`` asks for an empty
        user turn (the empty positive). Prompt weights in the text are not interpreted."""
        if not text.strip() and not keep_empty:
            return {_KEY: [[]]}
        return {_KEY: [[(token, 1.0) for token in self.tokenizer(text).ids]]}

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(token_ids, skip_special_tokens)

    def state_dict(self) -> dict[str, Tensor]:
        """What a saved text encoder file needs of the tokenizer."""
        text = self.tokenizer.tokenizer.to_str().encode()
        return {"tokenizer_json": torch.frombuffer(bytearray(text), dtype=torch.uint8)}


class LensClipModel(nn.Module):
    """The module inside CLIP."""

    def __init__(self, encoder: GptOssEncoder, prefix_length: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.transformer = encoder
        self.prefix_length = prefix_length
        self.dtypes = {dtype}
        self.compute_dtype = dtype
        self.execution_device: torch.device | None = None

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """CLIP tells the device; a chosen layer ("clip skip") has no meaning here."""
        self.execution_device = options.get("execution_device", self.execution_device)

    def reset_clip_options(self) -> None:
        """Forget the device of the last run."""
        self.execution_device = None

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, None, dict[str, Any]]:
        """Features [1, S, L * H] of one prompt's tokens, on the device for intermediate results."""
        ids = [int(pair[0]) for pair in tokens[_KEY][0]]
        extra = {"num_layers_stacked": len(CAPTURED_LAYERS)}
        result_device = comfy.model_management.intermediate_device()
        if not ids:
            empty = no_features(self.transformer, len(CAPTURED_LAYERS), self.compute_dtype)
            return empty.flatten(2).to(result_device), None, extra
        device = self.execution_device or torch.device("cpu")
        features = encode_prompt(
            self.transformer, ids, self.prefix_length, device, self.compute_dtype, on_progress()
        )
        return features.flatten(2).to(result_device), None, extra


def load_clip(path: Path) -> comfy.sd.CLIP:
    """An encoder file or folder as a CLIP, experts packed as they lie on disk.

    Never under dynamic VRAM: that moves every buffer at once, and the packed experts are 10 of the 13
    GB. The classic patcher leaves on the CPU what does not fit, and the experts fetch it as they run.
    """
    management = comfy.model_management
    device = management.text_encoder_device()
    # Weights stay in the stored bf16; where bf16 arithmetic is slow or absent they are cast in use.
    compute = torch.bfloat16 if management.should_use_bf16(device) else torch.float32
    operations = comfy.ops.pick_operations(torch.bfloat16, compute)
    encoder, tokenizer = load_encoder(path, torch.bfloat16, operations, host_reader, on_progress())

    def build(dtype: torch.dtype, device: torch.device, model_options: dict[str, Any]) -> LensClipModel:
        return LensClipModel(encoder, len(tokenizer.prefix), compute).to(device)

    def build_tokenizer(embedding_directory: Any, tokenizer_data: Any) -> HostTokenizer:
        return HostTokenizer(tokenizer)

    target = SimpleNamespace(params={}, clip=build, tokenizer=build_tokenizer)
    clip = comfy.sd.CLIP(
        target,
        parameters=sum(tensor.nbytes for tensor in encoder.state_dict().values()) // 2,
        model_options={"dtype": torch.bfloat16},
        disable_dynamic=True,
    )
    clip.patcher.cached_patcher_init = (_load_patcher, (path,))
    return clip


def _load_patcher(path: Path, disable_dynamic: bool = False):
    return load_clip(path).patcher
