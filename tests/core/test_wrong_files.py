"""Files of other models and broken files: one sentence with what came, what was expected, what to do."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lens_core.errors import CheckpointError
from lens_core.loading import load_denoiser, load_encoder, load_vae

Load = Callable[[Path], Any]
LOADERS: dict[str, Load] = {
    "denoiser": lambda path: load_denoiser(path, torch.bfloat16),
    "encoder": lambda path: load_encoder(path, None),
    "vae": lambda path: load_vae(path, torch.float32),
}
EXPECTED = {
    "denoiser": "a Lens denoiser",
    "encoder": "a GPT-OSS encoder",
    "vae": "a FLUX.2 VAE",
}
# What a file is, and tensor names that such files have.
OTHER_MODELS = {
    "a FLUX denoiser": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"],
    "a FLUX denoiser (diffusers)": [
        "transformer_blocks.0.attn.to_q.weight",
        "single_transformer_blocks.0.attn.to_q.weight",
    ],
    "a Qwen-Image denoiser": ["transformer_blocks.0.attn.add_q_proj.weight", "img_in.weight"],
    "a Stable Diffusion checkpoint": [
        "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    ],
    "a CLIP text encoder": ["text_model.encoder.layers.0.self_attn.q_proj.weight"],
    "a T5 text encoder": ["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"],
    "a language model": ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"],
    "a LoRA": ["lora_unet_transformer_blocks_0_attn_img_qkv.lora_down.weight"],
    "a VAE of another model": ["decoder.conv_in.weight", "encoder.conv_in.weight"],
}
# Every layout of the denoiser: nothing that another component's loader takes.
DENOISERS = {
    "a Lens denoiser quantised by SDNQ": [
        "transformer_blocks.0.attn.img_qkv.weight",
        "transformer_blocks.0.attn.img_qkv.zero_point",
    ],
    "a Lens denoiser quantised for ComfyUI": [
        "transformer_blocks.0.attn.img_qkv.weight",
        "transformer_blocks.0.attn.img_qkv.comfy_quant",
    ],
}
# Every layout of the encoder: nothing that another component's loader takes.
ENCODERS = {
    "a GPT-OSS encoder in MXFP4": ["model.layers.0.mlp.experts.gate_up_proj_blocks"],
    "a GPT-OSS encoder quantised for ComfyUI": ["layers.0.mlp.experts.gate_up_proj.comfy_quant"],
    "a GPT-OSS encoder in bf16": ["model.layers.0.mlp.experts.gate_up_proj"],
    "a GPT-OSS encoder in bf16 for ComfyUI": ["layers.0.mlp.experts.gate_up_proj.weight"],
    "a GPT-OSS encoder in OpenAI's own layout": ["block.0.mlp.mlp1_weight.blocks"],
}


def refusal(load: Load, path: Path) -> str:
    """The sentence of the CheckpointError that loading ends in."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    return str(caught.value)


@pytest.fixture(params=LOADERS)
def component(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_a_file_of_another_model_is_named_as_what_it_is(tmp_path: Path, component: str, kind: str):
    save_file({name: torch.zeros(2, 2) for name in OTHER_MODELS[kind]}, tmp_path / "other.safetensors")
    message = refusal(LOADERS[component], tmp_path / "other.safetensors")
    assert message.startswith(f"other.safetensors is {kind}; expected {EXPECTED[component]}. Choose ")


@pytest.mark.parametrize("component", ["encoder", "vae"], indirect=True)
@pytest.mark.parametrize("kind", DENOISERS)
def test_a_denoiser_in_any_layout_is_named_to_the_other_loaders(tmp_path: Path, component: str, kind: str):
    save_file({name: torch.zeros(2, 2) for name in DENOISERS[kind]}, tmp_path / "other.safetensors")
    message = refusal(LOADERS[component], tmp_path / "other.safetensors")
    assert message.startswith(f"other.safetensors is {kind}; expected {EXPECTED[component]}. Choose ")


@pytest.mark.parametrize("component", ["denoiser", "vae"], indirect=True)
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_in_any_layout_is_named_to_the_other_loaders(tmp_path: Path, component: str, kind: str):
    save_file({name: torch.zeros(2, 2) for name in ENCODERS[kind]}, tmp_path / "other.safetensors")
    message = refusal(LOADERS[component], tmp_path / "other.safetensors")
    assert message.startswith(f"other.safetensors is {kind}; expected {EXPECTED[component]}. Choose ")


def test_every_layout_of_the_encoder_that_is_recognised_is_read():
    from lens_core.weights.encoder_layouts import LAYOUTS
    from lens_core.weights.kind import _LOOKS

    recognised = {look.called for look in _LOOKS if look.component == "encoder"}
    assert recognised | {"a GPT-OSS encoder in GGUF"} == set(LAYOUTS)


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_model.transformer_blocks.0.attn.img_qkv.lora_A.weight",
        "transformer_blocks.0.attn.img_qkv.lora_A.default.weight",
        "lora_unet__transformer_blocks_0_attn_img_qkv.lora_up.weight",
        "transformer.transformer_blocks.0.attn.img_qkv.hada_w1_a",
        "lycoris_transformer_blocks_0_attn_img_qkv.lokr_w1",
    ],
)
def test_every_form_of_a_lora_is_named(tmp_path: Path, name: str):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "style.safetensors")
    assert "style.safetensors is a LoRA" in refusal(LOADERS["denoiser"], tmp_path / "style.safetensors")


