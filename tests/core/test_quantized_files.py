"""Files that are quantised already: every layout in circulation is read as what it stands for."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lens_core.config import LENS_TURBO
from lens_core.denoiser import LensDenoiser
from lens_core.loading import load_denoiser, open_denoiser
from lens_core.quant.policy import AUTO, NONE
from lens_core.quantized import QuantizedLinear
from lens_core.weights import variant_of
from lens_core.weights.gguf_linear import TYPES
from tests import denoiser_gguf
from tests import denoiser_quantized as files
from tests.compare import relative_l2
from tests.denoiser_quantized import Written

Write = Callable[[Path], tuple[Path, Written]]


def single(write: Callable[..., Written], **changes: object) -> Write:
    """A writer of a file, in a folder."""

    def run(folder: Path, **more: object) -> tuple[Path, Written]:
        path = folder / "lens.safetensors"
        return path, write(path, **changes, **more)

    return run


def write_gguf(folder: Path, kind: object, prefix: str = "") -> tuple[Path, Written]:
    written = denoiser_gguf.write_denoiser(folder / "lens.gguf", kind, prefix=prefix)  # type: ignore[arg-type]
    layers = [name.removesuffix(".weight") for name, (used, _) in written.items() if used in TYPES]
    return folder / "lens.gguf", Written({name: value for name, (_, value) in written.items()}, layers)


def write_sdnq(folder: Path, **changes: object) -> tuple[Path, Written]:
    return folder / "lens", files.write_sdnq(folder / "lens", **changes)  # type: ignore[arg-type]


LAYOUTS: dict[str, Write] = {
    **{kind: single(files.write_comfy, kind=kind) for kind in files.COMFY},
    "scaled": single(files.write_scaled),
    "scaled e5m2": single(files.write_scaled, dtype=torch.float8_e5m2),
    "scaled, full precision": single(files.write_scaled, mark=2),
    "sdnq": write_sdnq,
    "sdnq in fp32": partial(write_sdnq, scales=torch.float32),
    "sdnq by 32, not flat": partial(write_sdnq, group=32, flat=False),
    **{kind: partial(write_gguf, kind=kind) for kind in TYPES},
}
# Those whose inputs are quantised too or turned.
INEXACT = re.compile(r"float8_e4m3fn|int8|convrot|scaled$")


def loaded(write: Write, folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[LensDenoiser, Written]:
    path, written = write(folder)
    return load_denoiser(path, dtype), written


def layers_of(model: LensDenoiser) -> dict[str, QuantizedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def velocity(model: LensDenoiser) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    config, dtype = model.config, model.img_in.bias.dtype
    latents = torch.randn(1, 12, config.in_channels, generator=generator)
    text = 100 * torch.randn(1, 7, config.num_text_layers, config.enc_hidden_dim, generator=generator)
    return model(latents.to(dtype), torch.tensor([0.7], dtype=dtype), text.to(dtype), (4, 3)).float()


def dense(written: Written, path: Path) -> LensDenoiser:
    """The same numbers, not quantised, in bf16."""
    save_file({name: value.contiguous() for name, value in written.values.items()}, path)
    return load_denoiser(path, torch.bfloat16)


@pytest.fixture(scope="module")
@torch.inference_mode()
def plain() -> Tensor:
    """The velocity in fp32 without quantisation."""
    model = LensDenoiser(files.tiny_config())
    model.load_state_dict(files.tiny_weights())
    return velocity(model)


def error(written: Written) -> float:
    """How far all of a file's matrices are from those that were quantised."""
    weights = files.tiny_weights()
    names = [name for name, weight in weights.items() if weight.ndim == 2]
    got, want = (
        torch.cat([values[name].flatten() for name in names]) for values in (written.values, weights)
    )
    return relative_l2(got, want)


