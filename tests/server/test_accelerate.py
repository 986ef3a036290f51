"""LensAccelerate on a server without a GPU: workflows that have it run, and say what they run without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from scripts.comfy_server import ComfyServer, error_of

Prompt = Callable[..., dict[str, Any]]


def accelerated(prompt: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The prompt with the node between loader and sampler."""
    inputs = {"model": ["model", 0], "cuda_graphs": True, "attention": "auto", **settings}
    prompt["accelerate"] = {"class_type": "LensAccelerate", "inputs": inputs}
    prompt["sampler"]["inputs"]["model"] = ["accelerate", 0]
    return prompt


def pixels(server: ComfyServer, prompt: dict[str, Any]) -> np.ndarray:
    entry = server.wait(server.queue(prompt))
    assert error_of(entry) is None
    (path,) = server.images(entry)
    return np.asarray(Image.open(path))


def test_a_workflow_for_nvidia_gpus_draws_the_same(server: ComfyServer, picture_prompt: Prompt):
    want = pixels(server, picture_prompt(sampler__seed=5))
    assert np.array_equal(pixels(server, accelerated(picture_prompt(sampler__seed=5))), want)
    said = "LensAccelerate: no CUDA graphs: they are for NVIDIA GPUs."
    assert server.log.read_text(errors="replace").count(said) == 1
    pixels(server, accelerated(picture_prompt(sampler__seed=6)))
    assert server.log.read_text(errors="replace").count(said) == 1, "the node ran again"


def test_an_attention_that_is_not_there_is_one_sentence(server: ComfyServer, picture_prompt: Prompt):
    prompt = accelerated(picture_prompt(sampler__seed=5), attention="flash_attn3")
    error = error_of(server.wait(server.queue(prompt)))
    assert error is not None and error["node_type"] == "LensAccelerate"
    assert error["exception_message"].strip() == (
        "FlashAttention-3 cannot be used: the denoiser computes in float32, and it takes 16-bit floats. "
        "Set attention to auto, the fastest that is here."
    )


def test_comfyuis_own_lens_is_one_sentence(server: ComfyServer, picture_prompt: Prompt):
    inputs = {"unet_name": "lens_tiny_bf16.safetensors", "weight_dtype": "default"}
    prompt = accelerated(picture_prompt(sampler__seed=5))
    prompt["model"] = {"class_type": "UNETLoader", "inputs": inputs}
    error = error_of(server.wait(server.queue(prompt)))
    assert error is not None and error["node_type"] == "LensAccelerate"
    assert error["exception_message"].strip() == (
        "LensAccelerate works only on models from LensModelLoader, and got another loader's Lens. Load the "
        "Lens file with LensModelLoader."
    )