def test_lens_own_components_are_not_taken_for_each_other(tiny_models: Path, component: str):
    files = {
        "denoiser": tiny_models / "diffusion_models" / "lens_tiny_bf16.safetensors",
        "encoder": tiny_models / "text_encoders" / "gpt_oss_tiny_mxfp4.safetensors",
        "vae": tiny_models / "vae" / "flux2_tiny_vae.safetensors",
    }
    for other, path in files.items():
        if other != component:
            message = refusal(LOADERS[component], path)
            assert message.startswith(f"{path.name} is {EXPECTED[other]}")
            assert f"; expected {EXPECTED[component]}. Choose " in message


def test_an_unknown_model_is_named_by_a_tensor(tmp_path: Path, component: str):
    save_file({"foo.bar": torch.zeros(1)}, tmp_path / "x.safetensors")
    message = refusal(LOADERS[component], tmp_path / "x.safetensors")
    assert "an unknown kind of model (foo.bar, ...)" in message
    assert f"expected {EXPECTED[component]}" in message


def test_a_file_without_tensors_is_named_so(tmp_path: Path, component: str):
    save_file({}, tmp_path / "x.safetensors")
    assert "x.safetensors is a file without tensors" in refusal(
        LOADERS[component], tmp_path / "x.safetensors"
    )


def write_gguf(path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_legacy(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)


def bytes_of(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 8208457472\n"


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        pytest.param(write_gguf, "a GGUF file", id="gguf"),
        pytest.param(lambda path: torch.save([torch.zeros(3)], path), "a zip archive", id="torch.save"),
        pytest.param(write_legacy, "a Python pickle", id="legacy torch.save"),
        pytest.param(bytes_of(pickle.dumps([1], protocol=4)), "a Python pickle", id="pickle 4"),
        pytest.param(bytes_of(LFS), "a Git LFS pointer", id="lfs"),
        pytest.param(bytes_of(b"<!DOCTYPE html>\n<html></html>\n"), "a web page", id="html"),
        pytest.param(bytes_of(b"<!doctype html>\n<html></html>\n"), "a web page", id="html in lower case"),
        pytest.param(bytes_of(b"<html><head></head></html>\n"), "a web page", id="html without a doctype"),
    ],
)
def test_another_format_is_named_and_the_right_one_too(
    tmp_path: Path, write: Callable[[Path], Any], kind: str, component: str
):
    path = tmp_path / "download.safetensors"
    write(path)
    message = refusal(LOADERS[component], path)
    if write is write_gguf and component != "vae":  # the others may be one, by any name
        assert f"download.safetensors is a GGUF of llama; expected {EXPECTED[component]}. Choose " in message
        return
    assert f"download.safetensors is {kind}" in message
    assert "Expected a .safetensors file; choose another file." in message


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x10\x00", id="two bytes"),
        pytest.param(bytes(4096), id="zeros"),
        pytest.param(bytes(range(256)) * 40, id="garbage"),
        pytest.param((40).to_bytes(8, "little") + b"x" * 100, id="a header that is no JSON"),
        pytest.param((2).to_bytes(8, "little") + b"[]" + b"x" * 100, id="a header of another shape"),
        pytest.param(b'{"error": "Repository not found"}', id="an error message"),
    ],
)
def test_a_broken_file_is_named_with_its_size(tmp_path: Path, component: str, content: bytes):
    (tmp_path / "x.safetensors").write_bytes(content)
    message = refusal(LOADERS[component], tmp_path / "x.safetensors")
    assert "x.safetensors is damaged or no safetensors file" in message
    assert f"({len(content):,} bytes" in message
    assert "Download it again." in message


