"""Bad input gives one clear sentence, and the server draws the next picture as if nothing had been."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scripts.comfy_server import ComfyServer, PromptRejected, error_of
from tests.encoder_files import write_plain_gguf


@pytest.fixture
def bad_files(server: ComfyServer) -> Path:
    """Files of the wrong kind in the folders where the loaders look."""
    models = server.models
    weight = torch.zeros(4, 4)
    flux = {"double_blocks.0.img_attn.qkv.weight": weight, "img_in.weight": torch.zeros(2)}
    save_file(flux, models / "diffusion_models" / "flux.safetensors")
    clip = {"text_model.encoder.layers.0.mlp.fc1.weight": weight}
    save_file(clip, models / "text_encoders" / "clip_l.safetensors")
    llm = {"model.layers.0.self_attn.q_proj.weight": weight}
    save_file(llm, models / "text_encoders" / "llama.safetensors")
    save_file({"decoder.conv_in.weight": weight}, models / "vae" / "sd_vae.safetensors")
    llm_gguf = {"blk.0.attn_q.weight": weight, "token_embd.weight": weight}
    write_plain_gguf(models / "text_encoders" / "llm_q8.gguf", "llama", llm_gguf)
    good = (models / "diffusion_models" / "lens_tiny_bf16.safetensors").read_bytes()
    (models / "diffusion_models" / "cut.safetensors").write_bytes(good[: len(good) // 2])
    (models / "diffusion_models" / "garbage.safetensors").write_bytes(bytes(range(256)) * 40)
    broken = models / "lens" / "broken" / "transformer"
    broken.mkdir(parents=True, exist_ok=True)
    index = {"weight_map": {"img_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (broken / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return models


CASES: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "a FLUX denoiser": (
        {"model__model_name": "flux.safetensors"},
        "LensModelLoader",
        ("flux.safetensors is a FLUX denoiser", "expected a Lens denoiser", "lens_turbo_bf16"),
    ),
    "a truncated denoiser": (
        {"model__model_name": "cut.safetensors"},
        "LensModelLoader",
        ("cut.safetensors is cut short", "Download it again"),
    ),
    "a corrupt denoiser": (
        {"model__model_name": "garbage.safetensors"},
        "LensModelLoader",
        ("garbage.safetensors is damaged or no safetensors file", "Download it again"),
    ),
    "a folder with a missing shard": (
        {"model__model_name": "broken"},
        "LensModelLoader",
        ("missing: diffusion_pytorch_model-00001-of-00002.safetensors", "Download the missing files"),
    ),
    "a CLIP file as encoder": (
        {"encoder__encoder_name": "clip_l.safetensors"},
        "LensEncoderLoader",
        ("clip_l.safetensors is a CLIP text encoder", "expected a GPT-OSS encoder", "gpt-oss-20b"),
    ),
    "a language model as encoder": (
        {"encoder__encoder_name": "llama.safetensors"},
        "LensEncoderLoader",
        ("llama.safetensors is a language model", "expected a GPT-OSS encoder"),
    ),
    "an LLM GGUF as encoder": (
        {"encoder__encoder_name": "llm_q8.gguf"},
        "LensEncoderLoader",
        ("llm_q8.gguf is a GGUF of llama; expected a GPT-OSS encoder", "a GGUF of it with MXFP4 experts"),
    ),
    "an SD VAE": (
        {"vae__vae_name": "sd_vae.safetensors"},
        "LensVAELoader",
        ("sd_vae.safetensors is a VAE of another model", "expected a FLUX.2 VAE", "flux2-vae"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_file_is_one_sentence_and_the_next_prompt_works(
    server: ComfyServer, bad_files: Path, picture_prompt: Callable[..., dict], case: str
):
    overrides, node, sentences = CASES[case]
    error = error_of(server.wait(server.queue(picture_prompt(**overrides))))
    assert error is not None
    assert error["node_type"] == node
    message = error["exception_message"].strip()
    assert "\n" not in message
    for sentence in sentences:
        assert sentence in message
    assert_draws(server, picture_prompt)


def test_size_that_is_no_multiple_of_16(server: ComfyServer, picture_prompt: Callable[..., dict]):
    prompt = picture_prompt()
    prompt["size"] = {
        "class_type": "EmptyLatentImage",
        "inputs": {"width": 1000, "height": 1000, "batch_size": 1},
    }
    message = error_of(server.wait(server.queue(prompt)))["exception_message"]
    assert "1000x1000" in message
    assert "multiples of 16" in message
    assert "Try 992x992" in message
    assert_draws(server, picture_prompt)


def test_ratio_beyond_1_to_2(server: ComfyServer, picture_prompt: Callable[..., dict]):
    prompt = picture_prompt()
    prompt["size"] = {
        "class_type": "EmptyFlux2LatentImage",
        "inputs": {"width": 1536, "height": 512, "batch_size": 1},
    }
    message = error_of(server.wait(server.queue(prompt)))["exception_message"]
    assert "1536x512" in message
    assert "1:2 to 2:1" in message
    assert "Try 1088x544" in message or "Try 1472x736" in message
    assert_draws(server, picture_prompt)


def test_zero_steps_is_refused_before_anything_runs(server: ComfyServer, picture_prompt: Callable[..., dict]):
    with pytest.raises(PromptRejected, match="Value 0 smaller than min of 1"):
        server.queue(picture_prompt(sampler__steps=0))
    assert_draws(server, picture_prompt)


def test_a_missing_file_is_refused_with_its_link_before_anything_runs(
    server: ComfyServer, picture_prompt: Callable[..., dict]
):
    with pytest.raises(PromptRejected) as caught:
        server.queue(picture_prompt(vae__vae_name="flux2-vae.safetensors"))
    (error,) = json.loads(str(caught.value))["node_errors"]["vae"]["errors"]
    assert error["extra_info"]["input_name"] == "vae_name"
    for part in (
        "flux2-vae.safetensors",
        "https://huggingface.co/",
        "0.34 GB",
        "download vae --to",
        "press R",
    ):
        assert part in error["details"]
    assert_draws(server, picture_prompt)


def test_empty_prompt_draws(server: ComfyServer, picture_prompt: Callable[..., dict]):
    entry = server.wait(server.queue(picture_prompt(text__prompt="  ", sampler__seed=11)))
    assert error_of(entry) is None
    assert len(server.images(entry)) == 1
    assert "The prompt is empty" in server.log.read_text(errors="replace")


def test_cancel_ends_the_run_and_the_next_prompt_works(
    server: ComfyServer, picture_prompt: Callable[..., dict]
):
    prompt_id = server.queue(picture_prompt(sampler__steps=1000, sampler__seed=12))
    server.wait_until_running(prompt_id)
    server.post("/api/interrupt")
    entry = server.wait(prompt_id, seconds=20)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    assert_draws(server, picture_prompt)


def assert_draws(server: ComfyServer, picture_prompt: Callable[..., dict]) -> None:
    """A right prompt still gives a picture; another seed each time, so that nothing is cached."""
    assert_draws.seed += 1
    entry = server.wait(server.queue(picture_prompt(sampler__seed=assert_draws.seed)))
    assert error_of(entry) is None
    assert len(server.images(entry)) == 1


assert_draws.seed = 1000
