"""LoRAs of other models, damaged ones and what is no LoRA: each is one sentence."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lens_core.errors import CheckpointError
from lens_core.lora import open_lora
from tests.lora_files import RANK

QKV, MLP = "transformer_blocks.0.attn.img_qkv", "transformer_blocks.0.img_mlp.w1"
SIZES = {QKV: (384, 128), MLP: (341, 128)}


def pair(layer: str, rows: int = 384, columns: int = 128, rank: int = RANK) -> dict[str, Tensor]:
    return {
        f"{layer}.lora_down.weight": torch.ones(rank, columns),
        f"{layer}.lora_up.weight": torch.ones(rows, rank),
    }


def refused(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    save_file(tensors, path / "style.safetensors", metadata)
    with pytest.raises(CheckpointError) as caught:
        open_lora(path / "style.safetensors").match(SIZES)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize(
    ("layer", "model"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "FLUX"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "FLUX"),
        ("transformer.transformer_blocks.0.attn.add_q_proj", "Qwen-Image"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "Stable Diffusion"),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv", "Stable Diffusion 3"),
        ("diffusion_model.blocks.0.cross_attn.k", "Wan"),
        ("diffusion_model.layers.0.attention.to_q", "Z-Image"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "a text encoder"),
        ("diffusion_model.something.else", "another model"),
    ],
)
def test_another_model_s(tmp_path: Path, layer: str, model: str):
    message = refused(tmp_path, pair(layer))
    assert message.startswith(f"style.safetensors is a LoRA for {model} (its keys are such as {layer}.lora_")
    assert "expected one for Lens, whose keys" in message


@pytest.mark.parametrize("layer", [QKV, "transformer_blocks.0.attn.to_q", f"lycoris_{MLP.replace('.', '_')}"])
def test_the_same_names_at_other_sizes(tmp_path: Path, layer: str):
    """Qwen-Image has some of Lens' names."""
    message = refused(tmp_path, pair(layer, 3072, 3072))
    assert "is a LoRA for another model" in message and "[3072, 3072]" in message
    assert "expected one for Lens" in message


def test_a_checkpoint_is_no_lora(tmp_path: Path):
    assert "is a Lens denoiser, no LoRA" in refused(tmp_path, {f"{QKV}.weight": torch.ones(384, 128)})
    assert "is a file without tensors, no LoRA" in refused(tmp_path, {}, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{QKV}.alpha": torch.tensor(float("nan"))}, "NaN), in alpha of"),
        ({f"{QKV}.lora_up.weight": torch.full((384, RANK), torch.inf)}, "infinite numbers"),
        ({f"{QKV}.alpha": torch.ones(2)}, "with 2 numbers; expected [1]"),
        ({f"{QKV}.dora_scale": torch.ones(5, 1)}, "with 5 numbers; expected [128, 384]"),
        ({f"{QKV}.diff_b": torch.ones(128)}, "with 128 numbers; expected [384]"),
        (
            {f"{QKV}.lora_up.weight": torch.ones(384, RANK, dtype=torch.int8)},
            "as I8; expected floating-point",
        ),
        ({f"lora_unet_{QKV.replace('.', '_')}.lora_up.weight": torch.ones(384, RANK)}, "twice"),
    ],
)
def test_damaged(tmp_path: Path, change: dict[str, Tensor], said: str):
    assert said in refused(tmp_path, {**pair(QKV), **change})


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{QKV}.lora_up.weight": torch.ones(384, RANK)},
        pair(QKV, rank=0),
        {**pair(QKV), f"{QKV}.lora_up.weight": torch.ones(384, RANK + 1)},
        {**pair(QKV), f"{QKV}.lora_mid.weight": torch.ones(2, 2)},
        {f"{QKV}.lora_up.weight": torch.ones(384), f"{QKV}.lora_down.weight": torch.ones(128)},
        {f"{QKV}.lora_up.weight": torch.ones(384, 4, 3, 3), f"{QKV}.lora_down.weight": torch.ones(4, 128)},
        {f"{QKV}.hada_w1_a": torch.ones(384, 4), f"{QKV}.hada_w1_b": torch.ones(4, 128)},
        {f"{QKV}.lokr_w1": torch.ones(4, 4), f"{QKV}.lokr_w2_a": torch.ones(96, 4)},
        {f"{QKV}.oft_blocks": torch.ones(96, 4, 3)},
        {f"{QKV}.oft_blocks": torch.ones(0, 4, 4)},
        {f"{QKV}.oft_R.weight": torch.ones(16, 27)},
        {f"{QKV}.alpha": torch.ones(())},
        {f"{QKV}.dora_scale": torch.ones(384, 1)},
    ],
)
def test_half_of_an_adapter_is_named_and_not_used(tmp_path: Path, tensors: dict[str, Tensor]):
    save_file({**tensors, **pair(MLP, 341)}, tmp_path / "x.safetensors")
    lora = open_lora(tmp_path / "x.safetensors").match(SIZES)
    assert list(lora.layers) == [MLP]
    assert sorted(lora.unmatched) == sorted(tensors)
    assert (lora.found, lora.total) == (1, 2)


def test_pickles_are_refused(tmp_path: Path):
    with (tmp_path / "x.safetensors").open("wb") as file:
        pickle.dump({"a": 1}, file)
    with pytest.raises(CheckpointError, match="Python pickle"):
        open_lora(tmp_path / "x.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match="zip archive"):
        open_lora(tmp_path / "y.pt")


def test_hostile_headers_take_no_time(tmp_path: Path):
    """Keys as long as the reader lets through, and patterns without end: these must not be tried for ever."""
    keys = [f"{'lora_' * 85}{QKV}.lora_A.weight", f"{'.' * 490}alpha"]
    endless = json.dumps({"lora_alpha": 8, "alpha_pattern": {"(a+)+$" * 10: 2, "a" * 1000: 3}})
    tensors = {**pair(QKV), **{key: torch.ones(1) for key in keys}}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": endless})
    lora = open_lora(tmp_path / "x.safetensors").match(SIZES)
    assert sorted(lora.unmatched) == sorted(keys)
    assert lora.layers[QKV]["alpha"] == 8
    assert len(lora.summary(1.0)) < 1000


def test_a_file_of_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lens_core.lora.file._MOST_TENSORS", 3)
    save_file({str(i): torch.zeros(0) for i in range(4)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="4 tensors, more than any LoRA"):
        open_lora(tmp_path / "x.safetensors")