def assert_holds(model: LensDenoiser, written: Written) -> None:
    """Every number is the file's."""
    quantized = layers_of(model)
    assert sorted(quantized) == sorted(written.layers)
    assert quantized, "a comparison of nothing"
    for name, layer in quantized.items():
        assert torch.equal(layer.dequantized(torch.float32), written.values[f"{name}.weight"]), name
    state = model.state_dict()
    for name in written.values.keys() - {f"{layer}.weight" for layer in quantized}:
        assert torch.equal(state[name], written.values[name]), name


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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_stay_as_small_as_in_the_file(layout: str, tmp_path: Path):
    model, written = loaded(LAYOUTS[layout], tmp_path)
    weight = f"{written.layers[0]}.weight"
    packed = written.layers[0]
    held = sum(tensor.nbytes for name, tensor in model.state_dict().items() if name.startswith(f"{packed}."))
    numbers = written.values[weight].numel()
    bits = layers_of(model)[packed].form.bits
    # Scales and zero points: at most 4 bytes for 16 numbers (Q6_K: 8), and a bias.
    assert (
        held
        < numbers * (bits / 8 + (0.5 if layout == "Q6_K" else 0.26)) + 2 * len(written.values[weight]) + 100
    )


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


@pytest.mark.parametrize(
    ("write", "inputs"),
    [
        (single(files.write_comfy, kind="float8_e4m3fn"), "float8"),
        (single(files.write_comfy, kind="int8_tensorwise"), "int8"),
        (single(files.write_comfy, kind="float8_e4m3fn", entry={"full_precision_matrix_mult": True}), None),
        (single(files.write_comfy, kind="int8_tensorwise", entry={"full_precision_matrix_mult": True}), None),
        (
            single(files.write_comfy, kind="float8_e4m3fn", entry={"full_precision_matrix_mult": False}),
            "float8",
        ),
        (single(files.write_scaled, mark=0), "float8"),
        (single(files.write_scaled, mark=1), "float8"),
        (single(files.write_scaled, mark=2), None),
        (single(files.write_scaled, mark=2, prefix="model.diffusion_model."), None),
        (single(files.write_scaled, dtype=torch.float8_e5m2), None),
        (single(files.write_unscaled), None),
    ],
)
def test_the_file_says_whether_inputs_are_quantised(write: Write, inputs: str | None, tmp_path: Path):
    model, _ = loaded(write, tmp_path)
    assert {layer.form.inputs for layer in layers_of(model).values()} == {inputs}


@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
def test_full_precision_is_kept_where_only_a_gpu_quantises_inputs(kind: str, tmp_path: Path):
    write = single(files.write_comfy, kind=kind, entry={"full_precision_matrix_mult": True})
    forms = {layer.form for layer in layers_of(loaded(write, tmp_path)[0]).values()}
    assert [form.full_precision for form in forms] == [True]
    plain = {layer.form for layer in layers_of(loaded(LAYOUTS[kind], tmp_path)[0]).values()}
    assert [form.full_precision for form in plain] == [False]


@pytest.mark.parametrize("write", [LAYOUTS["float8_e4m3fn"], LAYOUTS["scaled"], single(files.write_unscaled)])
def test_a_mode_of_the_same_format_changes_the_inputs_alone(write: Write, tmp_path: Path):
    path, _ = write(tmp_path)
    kept = load_denoiser(path, torch.bfloat16).state_dict()
    for mode, inputs in (("float8_dynamic", "float8"), ("float8_weight_only", None)):
        model = load_denoiser(path, torch.bfloat16, quantization=mode)
        assert {layer.form.inputs for layer in layers_of(model).values()} == {inputs}
        for name, tensor in model.state_dict().items():
            if not name.endswith("comfy_quant"):
                assert torch.equal(bits(tensor), bits(kept[name])), name


def test_a_mode_changes_the_inputs_of_its_own_format_only(tmp_path: Path):
    """Half of the layers in 8-bit integers stay as the file has them."""
    path, other = tmp_path / "lens.safetensors", tmp_path / "other.safetensors"
    files.write_comfy(path, "float8_e4m3fn", which=lambda name: files.in_blocks(name) and "img" in name)
    files.write_comfy(other, "int8_tensorwise", which=lambda name: files.in_blocks(name) and "txt" in name)
    joined, add = load_file(path), load_file(other)
    save_file(
        {name: add.get(name, tensor) for name, tensor in (add | joined).items() if "txt" in name}
        | {name: tensor for name, tensor in joined.items() if "txt" not in name},
        path,
    )
    model = load_denoiser(path, torch.bfloat16, quantization="float8_weight_only")
    inputs = {(layer.form.name, layer.form.inputs) for layer in layers_of(model).values()}
    assert inputs == {("float8_e4m3fn", None), ("int8_tensorwise", "int8")}


