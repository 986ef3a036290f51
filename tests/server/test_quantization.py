"""Modes of the selector in one session of a real server. All of them at full size: tests/gpu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from scripts.comfy_server import ComfyServer
from tests.quantized_session import LORA, Session, write_lora

# Attention's and the MLP's, and one that is not quantised.
SIZES = {
    "transformer_blocks.0.attn.img_qkv": (384, 128),
    "transformer_blocks.1.txt_mlp.w1": (341, 128),
    "transformer_blocks.1.attn.to_out.0": (128, 128),
    "transformer_blocks.2.img_mod.1": (768, 128),
}


# One in ComfyUI's own format and one in this pack's.
@pytest.mark.parametrize("mode", ["float8_dynamic", "int4_weight_only"])
def test_a_session(server: ComfyServer, picture_prompt: Callable[..., dict[str, Any]], mode: str):
    write_lora(server.models / "loras" / LORA, SIZES, share=1.0)
    Session(server, picture_prompt(model__model_name="lens_turbo_tiny_bf16.safetensors")).check(
        mode, strengths=(1.0,)
    )
