"""LensLoraLoader and LensSaveModel in a running server: pictures, what a node shows, and wrong files."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from scripts.comfy_server import ComfyServer, error_of

LORA = "lens_tiny_lora.safetensors"
# ComfyUI's binary messages that hold a node's text: this kind, the id's length, the id, the text.
_TEXT = 3


@pytest.fixture
def patched(picture_prompt: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A prompt with the node between loader and sampler."""

    def build(seed: int = 5, **inputs: Any) -> dict[str, Any]:
        prompt = picture_prompt(sampler__seed=seed)
        inputs = {"model": ["model", 0], "lora_name": LORA, "strength": 1.0, "block_strengths": "", **inputs}
        prompt["lora"] = {"class_type": "LensLoraLoader", "inputs": inputs}
        prompt["sampler"]["inputs"]["model"] = ["lora", 0]
        return prompt

    return build


def pixels(server: ComfyServer, prompt: dict[str, Any]) -> np.ndarray:
    entry = server.wait(server.queue(prompt))
    assert error_of(entry) is None, str(error_of(entry))
    (path,) = server.images(entry)
    return np.asarray(Image.open(path))


def texts_of(server: ComfyServer, prompt: dict[str, Any]) -> dict[str, str]:
    """Run a prompt as a page does; the text that each node shows."""

    async def run() -> dict[str, str]:
        shown: dict[str, str] = {}
        socket = f"{server.url}/ws?clientId=page"
        async with aiohttp.ClientSession() as session, session.ws_connect(socket, timeout=120) as page:
            await session.post(f"{server.url}/api/prompt", json={"prompt": prompt, "client_id": "page"})
            async for message in page:
                if message.type == aiohttp.WSMsgType.BINARY:
                    kind, length = struct.unpack(">II", message.data[:8])
                    node, text = message.data[8 : 8 + length], message.data[8 + length :]
                    shown |= {node.decode(): text.decode()} if kind == _TEXT else {}
                elif json.loads(message.data)["type"] in ("execution_success", "execution_error"):
                    break
        return shown

    return asyncio.run(run())


def test_the_picture_changes_and_the_node_says_what_matched(server: ComfyServer, picture_prompt, patched):
    plain = pixels(server, picture_prompt(sampler__seed=5))
    with_lora = pixels(server, patched())
    assert not np.array_equal(with_lora, plain)
    half = {"strength": 0.5, "block_strengths": "0: 0"}
    shown = texts_of(server, patched(**half))
    assert shown["lora"] == (
        f"{LORA}: matched 30 of 30, strength 0.5, rank 4. block_strengths: 10 of 30 layers are at 0."
    )
    halved = pixels(server, patched(**half))
    assert not np.array_equal(halved, plain) and not np.array_equal(halved, with_lora)


def test_a_lora_for_another_model_is_one_sentence_and_the_next_prompt_works(server: ComfyServer, patched):
    flux = {"double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(4, 8)}
    save_file(flux, server.models / "loras" / "flux_style.safetensors")
    error = error_of(server.wait(server.queue(patched(lora_name="flux_style.safetensors"))))
    assert error is not None and error["node_type"] == "LensLoraLoader"
    message = error["exception_message"].strip()
    assert message.startswith("flux_style.safetensors is a LoRA for FLUX (its keys are such as double_")
    assert "expected one for Lens" in message and "\n" not in message
    assert pixels(server, patched(seed=6)).std() > 5


def test_block_strengths_that_make_no_sense_are_one_sentence(server: ComfyServer, patched):
    error = error_of(server.wait(server.queue(patched(block_strengths="0-47: 1"))))
    assert error["exception_message"].strip() == (
        "block_strengths: '0-47: 1' names blocks 0 to 47; this model has 0 to 2. Write the smaller "
        "number first."
    )


def test_the_merged_file_draws_the_same(server: ComfyServer, picture_prompt, patched):
    prompt = patched(strength=0.7)
    inputs = {"model": ["lora", 0], "file_name": "merged", "overwrite": True}
    prompt["keep"] = {"class_type": "LensSaveModel", "inputs": inputs}
    with_lora = pixels(server, prompt)
    merged = pixels(server, picture_prompt(sampler__seed=5, model__model_name="merged.safetensors"))
    # The same weights in other places, which a CPU's products may round otherwise.
    assert np.abs(merged.astype(int) - with_lora).max() <= 1
