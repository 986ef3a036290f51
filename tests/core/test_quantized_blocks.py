"""Blocks whose linears are quantised, each stream's in its own way or all alike: against the same model with
the weights that these stand for, and what is quantised how often."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens_core.config import DenoiserConfig
from lens_core.denoiser import DenoiserRun, LensDenoiser, transformer
from lens_core.denoiser.block import Shared
from lens_core.kernels import EAGER_BLOCK, EAGER_LINEAR
from lens_core.quant import linear as quant
from lens_core.quant import policy
from lens_core.quant.layer_format import LayerFormat, affine4, float8, int8
from lens_core.quantized import QuantizedLinear, form_of, linear_sizes, quantize_denoiser, replace_linears
from lens_core.tiny.models import DENOISER, random_weights
from tests.compare import relative_l2

# As small, but all widths (192 and 512) have whole groups of every format.
EVEN = replace(DENOISER, num_attention_heads=3)
FLOAT, INTEGER = float8.dynamic(True), int8.dynamic(True)
TURNED = LayerFormat("int8_tensorwise", 8, rotation=64)
TURNED_INPUTS = TURNED.dynamic(True)
TURNED_16 = LayerFormat("int8_tensorwise", 8, rotation=16, inputs="int8")
# fp32 rounds by 6e-8; here sums go in another order, in 3 blocks of a dozen products. Measured: 3e-7.
FP32 = 2e-6
# Half a step of each input is 0.7 % and 2.6 % of a layer's inputs, and about as much of its outputs; a part
# of that in the result, since the updates of three blocks are added to a stream that has no error. Measured:
# 3e-3 to 8e-3, and 1.1e-2 to 1.4e-2.
INPUTS = {"int8": (1e-3, 1.2e-2), "float8": (1e-3, 2.5e-2)}


def denoiser(config: DenoiserConfig = EVEN) -> LensDenoiser:
    """In fp32, always the same."""
    model = LensDenoiser(config)
    model.load_state_dict(random_weights(model, torch.Generator().manual_seed(3)))
    return model.eval().requires_grad_(False)


def inputs(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Of 15 image tokens; the pictures differ in noise and text."""
    sigma = torch.tensor([0.6, 0.3])[:batch]
    return torch.randn(batch, 15, 128), sigma, torch.randn(batch, tokens, 4, 64), (5, 3)


def quantized(model: LensDenoiser) -> dict[str, QuantizedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


class InFull(nn.Module):
    """A linear with the weight that a quantised one stands for."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.weight, self.bias = layer.dequantized(torch.float32), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class ByItself(nn.Module):
    """A quantised linear that no norm and no other layer knows of: it turns and quantises its own inputs."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.packed, self.bias = layer.packed(), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        form, values, scale, _ = self.packed
        x = quant.rotate(x, form.rotation)
        if form.inputs is None:
            return F.linear(x, quant.unpack(self.packed, x.dtype), self.bias)
        rows = quant.quantize_rows(x, form.inputs)
        out = F.linear(rows.values.float(), values.float()) * rows.scale * scale.reshape(-1)
        return out if self.bias is None else out + self.bias


def with_layers(model: LensDenoiser, made: Callable[[QuantizedLinear], nn.Module]) -> LensDenoiser:
    """The same model with others in the places of its quantised linears."""
    other = copy.deepcopy(model)
    for name, layer in quantized(other).items():
        other.set_submodule(name, made(layer))
    return other


def with_forms(forms: Mapping[str, LayerFormat | None], rest: LayerFormat | None = INTEGER) -> LensDenoiser:
    """A denoiser whose layers are quantised by what their names hold, the others as ``rest``."""
    model = denoiser()
    packed = {}
    for name in linear_sizes(model):
        found = [form for part, form in forms.items() if part in name] or [rest]
        if policy.is_quantized(name) and found[0] is not None:
            packed[name] = quant.quantize(model.get_submodule(name).weight, found[0])
    replace_linears(model, packed)
    return model


MIXED: dict[str, dict[str, LayerFormat | None]] = {
    "image in floats, text in integers": {"img_": FLOAT, "to_out": FLOAT},
    "text in floats, image in integers": {"txt_": FLOAT, "to_add_out": FLOAT},
    "one layer as it was": {"0.attn.img_qkv": None, "1.txt_mlp.w3": None, "2.img_mlp.w1": None},
    "the text as it was": {"txt_": None, "to_add_out": None},
    "one layer turned": {"0.attn.txt_qkv": TURNED_INPUTS, "1.img_mlp.w1": TURNED_16, "1.img_mlp.w2": TURNED},
    "the image turned": {"img_": TURNED_16, "to_out": TURNED_INPUTS},
    "all turned": {"": TURNED_INPUTS},
    "some weight-only": {
        "0.attn.txt_qkv": int8,
        "1.img_mlp.w3": int8,
        "txt_mlp.w2": affine4,
        "to_out": float8,
    },
    "blocks of their own": {"blocks.0": FLOAT, "blocks.1": affine4, "blocks.2": None},
    "w1 and w3 apart": {"w1": FLOAT, "w3": TURNED_16},
}


def kinds(model: LensDenoiser) -> set[str]:
    return {layer.form.inputs for layer in quantized(model).values() if layer.form.inputs is not None}


def check(model: LensDenoiser, tokens: int, batch: int) -> None:
    """Equal to the model that its weights stand for, but for what quantises the inputs; and with that too,
    to one that is quantised layer by layer (the same numbers in the same order: else one rounded to the
    other side would turn more in the blocks behind)."""
    arguments = inputs(tokens, batch)
    got, exact = model(*arguments), with_layers(model, InFull)(*arguments)
    assert got.shape == exact.shape and got.isfinite().all()
    found = kinds(model)
    low, high = (0, FP32) if not found else max(INPUTS[kind] for kind in found)
    assert low <= relative_l2(got, exact) < high
    if found:
        assert relative_l2(got, with_layers(model, ByItself)(*arguments)) < FP32


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [0, 1, 9, 30])
@pytest.mark.parametrize("mode", policy.MODES)
def test_every_mode(mode: str, tokens: int, batch: int):
    """Without a text, with less and with more of it than of the image."""
    model = denoiser()
    quantize_denoiser(model, mode)
    layers = quantized(model)
    assert len(layers) == 3 * 10 and {layer.form for layer in layers.values()} == {policy.MODES[mode].form}
    check(model, tokens, batch)


