"""Files that are quantised already: every layout in circulation is read as what it stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lens_core.denoiser import LensDenoiser
from lens_core.loading import load_denoiser, open_denoiser
from tests import denoiser_quantized as files
from tests.compare import relative_l2
from tests.core.denoiser_layouts import (
    LAYOUTS,
    assert_holds,
    dense,
    error,
    layers_of,
    loaded,
    single,
    velocity,
    write_gguf,
)
from tests.denoiser_quantized import Written

# Those whose inputs are quantised too or turned.
INEXACT = re.compile(r"float8_e4m3fn|int8|convrot|scaled$")


@pytest.fixture(scope="module")
@torch.inference_mode()
def plain() -> Tensor:
    """The velocity in fp32 without quantisation."""
    model = LensDenoiser(files.tiny_config())
    model.load_state_dict(files.tiny_weights())
    return velocity(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_is_the_files(layout: str, tmp_path: Path):
    assert_holds(*loaded(LAYOUTS[layout], tmp_path, torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_velocity_is_as_near_as_the_weights(layout: str, tmp_path: Path, plain: Tensor):
    model, written = loaded(LAYOUTS[layout], tmp_path, torch.float32)
    # A product is as far off as its weight, and the residual stream carries most past it: 0.5 to 1 times the
    # weights' own error. What goes in at the ends and by the modulation meets everything: up to 2.6 times.
    assert 0.3 < relative_l2(velocity(model), plain) / error(written) < 3.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_velocity_is_that_of_the_same_numbers_in_bf16(layout: str, tmp_path: Path):
    model, written = loaded(LAYOUTS[layout], tmp_path)
    apart = relative_l2(velocity(model), velocity(dense(written, tmp_path / "dense.safetensors")))
    if INEXACT.search(layout):
        # Measured: 0.015 with inputs in 8-bit floats (2 % off each), at most 0.008 otherwise.
        assert 0 < apart < 0.025
    else:
        assert apart == 0, "weights alone are unpacked to the same bf16 numbers"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_saved_is_read_again(layout: str, tmp_path: Path):
    model, _ = loaded(LAYOUTS[layout], tmp_path)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "again")
    again = load_denoiser(tmp_path / "again", torch.bfloat16)
    forms = {name: layer.form for name, layer in layers_of(model).items()}
    assert {name: layer.form for name, layer in layers_of(again).items()} == forms
    assert torch.equal(velocity(again), velocity(model))


# Bytes held for a byte of the file: zero points that GGUF does not store, 5 and 6 bits in 8, and scales of
# K-quants, of which 6 bits become fp32.
GROWTH = {"Q4_0": 20 / 18, "Q5_0": 36 / 22, "Q5_1": 36 / 24, "Q8_0": 36 / 34}
GROWTH |= {"Q4_K": 192 / 144, "Q5_K": 320 / 176, "Q6_K": 384 / 210}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_stay_as_small_as_in_the_file(layout: str, tmp_path: Path):
    path, written = LAYOUTS[layout](tmp_path)
    header, state = open_denoiser(path).checkpoint.header, load_denoiser(path, torch.float32).state_dict()

    def of(names: Iterable[str], layer: str) -> list[str]:
        own = [name for name in names if name.startswith(f"{layer}.")]
        return [name for name in own if not name.endswith((".bias", ".comfy_quant", ".scale_input"))]

    for layer in written.layers:
        stored = sum(header[name].nbytes for name in of(header, layer))
        held = sum(state[name].nbytes for name in of(state, layer))
        kind = header[f"{layer}.weight"].dtype
        assert held == pytest.approx(GROWTH.get(kind, 1) * stored), layer


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer."])
@pytest.mark.parametrize(
    "write",
    [
        pytest.param(single(files.write_comfy, kind="mxfp8"), id="comfy"),
        pytest.param(single(files.write_comfy, kind="nvfp4", in_metadata=True), id="metadata"),
        pytest.param(single(files.write_scaled, mark=2), id="scaled"),
        pytest.param(partial(write_gguf, kind="Q4_1"), id="gguf"),
    ],
)
def test_a_prefix_changes_nothing(write: Callable[..., tuple[Path, Written]], prefix: str, tmp_path: Path):
    assert_holds(*loaded(partial(write, prefix=prefix), tmp_path, torch.float32))


@pytest.mark.parametrize("kind", files.COMFY)
def test_formats_may_be_told_in_the_metadata(kind: str, tmp_path: Path):
    beside, _ = loaded(single(files.write_comfy, kind=kind), tmp_path)
    model, written = loaded(single(files.write_comfy, kind=kind, in_metadata=True), tmp_path)
    assert {name: layer.form for name, layer in layers_of(model).items()} == {
        name: layer.form for name, layer in layers_of(beside).items()
    }
    assert sorted(layers_of(model)) == sorted(written.layers)
    assert torch.equal(velocity(model), velocity(beside))


def test_scales_of_inputs_are_left_in_the_file(tmp_path: Path):
    want, _ = loaded(single(files.write_comfy, kind="float8_e4m3fn"), tmp_path)
    model, _ = loaded(single(files.write_comfy, kind="float8_e4m3fn", input_scale=True), tmp_path)
    assert model.state_dict().keys() == want.state_dict().keys()
    assert torch.equal(velocity(model), velocity(want)), "inputs get their own scales, a token at a time"


@pytest.mark.parametrize(("kind", "dtype"), [("mxfp8", torch.float8_e8m0fnu), ("nvfp4", torch.float8_e4m3fn)])
def test_scales_of_groups_may_be_called_bytes(kind: str, dtype: torch.dtype, tmp_path: Path):
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            assert tensors[name].dtype == dtype
            tensors[name] = tensors[name].view(torch.uint8)

    write = single(files.write_comfy, kind=kind, change=change)
    assert_holds(*loaded(write, tmp_path, torch.float32))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8_tensorwise"])
def test_one_scale_may_have_any_shape(kind: str, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path):
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[name] = tensors[name].to(dtype).view(shape)

    model, _ = loaded(single(files.write_comfy, kind=kind, change=change), tmp_path)
    stored = load_file(tmp_path / "lens.safetensors")
    for name, layer in layers_of(model).items():
        want = stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"].float()
        assert torch.equal(layer.dequantized(torch.float32), want)
    assert velocity(model).isfinite().all()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", ["int8 by row", "int8 turned", "convrot_w4a4"])
def test_scales_of_rows_may_be_flat(kind: str, flat: bool, tmp_path: Path):
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[name] = tensors[name].view(-1) if flat else tensors[name].view(-1, 1)

    assert_holds(*loaded(single(files.write_comfy, kind=kind, change=change), tmp_path, torch.float32))


def test_a_rotation_of_unsaid_size_is_256(tmp_path: Path):
    """Of the tiny denoiser's inputs only those of the time embedding are 256."""
    layer = "time_text_embed.timestep_embedder.linear_1"

    def change(tensors: dict[str, Tensor]) -> None:
        said = b'{"format": "int8_tensorwise", "convrot": true}'
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)

    turned = files.COMFY["int8 turned"]
    arguments = {**turned.arguments, "convrot_groupsize": 256}
    tensors, value = files.quantize_comfy(
        files.tiny_weights()[f"{layer}.weight"], files.Comfy(turned.entry, turned.layout, arguments=arguments)
    )

    def put(stored: dict[str, Tensor]) -> None:
        stored |= {f"{layer}.{name}": tensor for name, tensor in tensors.items()}
        change(stored)

    model, _ = loaded(
        single(files.write_comfy, kind="int8 turned", which=lambda name: name == layer, change=put),
        tmp_path,
        torch.float32,
    )
    assert torch.equal(layers_of(model)[layer].dequantized(torch.float32), value)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", "convrot_w4a4", "int8_tensorwise", "float8_e4m3fn"])
