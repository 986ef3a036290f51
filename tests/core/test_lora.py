"""LoRA files of every spelling and kind: the output is that of weights merged by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lens_core.denoiser_file import DenoiserFile
from lens_core.loading import build_denoiser, open_denoiser
from lens_core.lora import open_lora
from lens_core.lora.delta import merged
from lens_core.lora.merge import Choice, open_loras
from tests import lora_files
from tests.compare import relative_l2
from tests.core.denoiser_layouts import velocity
from tests.lora_files import KINDS, PREFIXES, RANK, SCALE, SPELLINGS

# Weights merged in fp32 against fp64 and then rounded: measured 3e-7 at most.
SAME = 1e-5
QKV, MLP = "transformer_blocks.0.attn.img_qkv", "transformer_blocks.1.txt_mlp.w1"
# One of each shape, names with numbers and underscores, and layers outside the blocks.
LAYERS = (QKV, "transformer_blocks.1.attn.to_out.0", MLP, "transformer_blocks.2.img_mlp.w2",
          "transformer_blocks.1.img_mod.1", "time_text_embed.timestep_embedder.linear_1", "norm_out.linear",
          "img_in")  # fmt: skip


@pytest.fixture(scope="module")
def file(tiny_folder: Path) -> DenoiserFile:
    return open_denoiser(tiny_folder)


@pytest.fixture(scope="module")
def weights(file: DenoiserFile) -> dict[str, Tensor]:
    return build_denoiser(file, torch.float32).state_dict()


@pytest.fixture(scope="module")
def by_hand(file: DenoiserFile, weights: dict[str, Tensor]) -> Callable[..., Tensor]:
    """The output with weights changed by hand."""
    model = build_denoiser(file, torch.float32)

    def run(changes: Mapping[str, Callable[[Tensor], Tensor]], strength: float = 1.0) -> Tensor:
        state = dict(weights)
        for layer, change in changes.items():
            weight = weights[f"{layer}.weight"].double()
            state[f"{layer}.weight"] = (weight + strength * (change(weight) - weight)).float()
        model.load_state_dict(state)
        return velocity(model)

    return run


def output(file: DenoiserFile, *loras: Path, strength: float = 1.0) -> Tensor:
    merge = open_loras([Choice(path, strength) for path in loras], file.sizes)
    return velocity(build_denoiser(file, torch.float32, loras=merge))


def assert_same_weights(
    layers: Mapping[str, dict[str, Tensor]],
    changes: Mapping[str, Callable[[Tensor], Tensor]],
    weights: Mapping[str, Tensor],
) -> None:
    assert sorted(layers) == sorted(changes)
    for name, change in changes.items():
        weight = weights[f"{name}.weight"]
        want = change(weight.double())
        assert relative_l2(merged(weight, layers[name], 1.0), want) < SAME, name
        assert relative_l2(weight, want) > 0.01, "the adapter does nothing"


OUTPUTS = [(spelling, "LoRA") for spelling in SPELLINGS]
OUTPUTS += [("OneTrainer", kind) for kind in KINDS if kind != "LoRA"]


@pytest.mark.parametrize(("spelling", "kind"), OUTPUTS)
def test_output_is_that_of_merged_weights(
    file: DenoiserFile, by_hand: Callable[..., Tensor], tmp_path: Path, spelling: str, kind: str
):
    path = tmp_path / "x.safetensors"
    changes = lora_files.write(path, file.sizes, kind, spelling, which=LAYERS)
    want = by_hand(changes, 0.7)
    assert relative_l2(output(file, path, strength=0.7), want) < SAME
    assert relative_l2(by_hand({}), want) > 0.01, "the adapter does nothing"


@pytest.mark.parametrize("spelling", PREFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_spelling(
    file: DenoiserFile, weights: dict[str, Tensor], tmp_path: Path, spelling: str, kind: str
):
    changes = lora_files.write(tmp_path / "x.safetensors", file.sizes, kind, spelling, which=LAYERS)
    lora = open_lora(tmp_path / "x.safetensors").match(file.sizes)
    assert (lora.unmatched, lora.total, lora.found) == ([], len(LAYERS), len(LAYERS))
    assert_same_weights(lora.layers, changes, weights)


def test_all_linears_have_their_place(file: DenoiserFile, tmp_path: Path):
    """Underscores for dots too: names have both."""
    for spelling in ("sd-scripts", "ComfyUI"):
        lora_files.write(tmp_path / "x.safetensors", file.sizes, "LoRA", spelling)
        lora = open_lora(tmp_path / "x.safetensors").match(file.sizes)
        assert (sorted(lora.layers), lora.unmatched) == (sorted(file.sizes), [])
        assert (
            lora.summary(0.8) == f"matched {len(file.sizes)} of {len(file.sizes)}, strength 0.8, rank {RANK}"
        )


def test_several_add_up(file: DenoiserFile, by_hand: Callable[..., Tensor], tmp_path: Path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    first = lora_files.write(paths[0], file.sizes, which=LAYERS)
    second = lora_files.write(paths[1], file.sizes, "LoHa", "LyCORIS", which=LAYERS[:2], seed=1)
    both = dict(first) | {name: lambda w, a=first[name], b=second[name]: b(a(w)) for name in second}
    assert relative_l2(output(file, *paths), by_hand(both)) < SAME


def test_strength_0_changes_no_bit(file: DenoiserFile, by_hand: Callable[..., Tensor], tmp_path: Path):
    lora_files.write(tmp_path / "x.safetensors", file.sizes, which=LAYERS)
    assert torch.equal(output(file, tmp_path / "x.safetensors", strength=0.0), by_hand({}))


def test_a_change_of_a_bias(file: DenoiserFile, weights: dict[str, Tensor], tmp_path: Path):
    change = torch.arange(384.0)
    stored = {f"lycoris_{QKV.replace('.', '_')}.diff_b": change, f"{MLP}.diff_b": torch.ones(341)}
    save_file(stored, tmp_path / "x.safetensors")
    merge = open_loras([Choice(tmp_path / "x.safetensors", 0.5)], file.sizes)
    ((lora, _),) = merge.loras
    assert (lora.unmatched, lora.kinds) == ([f"{MLP}.diff_b"], ["biases"]), "MLPs have no bias"
    state = build_denoiser(file, torch.float32, loras=merge).state_dict()
    assert torch.equal(state[f"{QKV}.bias"], weights[f"{QKV}.bias"] + 0.5 * change)
    assert torch.equal(state[f"{QKV}.weight"], weights[f"{QKV}.weight"])


_UP, _DOWN = torch.ones(384, RANK), torch.ones(RANK, 128)
PEFT_KEYS = {f"{QKV}.lora_A.weight": _DOWN, f"{QKV}.lora_B.weight": _UP}
SD_KEYS = {f"{QKV}.lora_down.weight": _DOWN, f"{QKV}.lora_up.weight": _UP}


@pytest.mark.parametrize(
    ("tensors", "metadata", "scale"),
    [
        (PEFT_KEYS, {}, 1),
        (PEFT_KEYS, {"alpha": "8", "rank": "4"}, 2),
        (PEFT_KEYS, {"lora_alpha": "8"}, 2),
        (PEFT_KEYS, lora_files.adapter_config(lora_alpha=8), 2),
        (PEFT_KEYS, lora_files.adapter_config(lora_alpha=8, use_rslora=True), 4),
        (PEFT_KEYS, lora_files.adapter_config("transformer.", use_rslora=True), 1),
        (PEFT_KEYS, lora_files.adapter_config(alpha_pattern={"txt_qkv": 8, "attn.img_qkv": 16}), 4),
        (PEFT_KEYS, lora_files.adapter_config(alpha_pattern={rf"^{QKV}$".replace(".", r"\."): 8}), 2),
        (PEFT_KEYS, lora_files.adapter_config(alpha_pattern={"qkv": 16}), SCALE),
        (PEFT_KEYS, {"adapter_config": '{"lora_alpha": 12}'}, 3),
        # musubi's convert_lora.py has this alpha in the weights already.
        (PEFT_KEYS, {"ss_network_alpha": "8", "ss_network_dim": "4"}, 1),
        (SD_KEYS, {"ss_network_alpha": "8", "ss_network_dim": "4"}, 2),
        (SD_KEYS, {"ss_network_alpha": "None"}, 1),
        ({**SD_KEYS, f"{QKV}.alpha": torch.tensor(2)}, {"alpha": "8"}, SCALE),
        ({**SD_KEYS, f"{QKV}.alpha": torch.tensor([2.0], dtype=torch.bfloat16)}, {}, SCALE),
        (PEFT_KEYS, {"alpha": "a lot", "lora_alpha": "NaN", "lora_adapter_metadata": "[" * 100_000}, 1),
    ],
)  # fmt: skip
def test_alpha(
    file: DenoiserFile, tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], scale: float
):
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    lora = open_lora(tmp_path / "x.safetensors").match(file.sizes)
    change = merged(torch.zeros(384, 128), lora.layers[QKV], 1.0)
    assert torch.equal(change, torch.full((384, 128), scale * RANK))


def test_a_folder_with_peft_s_config(file: DenoiserFile, tmp_path: Path):
    save_file(PEFT_KEYS, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": RANK}), encoding="utf-8")
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert open_lora(path).match(file.sizes).layers[QKV]["alpha"] == 8
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "other.safetensors")
    layer = open_lora(tmp_path / "other.safetensors").match(file.sizes).layers[QKV]
    assert "alpha" not in layer, "a config counts for PEFT's own file alone"


def test_low_precision_tensors_are_not_widened(file: DenoiserFile, tmp_path: Path):
    lora_files.write(tmp_path / "x.safetensors", file.sizes, which=LAYERS, dtype=torch.bfloat16)
    layers = open_lora(tmp_path / "x.safetensors").match(file.sizes).layers
    assert {tensor.dtype for layer in layers.values() for tensor in layer.values()} == {torch.bfloat16}


def test_half_a_match_says_what_did_not(file: DenoiserFile, tmp_path: Path):
    more = {
        "diffusion_model.transformer_blocks.7.attn.img_qkv.lora_A.weight": _DOWN,  # there are three blocks
        "lora_te_layers_0.lora_down.weight": _DOWN,
        f"diffusion_model.{MLP}.lora_A.weight": _DOWN,  # without its other half
        "diffusion_model.nothing": _DOWN,
    }
    lora_files.write(tmp_path / "x.safetensors", file.sizes, which=[QKV], more=more)
    lora = open_lora(tmp_path / "x.safetensors").match(file.sizes)
    assert sorted(lora.unmatched) == sorted(more)
    summary = lora.summary(1.0)
    assert summary.startswith(f"matched 1 of 4, strength 1, rank {RANK}, not matched (4 keys): ")
    assert summary.endswith(" and 1 more")


def test_ranks_and_kinds_are_told(file: DenoiserFile, tmp_path: Path):
    more = {f"{MLP}.lora_A.weight": torch.ones(2, 128), f"{MLP}.lora_B.weight": torch.ones(341, 2)}
    lora_files.write(tmp_path / "x.safetensors", file.sizes, "DoRA by output", which=[QKV], more=more)
    lora = open_lora(tmp_path / "x.safetensors").match(file.sizes)
    assert (lora.rank, sorted(lora.ranks), sorted(lora.kinds)) == (RANK, [2, RANK], ["DoRA", "LoRA"])
    assert "ranks 2 to 4" in lora.summary(1.0)


def test_a_matrix_as_a_convolution_is_a_matrix(
    file: DenoiserFile, weights: dict[str, Tensor], tmp_path: Path
):
    """Some programs write a linear's as that of a 1 x 1 convolution."""
    flat = lora_files.lora(torch.Generator().manual_seed(0), file.sizes[QKV])
    tensors = {f"{QKV}.{name}": tensor[:, :, None, None] for name, tensor in flat.tensors.items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "x.safetensors")
    lora = open_lora(tmp_path / "x.safetensors").match(file.sizes)
    assert all(tensor.ndim == 2 for tensor in lora.layers[QKV].values())
    assert_same_weights(lora.layers, {QKV: lambda w: flat.change(w, 1.0)}, weights)
