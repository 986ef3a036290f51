"""What a graph of quantised blocks is valid for, and what it must keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lens_core.denoiser import BlockGraphs, LensDenoiser
from lens_core.denoiser import graph as module
from lens_core.kernels import scaled_mm
from lens_core.loading import load_denoiser
from lens_core.quant import linear as quant
from lens_core.quant.layer_format import affine4
from lens_core.quantized import QuantizedLinear, quantize_denoiser, replace_linears
from tests.core.graph_cases import install, settled, shared_with


@pytest.fixture
def denoiser(tiny_folder: Path) -> LensDenoiser:
    """Of 8-bit floats, but for a part of one block: 4 bits with zero points."""
    model = load_denoiser(tiny_folder, torch.float32)
    whole = model.blocks[1].attn
    packed = {
        name: quant.quantize(layer.weight, affine4) for name, layer in whole.named_children() if "qkv" in name
    }
    quantize_denoiser(model, "float8_dynamic")
    replace_linears(whole, packed)
    return model


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    return install(monkeypatch)


def test_all_of_a_quantised_weight_is_looked_at(denoiser: LensDenoiser):
    found = {id(weight) for weight in BlockGraphs()._weights(denoiser.blocks)}
    layers = [layer for layer in denoiser.modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == 30
    for layer in layers:
        values, scale, zero = layer.packed()[1:]
        assert {id(values), id(scale)} <= found and (zero is None or id(zero) in found)
    assert sum(layer.packed().zero is not None for layer in layers) == 2


@pytest.mark.parametrize(
    "name",
    [
        "0.attn.txt_qkv.weight",
        "2.img_mlp.w2.weight_scale",
        "1.attn.img_qkv.weight_scale",
        "1.attn.txt_qkv.weight_zero",
        "0.attn.to_out.0.bias",
    ],
)
def test_a_replaced_part_leads_to_a_new_recording(denoiser: LensDenoiser, recording: list, name: str):
    """All others lie where they were."""
    forward = settled(denoiser, BlockGraphs())
    layer = denoiser.get_submodule(f"transformer_blocks.{name.rpartition('.')[0]}")
    attribute = name.rpartition(".")[2]
    before: Any = getattr(layer, attribute)
    other = nn.Parameter(before.clone(), requires_grad=False)  # kept, so that nothing else lies there
    setattr(layer, attribute, other)
    assert [forward() for _ in range(3)] == [{"launched": 1}, {"played": 1, "recorded": 1}, {"played": 1}]
    setattr(layer, attribute, before)
    assert forward() == {"played": 1}
    before.data = before.data.clone()
    assert forward() == {"launched": 1}


class Wrapped(Tensor):
    """Another package's quantised tensor, as comfy-kitchen's: its memory is that of its parts."""

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Wrapped:
        found = Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32, requires_grad=False)
        found.values, found.scale = values, scale
        return found

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> None:
        raise AssertionError("nothing is computed with it")


def test_other_packages_tensors_are_looked_at_part_by_part(denoiser: LensDenoiser):
    graphs, layer = BlockGraphs(), denoiser.blocks[1].img_mlp.w1
    plain = graphs._weights(denoiser.blocks)
    weight = Wrapped(torch.zeros(2, 3), torch.ones(2, 1))
    layer._parameters["weight"] = weight
    found = graphs._weights(denoiser.blocks)
    assert len(found) == len(plain) + 1
    assert sum(x is weight.values or x is weight.scale for x in found) == 2
    first = module._name(found, [torch.zeros(1)], shared_with())
    weight.scale = weight.scale.clone()
    assert first != module._name(graphs._weights(denoiser.blocks), [torch.zeros(1)], shared_with())


def test_what_products_read_beside_the_weights_is_kept(denoiser: LensDenoiser, recording: list):
    """Columns' scales are made of a weight's scale and go with it. A LoRA takes the scale out and puts it
    back as another parameter in the same memory: the graph is valid again, and so must be what it reads."""
    graphs, layer = BlockGraphs(), denoiser.blocks[0].img_mlp.w1
    columns = scaled_mm._column_scale(layer.packed())
    forward = settled(denoiser, graphs)
    address, want = columns.data_ptr(), columns.clone()
    memory = layer.weight_scale.detach()
    layer.weight_scale = nn.Parameter(memory, requires_grad=False)
    del columns
    assert forward() == {"played": 1}
    (recorded,) = graphs._recorded.values()
    ((scale, kept),) = recorded.kept
    assert kept.data_ptr() == address and torch.equal(kept, want)
    assert scale.data_ptr() == memory.data_ptr(), "nor may another scale come to lie there"