def test_a_file_cut_in_its_data_is_called_short_with_both_sizes(tiny_models: Path, tmp_path: Path):
    content = (tiny_models / "diffusion_models" / "lens_tiny_bf16.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:-1000])
    message = refusal(LOADERS["denoiser"], tmp_path / "x.safetensors")
    assert "x.safetensors is cut short" in message
    assert f"{len(content) - 1000:,} bytes instead of {len(content):,}" in message
    assert "Download it again." in message


@pytest.mark.parametrize("length", [8, 9, 500])
def test_a_file_cut_in_its_header_is_refused_with_its_size(tiny_models: Path, tmp_path: Path, length: int):
    content = (tiny_models / "diffusion_models" / "lens_tiny_bf16.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:length])
    message = refusal(LOADERS["denoiser"], tmp_path / "x.safetensors")
    assert message.startswith("x.safetensors is ")
    assert re.search(rf"\b{length} bytes", message)
    assert "Download it again." in message


def test_a_path_that_is_not_there_is_named(tmp_path: Path, component: str):
    message = refusal(LOADERS[component], tmp_path / "lens.safetensors")
    assert str(tmp_path / "lens.safetensors") in message
    assert "Check the name" in message


def test_an_empty_folder_says_what_was_expected_in_it(tmp_path: Path, component: str):
    message = refusal(LOADERS[component], tmp_path)
    assert "Expected one .safetensors file, or shards with their .safetensors.index.json" in message
    assert f"in {tmp_path}; found none" in message
    assert "Download the folder again." in message


def test_two_files_without_an_index_are_not_guessed_at(tiny_models: Path, tmp_path: Path):
    source = tiny_models / "diffusion_models" / "lens_tiny_bf16.safetensors"
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(source, tmp_path / name)
    assert "found 2 and no index that joins them" in refusal(LOADERS["denoiser"], tmp_path)


@pytest.fixture
def shards(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny folder's denoiser: two shards and their index."""
    return Path(shutil.copytree(tiny_folder / "transformer", tmp_path / "transformer"))


def test_a_missing_shard_is_named(shards: Path):
    (shards / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    message = refusal(LOADERS["denoiser"], shards)
    assert "missing: diffusion_pytorch_model-00002-of-00002.safetensors." in message
    assert f"in {shards}" in message
    assert "Download the missing files" in message


def test_a_shard_that_is_cut_short_is_named(shards: Path):
    shard = shards / "diffusion_pytorch_model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard.name} is cut short" in refusal(LOADERS["denoiser"], shards)


def test_a_shard_that_holds_another_shards_tensors_is_noticed(shards: Path):
    first, second = sorted(shards.glob("*.safetensors"))
    tensors = load_file(second)
    lost = sorted(set(load_file(second)) - set(load_file(first)))[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, second)
    assert f"Missing (1): {lost}." in refusal(LOADERS["denoiser"], shards)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'{"weight_map": ', id="cut"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xfe\x00", id="no text"),
        pytest.param(b"[1, 2]", id="a list"),
        pytest.param(b'{"weight_map": ["a.safetensors"]}', id="weight_map is a list"),
        pytest.param(b'{"weight_map": null}', id="weight_map is null"),
        pytest.param(b'{"weight_map": {"img_in.weight": 1}}', id="a file that is a number"),
        pytest.param(b"{}", id="no weight_map"),
    ],
)
def test_a_broken_index_is_named(shards: Path, content: bytes):
    index = shards / "diffusion_pytorch_model.safetensors.index.json"
    index.write_bytes(content)
    message = refusal(LOADERS["denoiser"], shards)
    assert index.name in message
    assert str(shards) in message
    assert re.search(r"Download (it again|the missing files)", message)


@pytest.mark.parametrize("config", [{"block_out_channels": [3, 3]}, {"norm_num_groups": "many"}])
def test_a_vae_config_that_makes_no_vae_is_named(
    tiny_folder: Path, tmp_path: Path, config: dict[str, object]
):
    folder = Path(shutil.copytree(tiny_folder / "vae", tmp_path / "vae"))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "config.json" in refusal(LOADERS["vae"], folder)


def test_a_vae_config_that_is_no_json_is_named(tiny_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_folder / "vae", tmp_path / "vae"))
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert f"{folder / 'config.json'} is not readable JSON" in refusal(LOADERS["vae"], folder)
