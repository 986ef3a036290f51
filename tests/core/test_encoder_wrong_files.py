"""Encoders that are not quite right, in the layouts of others than Hugging Face: one sentence each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lens_core.errors import CheckpointError, CheckpointMismatch
from lens_core.loading import open_encoder
from tests import encoder_files as files

Weights = dict[str, Tensor]
BANK = "layers.3.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def mxfp4(tiny_models: Path) -> Weights:
    """Hugging Face's tensors of the tiny encoder."""
    tensors = load_file(tiny_models / "text_encoders" / "gpt_oss_tiny_mxfp4.safetensors")
    del tensors["tokenizer_json"]
    return tensors


@pytest.fixture
def nvfp4(tiny_models: Path) -> Weights:
    return load_file(tiny_models / "text_encoders" / "gpt_oss_tiny_nvfp4.safetensors")


def refusal(path: Path, weights: Weights) -> CheckpointError:
    with pytest.raises(CheckpointError, match=r"x\.safetensors") as caught:
        open_encoder(files.save(path / "x.safetensors", weights))
    return caught.value


@pytest.mark.parametrize("part", ["weight", "weight_scale", "weight_scale_2", "comfy_quant", "bias"])
def test_a_missing_part_of_an_nvfp4_bank_is_named(tmp_path: Path, nvfp4: Weights, part: str):
    del nvfp4[f"{BANK}.{part}"]
    error = refusal(tmp_path, nvfp4)
    assert isinstance(error, CheckpointMismatch)
    assert error.missing == [f"{BANK}_bias" if part == "bias" else f"{BANK}.{part}"]
    assert not error.unexpected


def test_a_file_without_any_scales_is_no_bf16_file(tmp_path: Path, nvfp4: Weights):
    """Bytes under the names of bf16 banks: the shapes give it away, before anything is read."""
    for name in list(nvfp4):
        if name.endswith((".weight_scale", ".weight_scale_2", ".comfy_quant")):
            del nvfp4[name]
    error = refusal(tmp_path, nvfp4)
    assert isinstance(error, CheckpointMismatch)
    assert len(error.wrong_shape) == 48


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weight_scale", lambda tensor: tensor.flatten(1)[:, :-4].contiguous()),
        ("weight_scale_2", lambda tensor: tensor[:-1].contiguous()),
        ("weight", lambda tensor: tensor[:, :-1].contiguous()),
    ],
)
def test_a_wrong_shape_in_an_nvfp4_bank_is_named(
    tmp_path: Path, nvfp4: Weights, part: str, change: Callable[[Tensor], Tensor]
):
    nvfp4[f"{BANK}.{part}"] = change(nvfp4[f"{BANK}.{part}"])
    error = refusal(tmp_path, nvfp4)
    assert isinstance(error, CheckpointMismatch)
    assert [name for name, _, _ in error.wrong_shape] == [f"{BANK}.{part}"]


@pytest.mark.parametrize(
    ("part", "dtype", "wanted"),
    [
        ("weight_scale", torch.float16, "expected F8_E4M3 or U8"),
        ("weight_scale_2", torch.bfloat16, "expected F32"),
        ("weight", torch.int8, "expected U8"),
    ],
)
def test_a_wrong_dtype_in_an_nvfp4_bank_is_named(
    tmp_path: Path, nvfp4: Weights, part: str, dtype: torch.dtype, wanted: str
):
    nvfp4[f"{BANK}.{part}"] = nvfp4[f"{BANK}.{part}"].to(dtype)
    message = str(refusal(tmp_path, nvfp4))
    assert f"stores {BANK}.{part} as " in message
    assert wanted in message
    assert "choose another file" in message


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        (BANK, json.dumps({"format": "mxfp8"}).encode(), "mxfp8"),
        (BANK, b"{", "something unreadable"),
        (BANK, b"[1]", "something unreadable"),
        (BANK, b"\xff\xfe", "something unreadable"),
        (BANK, b"{}", "something unreadable"),
        ("layers.3.self_attn.q_proj", json.dumps({"format": "float8_e4m3fn"}).encode(), "float8_e4m3fn"),
        ("layers.3.self_attn.q_proj", json.dumps({"format": "nvfp4"}).encode(), "nvfp4"),
    ],
)
def test_another_quantisation_for_comfyui_is_named(
    tmp_path: Path, nvfp4: Weights, name: str, content: bytes, found: str
):
    nvfp4[f"{name}.comfy_quant"] = torch.tensor(list(content), dtype=torch.uint8)
    message = str(refusal(tmp_path, nvfp4))
    assert f"x.safetensors holds {name} as {found}; expected experts as nvfp4" in message
    assert "Choose ComfyUI's nvfp4 file" in message


def test_a_missing_half_of_a_fused_tensor_is_named(tmp_path: Path, mxfp4: Weights):
    original = files.original(mxfp4)
    del original["block.5.attn.qkv.bias"]
    error = refusal(tmp_path, original)
    assert isinstance(error, CheckpointMismatch)
    assert error.missing == ["layers.5.self_attn.qkv.bias"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_dense_experts_in_8_bits_are_refused(tmp_path: Path, mxfp4: Weights, dtype: torch.dtype):
    dense = files.dense(mxfp4, torch.bfloat16)
    dense[f"model.{BANK}"] = dense[f"model.{BANK}"].to(dtype)
    message = str(refusal(tmp_path, dense))
    assert f"stores model.{BANK} as " in message
    assert "expected BF16 or F16 or F32" in message


def test_widths_that_no_block_divides_are_refused(tmp_path: Path, mxfp4: Weights):
    dense = files.comfy_dense(mxfp4, torch.bfloat16)
    dense["embed_tokens.weight"] = dense["embed_tokens.weight"][:, :60]
    assert "experts of 60 by 64 numbers; expected multiples of 32" in str(refusal(tmp_path, dense))


@pytest.mark.parametrize("layout", ["original", "nvfp4", "gguf"])
def test_heads_that_do_not_divide_the_rows_are_no_crash(tmp_path: Path, mxfp4: Weights, layout: str):
    changed = {
        name: torch.zeros(7000, dtype=torch.bfloat16) if name.endswith("sinks") else tensor
        for name, tensor in mxfp4.items()
    }
    path = tmp_path / "x.safetensors"
    if layout == "gguf":
        files.write_gguf(path, changed)
    elif layout == "original":
        files.save(path, files.original(changed))
    else:
        files.save(path, files.comfy_nvfp4(changed, files.rebundled))
    with pytest.raises(CheckpointMismatch, match=r"x\.safetensors does not hold"):
        open_encoder(path)