def test_every_linear_may_be_quantised(kind: str, tmp_path: Path, plain: Tensor):
    """Those at the ends too, from which the model's sizes are read otherwise."""
    write = single(files.write_comfy, kind=kind, which=lambda layer: True)
    model, written = loaded(write, tmp_path, torch.float32)
    ends = {"img_in", "txt_in", "proj_out", "norm_out.linear"}
    assert ends <= set(written.layers) == set(layers_of(model))
    assert model.config == files.tiny_config()
    assert 0.3 < relative_l2(velocity(model), plain) / error(written) < 3.5, "as above"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_8_bit_floats_without_scales_stay_8_bits(dtype: torch.dtype, prefix: str, tmp_path: Path):
    model, written = loaded(single(files.write_unscaled, dtype=dtype, prefix=prefix), tmp_path)
    quantized = layers_of(model)
    assert sorted(quantized) == [
        name.removesuffix(".weight")
        for name, weight in sorted(written.values.items())
        if weight.ndim == 2 and files.in_blocks(name.removesuffix(".weight"))
    ]
    for name, layer in quantized.items():
        assert layer.weight.dtype == dtype
        assert layer.weight_scale.dtype == torch.float32 and layer.weight_scale == 1
        assert torch.equal(layer.weight.float(), written.values[f"{name}.weight"])
    others = {name: tensor for name, tensor in model.state_dict().items() if name in written.values}
    for name, tensor in others.items():
        if name.removesuffix(".weight") not in quantized:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor.float(), written.values[name])
    assert torch.equal(velocity(model), velocity(dense(written, tmp_path / "dense.safetensors")))
