"""What a quantised file and the choice of a mode say together of inputs, and what is told of such a file."""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lens_core.config import LENS_TURBO
from lens_core.loading import load_denoiser, open_denoiser
from lens_core.quant import kitchen
from lens_core.quant.layer_format import from_entry
from lens_core.quant.policy import AUTO, NONE
from lens_core.weights import variant_of
from tests import denoiser_quantized as files
from tests.core.denoiser_layouts import (
    LAYOUTS,
    Write,
    assert_holds,
    layers_of,
    loaded,
    single,
    write_gguf,
    write_sdnq,
)


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
    exact = loaded(write, tmp_path, torch.float32)
    assert_holds(*exact)
    forms = {layer.form for layer in layers_of(exact[0]).values()}
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
    [
        ("mxfp8", "mxfp8"),
        ("Q8_0", "Q8_0"),
        ("Q4_K", "Q4_K, Q8_0"),
        ("scaled", "float8_e4m3fn"),
        ("float8_e5m2", "float8_e5m2"),
    ],
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


@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
def test_inputs_are_quantised_where_the_gpu_multiplies_them_and_the_file_lets_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
):
    form, gpu = from_entry({"format": kind}, "layer"), torch.device("cuda")
    exact = from_entry({"format": kind, "full_precision_matrix_mult": True}, "layer")
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, there in (((10, 0), True), ((12, 0), True), ((9, 0), False), ((8, 9), False)):
        monkeypatch.setattr(kitchen, "_capability", lambda _, found=capability: found)
        assert kitchen.multiplies(form, gpu) is there
        assert not kitchen.multiplies(exact, gpu)
    assert not kitchen.multiplies(form, torch.device("cpu"))