@pytest.mark.parametrize("mode", ["float8_dynamic", "int8_dynamic", "float8_weight_only", "int8_weight_only"])
@pytest.mark.parametrize("tokens", [0, 9])
def test_widths_that_kernels_do_not_take(mode: str, tokens: int):
    """The tiny denoiser's own: w2 has 341 inputs."""
    model = denoiser(DENOISER)
    quantize_denoiser(model, mode)
    check(model, tokens, 2)


@pytest.mark.parametrize("tokens", [0, 9, 15])
@pytest.mark.parametrize("what", MIXED)
def test_mixed_formats(what: str, tokens: int):
    check(with_forms(MIXED[what]), tokens, 2)


def shared_of(model: LensDenoiser, tokens: int = 4) -> Shared:
    img, txt = torch.randn(1, 15, model.config.hidden_size), torch.randn(1, tokens, model.config.hidden_size)
    return model.shared(img, txt, (5, 3), None, None, DenoiserRun())


def test_the_kind_is_what_all_layers_agree_on():
    forms = {"float": FLOAT, "integer": INTEGER, "weight": int8, "affine": affine4, "turned": TURNED_INPUTS}
    layers: dict[str, nn.Module] = {"plain": nn.Linear(64, 32)}
    for name, form in forms.items():
        packed = quant.quantize(torch.randn(32, 64), form)
        layers[name] = QuantizedLinear(packed, None, 64, 32)
        layers[f"other {name}"] = copy.deepcopy(layers[name])
    kind = shared_of(denoiser()).kind
    for name, form in forms.items():
        want = form.inputs if name in ("float", "integer") else None
        alike = [layers[name], layers[f"other {name}"]]
        assert kind(alike[0]) == kind(*alike) == kind(*alike, *alike) == want, name
        for other in (layer for key, layer in layers.items() if name not in key):
            for mixed in ([*alike, other], [other, *alike], [alike[0], other, alike[1]]):
                assert kind(*mixed) is None, name
    assert kind(layers["plain"]) is None and kind(layers["plain"], layers["plain"]) is None


