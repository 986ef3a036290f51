"""The tiny models: reproducible, never overwriting, and readable by transformers and diffusers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lens_core.prompt import PromptTokenizer
from lens_core.tiny import __main__ as command
from lens_core.tiny.layouts import write_everything


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second writing of the session's models, from another global random state."""
    torch.manual_seed(1234)
    folder = tmp_path_factory.mktemp("again")
    write_everything(folder, seed=0)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def shards_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()
    }


def test_one_seed_writes_the_same_bytes(tiny_models: Path, written: Path):
    again = files_of(written)
    assert len(again) > 20
    for name, content in again.items():
        assert (tiny_models / name).read_bytes() == content, name


def test_another_seed_writes_other_weights_and_the_same_names(tmp_path: Path, written: Path):
    write_everything(tmp_path, seed=1)
    one, other = files_of(written), files_of(tmp_path)
    assert one.keys() == other.keys()
    for name in one:
        weights = name.endswith(".safetensors")
        assert (one[name] != other[name]) == weights, name


def test_every_layout_is_written(written: Path):
    names = set(files_of(written))
    for variant in ("Lens-tiny", "Lens-Turbo-tiny"):
        for part in (
            "model_index.json",
            "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
            "text_encoder/model-00003-of-00003.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "tokenizer/tokenizer.json",
            "scheduler/scheduler_config.json",
        ):
            assert f"lens/{variant}/{part}" in names
    assert {name for name in names if not name.startswith("lens/")} == {
        "diffusion_models/lens_tiny_bf16.safetensors",
        "diffusion_models/lens_turbo_tiny_bf16.safetensors",
        "text_encoders/gpt_oss_tiny_mxfp4.safetensors",
        "text_encoders/gpt_oss_tiny_nvfp4.safetensors",
        "vae/flux2_tiny_vae.safetensors",
        "loras/lens_tiny_lora.safetensors",
    }


@pytest.mark.parametrize(
    ("folder", "file"),
    [("Lens-tiny", "lens_tiny_bf16"), ("Lens-Turbo-tiny", "lens_turbo_tiny_bf16")],
)
def test_folder_and_single_file_hold_one_denoiser(tiny_models: Path, folder: str, file: str):
    stored = shards_of(tiny_models / "lens" / folder / "transformer")
    single = load_file(tiny_models / "diffusion_models" / f"{file}.safetensors")
    assert stored.keys() == single.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.bfloat16(), single[name]), name


def test_the_two_variants_have_different_denoisers(tiny_models: Path):
    one, other = (
        load_file(tiny_models / "diffusion_models" / f"{name}_tiny_bf16.safetensors")
        for name in ("lens", "lens_turbo")
    )
    assert not torch.equal(one["proj_out.weight"], other["proj_out.weight"])


def test_folder_and_single_file_hold_one_encoder(tiny_models: Path, tiny_folder: Path):
    stored = shards_of(tiny_folder / "text_encoder")
    single = load_file(tiny_models / "text_encoders" / "gpt_oss_tiny_mxfp4.safetensors")
    text = bytes(single.pop("tokenizer_json").tolist())
    assert text == (tiny_folder / "tokenizer" / "tokenizer.json").read_bytes()
    assert stored.keys() == single.keys()
    assert all(torch.equal(stored[name], single[name]) for name in stored)


def test_the_denoisers_names_and_shapes_are_the_published_ones(tiny_models: Path):
    with safe_open(tiny_models / "diffusion_models" / "lens_tiny_bf16.safetensors", "pt") as file:
        names = set(file.keys())
    # 1264 tensors in 48 blocks, 16 of them outside: 26 in a block.
    assert len(names) == 16 + 26 * 3
    assert {
        "img_in.weight",
        "txt_norm.3.weight",
        "time_text_embed.timestep_embedder.linear_2.bias",
        "norm_out.linear.weight",
        "proj_out.bias",
        "transformer_blocks.2.attn.to_out.0.weight",
        "transformer_blocks.2.attn.to_add_out.bias",
        "transformer_blocks.2.attn.norm_added_q.weight",
        "transformer_blocks.2.img_mod.1.bias",
        "transformer_blocks.2.txt_mlp.w3.weight",
    } <= names


def test_existing_files_are_never_replaced(tmp_path: Path):
    taken = tmp_path / "lens" / "Lens-tiny" / "model_index.json"
    taken.parent.mkdir(parents=True)
    taken.write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="exists already; choose an empty folder"):
        write_everything(tmp_path, seed=0)
    assert files_of(tmp_path) == {"lens/Lens-tiny/model_index.json": b"mine"}


def test_the_command_refuses_a_used_folder_in_one_line(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(sys, "argv", ["lens_core.tiny", str(tiny_models)])
    assert command.main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert str(tiny_models) in captured.err


def test_diffusers_reads_the_vae(tiny_folder: Path):
    from diffusers import AutoencoderKLFlux2

    vae, report = AutoencoderKLFlux2.from_pretrained(tiny_folder / "vae", output_loading_info=True)
    assert not any(report.values()), report
    stored = load_file(tiny_folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in vae.state_dict().items())


def test_diffusers_reads_the_scheduler(tiny_folder: Path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_folder / "scheduler").config
    assert config.use_dynamic_shifting
    assert config.time_shift_type == "exponential"


def test_transformers_reads_the_tokenizer(tiny_folder: Path):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(tiny_folder / "tokenizer")
    text = (tiny_folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    ours = PromptTokenizer.from_json(text)
    prompt = "a red circle of the image, ünïcode"
    assert theirs(prompt, add_special_tokens=False)["input_ids"] == ours.encode(prompt)
    assert theirs.decode(ours.encode(prompt)) == prompt
    assert theirs.eos_token == "<|return|>"


def test_transformers_reads_the_encoders_config(tiny_folder: Path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_folder / "text_encoder")
    assert config.model_type == "gpt_oss"
    assert config.num_hidden_layers == 24
    assert config.layer_types[:2] == ["sliding_attention", "full_attention"]