def bits(tensor: Tensor) -> Tensor:
    """For comparisons, which 8-bit floats have not."""
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("mode", ["int4_weight_only", "int8_dynamic", "nvfp4"])
@pytest.mark.parametrize(
    ("layout", "called"),
    [("mxfp8", "mxfp8"), ("Q8_0", "Q8_0"), ("scaled", "float8_e4m3fn"), ("float8_e5m2", "float8_e5m2")],
)
def test_a_quantised_file_is_not_quantised_again(
    layout: str, called: str, mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path, written = LAYOUTS[layout](tmp_path)
    with caplog.at_level(logging.INFO):
        model = load_denoiser(path, torch.float32, quantization=mode)
    assert_holds(model, written)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{path.name} is quantised already ({called}")
    assert f"quantization {mode} is for files in bf16 or fp32" in record.getMessage()


@pytest.mark.parametrize("layout", ["sdnq", "float8_e4m3fn", "Q4_K"])
def test_auto_keeps_a_quantised_file(layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path, written = LAYOUTS[layout](tmp_path)
    with caplog.at_level(logging.INFO):
        model = load_denoiser(path, torch.float32, quantization=AUTO)
    assert_holds(model, written)
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.match(r"Quantisation: auto keeps \S+ as it is quantised\.$", line.replace("transformer/", ""))


def test_a_mode_that_a_file_is_in_already_is_nothing_to_speak_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for layout, mode in (("mxfp8", "mxfp8"), ("nvfp4", "nvfp4"), ("sdnq", "uint4_sdnq"), ("mxfp8", NONE)):
        path, written = LAYOUTS[layout](tmp_path / layout / mode if layout == "sdnq" else tmp_path)
        assert_holds(load_denoiser(path, torch.float32, quantization=mode), written)
    assert not caplog.records


@pytest.mark.parametrize(
    ("write", "called"),
    [
        (partial(write_gguf, kind=lambda name: "Q4_0" if "_mod." in name else "Q8_0"), "Q4_0"),
        (partial(write_gguf, kind="Q5_1"), "Q5_1"),
        (single(files.write_comfy, kind="nvfp4", which=files.is_modulation), "nvfp4"),
        (single(files.write_comfy, kind="convrot_w4a4", which=files.is_modulation), "convrot_w4a4"),
        (partial(write_sdnq, which=files.is_modulation), "uint4"),
    ],
)
def test_coarse_modulation_is_warned_of(
    write: Write, called: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path, _ = write(tmp_path)
    with caplog.at_level(logging.INFO, "lens_core"):
        open_denoiser(path)
    (record,) = caplog.records
    assert re.search(
        rf": 6 modulation layers have fewer than 8 bits \(the first is \S+_mod\.1 in {called}\)",
        record.getMessage(),
    )


@pytest.mark.parametrize(
    "write",
    [
        partial(write_gguf, kind=lambda name: "Q8_0" if "_mod." in name else "Q4_0"),
        single(files.write_comfy, kind="mxfp8", which=files.is_modulation),
        single(files.write_comfy, kind="nvfp4"),
        single(files.write_scaled),
        write_sdnq,
    ],
)
def test_finer_modulation_is_not(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path, _ = write(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.INFO, "lens_core"):
        open_denoiser(path)
    assert not caplog.records


@pytest.mark.parametrize(
    ("write", "new"),
    [
        (LAYOUTS["mxfp8"], "lens_turbo_mxfp8.safetensors"),
        (LAYOUTS["Q8_0"], "lens-turbo-Q8_0.gguf"),
        (write_sdnq, "Lens-Turbo-SDNQ-uint4"),
    ],
)
def test_the_variant_is_told_by_the_name(write: Write, new: str, tmp_path: Path):
    path = write(tmp_path)[0].rename(tmp_path / new)
    assert variant_of(path.name, open_denoiser(path).checkpoint.metadata) is LENS_TURBO


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
