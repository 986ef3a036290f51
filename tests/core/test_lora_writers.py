"""Files that the real packages write, against what these packages compute."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from lycoris import LycorisNetwork, create_lycoris
from torch import Tensor, nn

from lens_core.loading import load_denoiser
from lens_core.lora import open_lora
from lens_core.lora.delta import merged
from lens_core.quantized import linear_sizes
from tests.compare import relative_l2

# In fp32 on both sides: measured 3e-7 at most.
SAME = 1e-5
TARGETS = ["img_qkv", "to_out.0", "img_mlp.w1"]


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> nn.Module:
    return load_denoiser(tiny_folder, torch.float32)


def randomise(module: nn.Module, pattern: str) -> None:
    """Adapters begin without effect."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        if pattern in name and parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator) + (
                parameter.data if "magnitude" in name or "dora_scale" in name else 0
            )


def assert_same(path: Path, base: nn.Module, want: dict[str, Tensor]) -> None:
    """Every linear's weight with the file is the one wanted."""
    sizes = linear_sizes(base)
    lora = open_lora(path).match(sizes)
    assert lora.unmatched == []
    changed = {name for name in sizes if relative_l2(base.get_submodule(name).weight, want[name]) > 1e-3}
    assert changed and changed <= set(lora.layers), "layers that the package changed"
    for name in lora.layers:
        weight = base.get_submodule(name).weight
        assert relative_l2(merged(weight, lora.layers[name], 1.0), want[name]) < SAME, name


def _linears(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).weight.detach().clone() for name in linear_sizes(model)}


PEFT = {
    "LoRA": peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    "rsLoRA, patterns": peft.LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=TARGETS,
        rank_pattern={"img_mlp.w1": 2},
        alpha_pattern={"to_out.0": 3},
    ),
    "DoRA": peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=TARGETS),
    "LoHa": peft.LoHaConfig(r=4, alpha=8, target_modules=TARGETS),
    "LoKr": peft.LoKrConfig(r=4, alpha=8, target_modules=TARGETS),
    "LoKr, both whole": peft.LoKrConfig(r=64, alpha=32, target_modules=TARGETS),
    "OFT": peft.OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS),
    "OFT, exact": peft.OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=False, target_modules=TARGETS),
    "OFT, shared block": peft.OFTConfig(r=0, oft_block_size=8, block_share=True, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", PEFT)
def test_peft(base: nn.Module, tmp_path: Path, kind: str):
    with torch.inference_mode(False):
        model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(PEFT[kind]))
        pattern = {"Lo": "lora_", "rs": "lora_", "Do": "lora_", "OF": "oft_"}[kind[:2]]
        randomise(model, {"LoHa": "hada_"}.get(kind, "lokr_" if kind.startswith("LoKr") else pattern))
        model.save_pretrained(tmp_path / "peft")
        want = _linears(model.merge_and_unload())
    assert_same(tmp_path / "peft", base, want)


def test_diffusers(base: nn.Module, tmp_path: Path):
    """Its way to write a LoRA that peft has trained, with all that is known of it in the metadata."""
    config = PEFT["rsLoRA, patterns"]
    with torch.inference_mode(False):
        model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
        randomise(model, "lora_")
        state = peft.get_peft_model_state_dict(model)
        layers = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
        settings = model.peft_config["default"].to_dict()
        LoraBaseMixin._save_lora_weights(
            save_directory=tmp_path,
            lora_layers={"transformer": layers},
            lora_metadata={"transformer": settings},
            is_main_process=True,
            weight_name="x.safetensors",
            save_function=None,
            safe_serialization=True,
        )
        want = _linears(model.merge_and_unload())
    assert "transformer.lora_alpha" in json.loads(
        open_lora(tmp_path / "x.safetensors").checkpoint.metadata["lora_adapter_metadata"]
    )
    assert_same(tmp_path / "x.safetensors", base, want)


def _weight_of(layer: nn.Module) -> Tensor:
    """What a linear multiplies by, whatever its forward has become."""
    one = torch.eye(layer.in_features)
    return (layer(one) - layer(torch.zeros_like(one))).T


LYCORIS: dict[str, dict[str, Any]] = {
    "LoCon": {"algo": "locon"},
    "LoHa": {"algo": "loha"},
    "LoKr": {"algo": "lokr", "factor": 4},
    "LoKr, full": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "LoKr, both decomposed": {"algo": "lokr", "factor": 8, "decompose_both": True},
    "DoRA": {"algo": "locon", "dora_wd": True},
    "DoRA by input": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
    "LoHa with DoRA": {"algo": "loha", "dora_wd": True},
    "Diag-OFT": {"algo": "diag-oft"},
    "Diag-OFT, rescaled": {"algo": "diag-oft", "rescaled": True},
    "Diag-OFT, constrained": {"algo": "diag-oft", "constraint": 1e-3},
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris(base: nn.Module, tmp_path: Path, kind: str):
    with torch.inference_mode(False):
        model = copy.deepcopy(base).requires_grad_(True)
        LycorisNetwork.apply_preset({"target_name": ["transformer_blocks.*"], "target_module": []})
        network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2, **LYCORIS[kind])
        network.apply_to()
        randomise(network, "")
        network.save_weights(str(tmp_path / "x.safetensors"), None, {})
        # As it trains: its merge_to takes the scale of LoHa and LoKr twice.
        with torch.no_grad():
            want = {name: _weight_of(model.get_submodule(name)) for name in linear_sizes(base)}
    assert_same(tmp_path / "x.safetensors", base, want)