def test_the_kernels_have_a_say_in_the_kind():
    asked: list[Any] = []

    def why_not(form: LayerFormat, size: tuple[int, int]) -> str | None:
        asked.append((form, size))
        return "341 inputs" if size[1] == 341 else None

    shared = shared_of(denoiser())
    shared = replace(shared, linears=replace(shared.linears, why_not=why_not))
    wide, odd = (
        QuantizedLinear(quant.quantize(torch.randn(32, columns), INTEGER), None, columns, 32)
        for columns in (64, 341)
    )
    assert shared.kind(wide) == "int8" and shared.kind(odd) is None
    assert asked == [(INTEGER, (32, 64)), (INTEGER, (32, 341))], "by outputs and inputs"


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, int]]:
    """The definitions; -> which of them ran for which kind and how many streams, in order."""
    calls: list[tuple[str, str | None, int]] = []

    def noting(name: str, run: Callable[..., Any], kind_at: int | None = None) -> Callable[..., Any]:
        def noted(streams: Sequence[Any], *rest: Any) -> Any:
            kind = name if kind_at is None else rest[kind_at] if len(rest) > kind_at else None
            calls.append((name, kind, len(streams)))
            return run(streams, *rest)

        return noted

    block = replace(
        EAGER_BLOCK,
        add_modulate=noting("norm", EAGER_BLOCK.add_modulate, 2),
        swiglu=noting("gate", EAGER_BLOCK.swiglu, 1),
    )
    linears = replace(
        EAGER_LINEAR,
        quantize_rows=noting("rows", EAGER_LINEAR.quantize_rows, 0),
        unpack=noting("unpack", EAGER_LINEAR.unpack),
        multiply={kind: noting(kind, run) for kind, run in EAGER_LINEAR.multiply.items()},
    )
    monkeypatch.setattr(transformer, "choose_block", lambda *_: block)
    monkeypatch.setattr(transformer, "choose_linear", lambda *_: linears)
    return calls


def usual(kind: str, streams: int, last: bool) -> list[tuple[str, str | None, int]]:
    """A block all of whose layers are quantised to ``kind``: inputs once for each place, by what makes them
    where that is a kernel of ours."""
    out = 1 if last else streams
    product = (kind, kind)
    return [
        *(("norm", kind, streams), (*product, streams)),
        *(("rows", kind, out), (*product, out)),
        *(("norm", kind, out), (*product, out), (*product, out)),
        *(("gate", kind, out), (*product, out)),
    ]


@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_inputs_are_quantised_once(kind: str, tokens: int, noted: list):
    """For w1 and w3 together, and image and text in one call."""
    model = denoiser()
    quantize_denoiser(model, f"{kind}_dynamic")
    model(*inputs(tokens))
    streams = 2 if tokens else 1
    blocks = [usual(kind, streams, last) for last in (False, False, True)]
    assert noted == [*blocks[0], *blocks[1], *blocks[2], ("norm", None, 1)]


def test_inputs_of_unlike_layers_are_quantised_by_these(noted: list):
    """What a norm quantised would be wrong for the other."""
    model = with_forms({"w3": None, "txt_mlp.w2": FLOAT, "attn.txt_qkv": FLOAT})
    model(*inputs(4))
    alone = [("rows", "int8", 1), ("int8", "int8", 1)], [("rows", "float8", 1), ("float8", "float8", 1)]
    both = [("rows", "int8", 2), ("int8", "int8", 2)]
    block = [
        *(("norm", None, 2), *alone[0], *alone[1]),
        *both,
        *(("norm", None, 2), *both),
        *(("gate", None, 2), *alone[0], *alone[1]),
    ]
    assert noted[: 2 * len(block)] == 2 * block


def test_weight_only_layers_unpack_image_and_text_at_once(noted: list):
    model = denoiser()
    quantize_denoiser(model, "int4_weight_only")
    model(*inputs(4))
    unpack = ("unpack", "unpack", 2)
    block = [("norm", None, 2), unpack, unpack, ("norm", None, 2), unpack, unpack, ("gate", None, 2), unpack]
    assert noted[: 2 * len(block)] == 2 * block


def test_layers_that_are_not_at_hand_are_asked_themselves():
    """A caller whose weights come when they are used: all layers of a step, quantised or not."""
    model = with_forms({"txt_mlp.w1": None})
    shared = shared_of(model)
    mlps = model.blocks[0].img_mlp, model.blocks[0].txt_mlp
    streams = [torch.randn(2, count, 192) for count in (5, 3)]
    away = replace(shared, packed_of=lambda layer, _: None)
    for name in ("w1", "w3"):
        layers = [getattr(mlp, name) for mlp in mlps]
        got, want = away.apply(layers, streams), [layer(x) for layer, x in zip(layers, streams, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        here = shared.apply(layers, streams)
        assert all(torch.equal(a, b) for a, b in zip(here, want, strict=True))
    rows = [quant.quantize_rows(x, "int8") for x in streams]
    layers = [mlp.w3 for mlp in mlps]
    got = away.apply(layers, rows)
    assert all(torch.equal(a, layer(x)) for a, layer, x in zip(got, layers, rows, strict=True))
    assert len(shared.apply(layers, streams[:1])) == len(away.apply(layers, streams[:1])) == 1
    assert form_of(mlps[1].w1) is None
