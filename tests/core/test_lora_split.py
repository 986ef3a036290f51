"""Adapters of q, k and v apart, joined into one of the fused layer: the weight is that merged by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lens_core.lora import open_lora
from lens_core.lora.delta import merged
from lens_core.lora.file import Matched
from tests import lora_files
from tests.compare import relative_l2
from tests.lora_files import KINDS, SCALE, Adapter

SIZE = (384, 128)
SIZES = {"transformer_blocks.0.attn.img_qkv": SIZE, "transformer_blocks.0.attn.txt_qkv": SIZE}
PART = (128, 128)
# fp32 against fp64: measured 2e-7 at most.
SAME = 1e-5
NAMES = {
    "img_qkv": (("to_q", "to_k", "to_v"), ("img_q", "img_k", "img_v")),
    "txt_qkv": (("add_q_proj", "add_k_proj", "add_v_proj"), ("txt_q", "txt_k", "txt_v")),
}
EVERY = [(layer, names) for layer, spellings in NAMES.items() for names in spellings]
# Of an input-turning OFT and a DoRA by input there is no joined one.
JOINED = [kind for kind in KINDS if kind not in ("OFT of inputs", "DoRA by input")]


def write(path: Path, parts: Mapping[str, Adapter], alphas: Mapping[str, float] | None = None) -> None:
    stored = {
        f"lycoris_transformer_blocks_0_attn_{name}.{key}": tensor.clone()
        for name, part in parts.items()
        for key, tensor in part.tensors.items()
    }
    for name, alpha in (alphas or {}).items():
        stored[f"lycoris_transformer_blocks_0_attn_{name}.alpha"] = torch.tensor(alpha)
    save_file(stored, path)


def by_hand(weight: Tensor, parts: Mapping[int, Adapter], scales: Mapping[int, float]) -> Tensor:
    """q, then k, then v are thirds of the rows."""
    thirds = [third.double() for third in weight.split(PART[0])]
    return torch.cat(
        [
            parts[i].change(third, scales.get(i, 1.0)) if i in parts else third
            for i, third in enumerate(thirds)
        ]
    )


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(SIZE)


def adapters(kind: str, count: int = 3) -> list[Adapter]:
    generator = torch.Generator().manual_seed(5)
    return [KINDS[kind](generator, PART) for _ in range(count)]


def match(path: Path) -> Matched:
    return open_lora(path).match(SIZES)


@pytest.mark.parametrize("kind", JOINED)
@pytest.mark.parametrize(("layer", "names"), EVERY)
def test_three_parts_are_one(tmp_path: Path, weight: Tensor, kind: str, layer: str, names: tuple[str, ...]):
    parts = adapters(kind)
    alphas = {} if kind == "OFT" else dict.fromkeys(names, lora_files.ALPHA)
    write(tmp_path / "x.safetensors", dict(zip(names, parts, strict=True)), alphas)
    lora = match(tmp_path / "x.safetensors")
    assert (list(lora.layers), lora.found, lora.total) == ([f"transformer_blocks.0.attn.{layer}"], 3, 3)
    assert lora.unmatched == []
    got = merged(weight, lora.layers[f"transformer_blocks.0.attn.{layer}"], 1.0)
    want = by_hand(weight, dict(enumerate(parts)), dict.fromkeys(range(3), SCALE))
    assert relative_l2(got, want) < SAME


@pytest.mark.parametrize("kind", [kind for kind in JOINED if not kind.startswith("DoRA")])
@pytest.mark.parametrize("present", [(0, 2), (1,)])
def test_what_lacks_is_not_changed(tmp_path: Path, weight: Tensor, kind: str, present: tuple[int, ...]):
    names = NAMES["img_qkv"][0]
    parts = dict(zip(present, adapters(kind, len(present)), strict=True))
    write(tmp_path / "x.safetensors", {names[i]: part for i, part in parts.items()})
    lora = match(tmp_path / "x.safetensors")
    got = merged(weight, lora.layers["transformer_blocks.0.attn.img_qkv"], 1.0)
    assert relative_l2(got, by_hand(weight, parts, {})) < SAME
    assert lora.total == len(present)


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr"])
def test_each_has_its_alpha(tmp_path: Path, weight: Tensor, kind: str):
    names, parts = NAMES["txt_qkv"][0], adapters(kind)
    write(tmp_path / "x.safetensors", dict(zip(names, parts, strict=True)), {names[0]: 2.0, names[2]: 12.0})
    lora = match(tmp_path / "x.safetensors")
    got = merged(weight, lora.layers["transformer_blocks.0.attn.txt_qkv"], 1.0)
    assert relative_l2(got, by_hand(weight, dict(enumerate(parts)), {0: 0.5, 2: 3.0})) < SAME


def test_parts_of_several_kinds(tmp_path: Path, weight: Tensor):
    names = NAMES["img_qkv"][0]
    parts = [adapters(kind, 1)[0] for kind in ("LoRA", "LoKr", "LoHa")]
    write(tmp_path / "x.safetensors", dict(zip(names, parts, strict=True)))
    lora = match(tmp_path / "x.safetensors")
    assert sorted(lora.kinds) == ["LoHa", "LoKr", "LoRA"]
    got = merged(weight, lora.layers["transformer_blocks.0.attn.img_qkv"], 1.0)
    assert relative_l2(got, by_hand(weight, dict(enumerate(parts)), {})) < SAME


def test_the_rank_stays_the_file_s(tmp_path: Path):
    write(tmp_path / "x.safetensors", dict(zip(NAMES["img_qkv"][0], adapters("LoRA"), strict=True)))
    assert match(tmp_path / "x.safetensors").rank == lora_files.RANK


@pytest.mark.parametrize(
    ("kind", "count"), [("DoRA by input", 3), ("OFT of inputs", 3), ("DoRA by output", 2)]
)
def test_what_cannot_be_joined_is_named(tmp_path: Path, kind: str, count: int):
    names = NAMES["img_qkv"][0][:count]
    write(tmp_path / "x.safetensors", dict(zip(names, adapters(kind, count), strict=True)))
    save_file({**_tensors(tmp_path / "x.safetensors"), **_whole()}, tmp_path / "y.safetensors")
    lora = match(tmp_path / "y.safetensors")
    assert list(lora.layers) == ["transformer_blocks.0.attn.txt_qkv"]
    assert {
        key.split(".")[0].removeprefix("lycoris_transformer_blocks_0_attn_") for key in lora.unmatched
    } == set(names)
    assert (lora.found, lora.total) == (1, count + 1)


def test_the_fused_one_counts_where_both_are(tmp_path: Path):
    write(tmp_path / "x.safetensors", {"add_q_proj": adapters("LoRA", 1)[0]})
    save_file({**_tensors(tmp_path / "x.safetensors"), **_whole()}, tmp_path / "y.safetensors")
    lora = match(tmp_path / "y.safetensors")
    assert lora.layers["transformer_blocks.0.attn.txt_qkv"]["lora_up.weight"].shape == (384, lora_files.RANK)
    assert len(lora.unmatched) == 2


def _tensors(path: Path) -> dict[str, Tensor]:
    checkpoint = open_lora(path).checkpoint
    return {name: checkpoint.read(name).clone() for name in checkpoint.header}


def _whole() -> dict[str, Tensor]:
    """A LoRA of the text's fused layer."""
    key = "diffusion_model.transformer_blocks.0.attn.txt_qkv.lora_{}.weight"
    tensors = lora_files.lora(torch.Generator().manual_seed(1), SIZE).tensors
    return {key.format("A"): tensors["lora_down.weight"], key.format("B"): tensors["lora_up.weight"]}
