"""Quantised files that are broken or of another kind: a sentence with the file, the layer and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lens_core.errors import CheckpointError
from lens_core.loading import load_denoiser
from tests import denoiser_gguf
from tests import denoiser_quantized as files

LAYER = "transformer_blocks.1.attn.img_qkv"
Change = Callable[[dict[str, Tensor]], Any]


def refusal(path: Path) -> str:
    """The CheckpointError that loading ends in: it names the file and says what to do."""
    with pytest.raises(CheckpointError) as caught:
        load_denoiser(path, torch.bfloat16)
    message = str(caught.value)
    assert re.search(r"\b(?:Choose|choose|Download|download)\b", message)
    assert "Traceback" not in message and "\n" not in message
    return message


def comfy(path: Path, kind: str, change: Change) -> str:
    """What is said of the layer of a file in a format of ComfyUI's, once it is changed."""
    files.write_comfy(path / "lens.safetensors", kind, change=change)
    message = refusal(path / "lens.safetensors")
    assert "lens.safetensors" in message and LAYER in message
    return message


def said(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        *((kind, "weight_scale") for kind in files.COMFY),
        ("nvfp4", "weight_scale_2"),
        ("mxfp8", "weight"),
    ],
)
def test_a_missing_tensor_is_named(kind: str, lost: str, tmp_path: Path):
    message = comfy(tmp_path, kind, lambda tensors: tensors.pop(f"{LAYER}.{lost}"))
    name = files.COMFY[kind].entry["format"]
    assert message == (
        f"lens.safetensors has no {LAYER}.{lost}, without which a weight in {name} cannot be read. Download "
        "it again."
    )


@pytest.mark.parametrize(
    ("kind", "tensor", "dtype"),
    [
        ("mxfp8", "weight", torch.bfloat16),
        ("mxfp8", "weight", torch.uint8),
        ("mxfp8", "weight_scale", torch.float32),
        ("nvfp4", "weight", torch.float8_e4m3fn),
        ("nvfp4", "weight_scale", torch.bfloat16),
        ("nvfp4", "weight_scale_2", torch.uint8),
        ("float8_e4m3fn", "weight", torch.float8_e5m2),
        ("float8_e4m3fn", "weight_scale", torch.int32),
        ("float8_e5m2", "weight", torch.float8_e4m3fn),
        ("int8_tensorwise", "weight", torch.uint8),
        ("convrot_w4a4", "weight", torch.float16),
        ("convrot_w4a4", "weight_scale", torch.float8_e4m3fn),
        ("nvfp4", "comfy_quant", torch.int32),
    ],
)
def test_a_tensor_of_another_dtype_is_named(kind: str, tensor: str, dtype: torch.dtype, tmp_path: Path):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.{tensor}"] = tensors[f"{LAYER}.{tensor}"].float().to(dtype)

    message = comfy(tmp_path, kind, change)
    assert re.search(rf"stores {re.escape(LAYER)}\.{tensor} as \w+; expected \w+", message)


@pytest.mark.parametrize(
    ("kind", "tensor", "shape"),
    [
        ("mxfp8", "weight", (384, 64)),
        ("mxfp8", "weight_scale", (384, 8)),
        ("mxfp8", "weight_scale", (384 * 4,)),
        ("nvfp4", "weight", (384, 128)),
        ("nvfp4", "weight_scale", (384, 4)),
        ("nvfp4", "weight_scale_2", (384,)),
        ("float8_e4m3fn", "weight", (128, 384)),
        ("float8_e4m3fn", "weight_scale", (3, 1)),
        ("int8_tensorwise", "weight_scale", (1, 384)),
        ("int8 by row", "weight_scale", (383, 1)),
        ("convrot_w4a4", "weight", (384, 128)),
        ("convrot_w4a4", "weight_scale", (384, 2)),
    ],
)
def test_a_tensor_of_another_shape_is_named(kind: str, tensor: str, shape: tuple[int, ...], tmp_path: Path):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.{tensor}"] = torch.zeros(shape, dtype=tensors[f"{LAYER}.{tensor}"].dtype)

    message = comfy(tmp_path, kind, change)
    listed = re.escape(str(list(shape)))
    assert re.search(rf"Wrong shape \(1\): {re.escape(LAYER)}\.{tensor} should be .*, is {listed}\.", message)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("mxfp8", "says by its comfy_quant that it is quantised, but not how"),
        ("", "says by its comfy_quant that it is quantised, but not how"),
        ('{"format": "mxfp8"', "says by its comfy_quant that it is quantised, but not how"),
        ('["mxfp8"]', "says by its comfy_quant that it is quantised, but not how"),
        ('{"kind": "mxfp8"}', r"but not how \(KeyError: 'format'\)"),
        ('{"format": ["mxfp8"]}', "but not how"),
        ('{"format": null}', "but not how"),
        ('{"format": "int3"}', r"is quantised as 'int3'; this version reads float8_e4m3fn, .*lens_affine\."),
        ('{"format": "svdquant_w4a4"}', "is quantised as 'svdquant_w4a4'; this version reads "),
        ('{"format": "convrot_w4a4", "convrot_groupsize": 48}', "48, which is no power of 4"),
        ('{"format": "convrot_w4a4", "convrot_groupsize": "many"}', "but not how"),
        ('{"format": "convrot_w4a4", "convrot_groupsize": 0}', "0, which is no power of 4"),
        ('{"format": "lens_affine"}', r"but not how \(KeyError: 'bits'\)"),
        ('{"format": "lens_affine", "bits": 3, "group_size": 64}', "3 bits in groups of 64"),
        ('{"format": "lens_affine", "bits": 4, "group_size": 0}', "4 bits in groups of 0"),
    ],
)
def test_what_comfy_quant_says_must_be_clear(text: str, why: str, tmp_path: Path):
    message = comfy(tmp_path, "mxfp8", lambda tensors: tensors.update({f"{LAYER}.comfy_quant": said(text)}))
    assert message.startswith(f"The layer {LAYER} of lens.safetensors ")
    assert re.search(why, message)


def test_bytes_that_are_no_text_are_no_format(tmp_path: Path):
    raw = torch.tensor([0xFF, 0xFE, 0x00], dtype=torch.uint8)
    message = comfy(tmp_path, "mxfp8", lambda tensors: tensors.update({f"{LAYER}.comfy_quant": raw}))
    assert "says by its comfy_quant that it is quantised, but not how" in message


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ('{"format": "convrot_w4a4"}', 256),
        ('{"format": "int8_tensorwise", "convrot": true}', 256),
        ('{"format": "lens_affine", "bits": 4, "group_size": 48}', 48),
    ],
)
def test_groups_that_do_not_divide_the_inputs_are_named(text: str, group: int, tmp_path: Path):
    message = comfy(tmp_path, "mxfp8", lambda tensors: tensors.update({f"{LAYER}.comfy_quant": said(text)}))
    assert f"with groups of {group}, which do not divide its 128 inputs" in message


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"layers": 3}', '{"layers": ["img_in"]}', '{"layers": {"img_in": 3}}']
)
def test_metadata_that_tell_of_no_format_are_refused(text: str, tmp_path: Path):
    tensors = {name: tensor.bfloat16() for name, tensor in files.tiny_weights().items()}
    save_file(tensors, tmp_path / "lens.safetensors", {"_quantization_metadata": text})
    message = refusal(tmp_path / "lens.safetensors")
    assert "lens.safetensors" in message and "that it is quantised, but not how" in message


def test_smoothed_inputs_are_refused(tmp_path: Path):
    """A product of inputs that are not multiplied as they should be would be wrong without a word."""
    message = comfy(
        tmp_path, "nvfp4", lambda tensors: tensors.update({f"{LAYER}.pre_quant_scale": torch.ones(128)})
    )
    assert "multiplied by a pre_quant_scale, which this version does not do" in message


@pytest.mark.parametrize("in_metadata", [False, True])
def test_a_layer_that_lens_has_not_is_named(in_metadata: bool, tmp_path: Path):
    def change(tensors: dict[str, Tensor]) -> None:
        odd = {name: tensor for name, tensor in tensors.items() if name.startswith(LAYER)}
        tensors |= {name.replace(LAYER, "text_model.fc1"): tensor.clone() for name, tensor in odd.items()}

    path = tmp_path / "lens.safetensors"
    files.write_comfy(path, "mxfp8", change=change)
    message = refusal(path)
    assert message == (
        "lens.safetensors has a quantised layer text_model.fc1, which Lens has not. Choose a file made for "
        "Lens."
    )


def test_a_layer_beyond_the_last_in_the_metadata_is_named(tmp_path: Path):
    tensors = {name: tensor.bfloat16() for name, tensor in files.tiny_weights().items()}
    text = json.dumps({"layers": {"model.diffusion_model.final.1": {"format": "mxfp8"}}})
    save_file(tensors, tmp_path / "lens.safetensors", {"_quantization_metadata": text})
    assert "a quantised layer final.1, which Lens has not" in refusal(tmp_path / "lens.safetensors")


def test_a_quantised_flux_is_a_flux(tmp_path: Path):
    form = files.COMFY["nvfp4"]
    tensors, _ = files.quantize_comfy(torch.randn(64, 64), form)
    tensors["comfy_quant"] = said(json.dumps(form.entry))
    name = "double_blocks.0.img_attn.qkv"
    stored = {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}
    save_file(stored, tmp_path / "flux.safetensors")
    message = refusal(tmp_path / "flux.safetensors")
    assert message.startswith("flux.safetensors is a FLUX denoiser; expected a Lens denoiser. Choose ")


def test_a_flux_in_gguf_is_one_of_flux(tmp_path: Path):
    weights = {"double_blocks.0.img_attn.qkv.weight": torch.randn(64, 64)}
    denoiser_gguf.write_denoiser(tmp_path / "flux.gguf", "Q8_0", weights, architecture="flux")
    message = refusal(tmp_path / "flux.gguf")
    assert message.startswith("flux.gguf is a GGUF of flux; expected a Lens denoiser. Choose ")


@pytest.mark.parametrize("cut", [1, 1000, 500_000])
def test_a_gguf_that_is_cut_short_is_named_with_both_sizes(cut: int, tmp_path: Path):
    denoiser_gguf.write_denoiser(tmp_path / "lens.gguf", "Q8_0")
    content = (tmp_path / "lens.gguf").read_bytes()
    (tmp_path / "lens.gguf").write_bytes(content[:-cut])
    message = refusal(tmp_path / "lens.gguf")
    assert re.match(rf"lens\.gguf is cut short: {len(content) - cut:,} bytes instead of [\d,]+\.", message)


def test_a_gguf_that_is_cut_in_its_header_is_damaged(tmp_path: Path):
    denoiser_gguf.write_denoiser(tmp_path / "lens.gguf", "Q8_0")
    (tmp_path / "lens.gguf").write_bytes((tmp_path / "lens.gguf").read_bytes()[:700])
    assert refusal(tmp_path / "lens.gguf").startswith("lens.gguf is cut short or damaged: its GGUF header")


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q6_K"])
def test_a_gguf_of_another_size_is_of_another_shape(kind: str, tmp_path: Path):
    weights = denoiser_gguf.tiny_weights()
    weights[f"{LAYER}.weight"] = torch.randn(384, 256)
    denoiser_gguf.write_denoiser(tmp_path / "lens.gguf", kind, weights)
    message = refusal(tmp_path / "lens.gguf")
    assert f"Wrong shape (1): {LAYER}.weight should be [384, 128], is [384, 256]." in message


def test_a_scale_that_is_no_number_is_damage(tmp_path: Path):
    """Fully read only while it is loaded, and the layer is named even then."""
    denoiser_gguf.write_denoiser(tmp_path / "lens.gguf", "Q8_0")
    from lens_core.weights.gguf import GgufCheckpoint

    info = GgufCheckpoint(tmp_path / "lens.gguf").header[f"{LAYER}.weight"]
    content = bytearray((tmp_path / "lens.gguf").read_bytes())
    content[info.offset + 34 : info.offset + 36] = b"\x00\x7c"  # infinity, in the second block
    (tmp_path / "lens.gguf").write_bytes(content)
    message = refusal(tmp_path / "lens.gguf")
    assert message.startswith(
        f"lens.gguf is damaged: the weight of {LAYER}, in Q8_0, has scales that are no "
    )


def sdnq(folder: Path, change: Change = lambda tensors: None, **config: Any) -> str:
    """What is said of a changed folder of SDNQ's."""
    files.write_sdnq(folder / "lens", change=change, config=config)
    message = refusal(folder / "lens")
    assert "diffusion_pytorch_model.safetensors" in message
    return message


def other_sdnq(kind: str) -> Change:
    """The layer as SDNQ writes it with other settings."""

    def change(tensors: dict[str, Tensor]) -> None:
        rows, columns = 384, 128
        drop = kind.startswith(("int", "float", "codebook"))
        if drop:
            del tensors[f"{LAYER}.zero_point"]
        shapes: dict[str, Tensor] = {
            "int8": torch.zeros(rows, 1, columns, dtype=torch.int8),
            "int4": torch.zeros(rows * columns // 2, dtype=torch.uint8),
            "uint8": torch.zeros(rows, 2, 64, dtype=torch.uint8),
            "uint2": torch.zeros(rows * columns // 4, dtype=torch.uint8),
            "uint3": torch.zeros(rows * columns // 8, 3, dtype=torch.uint8),
            "uint16": torch.zeros(rows, 2, 64, dtype=torch.int16),
            "float8_e4m3fn": torch.zeros(rows, columns, dtype=torch.float8_e4m3fn),
            "codebook": torch.zeros(rows * columns // 2, dtype=torch.uint8),
        }
        tensors[f"{LAYER}.weight"] = shapes[kind]

    return change


@pytest.mark.parametrize(
    "kind", ["int8", "int4", "uint8", "uint2", "uint3", "uint16", "float8_e4m3fn", "codebook"]
)
def test_other_kinds_of_sdnq_are_named(kind: str, tmp_path: Path):
    message = sdnq(tmp_path, other_sdnq(kind), weights_dtype=kind)
    assert (
        f"has {LAYER} quantised by SDNQ as {kind} {'(' if kind[0] == 'u' else 'without zero points'}"
        in message
    )
    assert "this version reads SDNQ's uint4 with a scale and a zero point for each group" in message


@pytest.mark.parametrize(
    "name", ["svd_up", "svd_down", "scale_2", "scale_zero_point", "zero_point_scale", "zero_point_2"]
)
def test_what_sdnq_adds_to_a_weight_is_named(name: str, tmp_path: Path):
    message = sdnq(tmp_path, lambda tensors: tensors.update({f"{LAYER}.{name}": torch.zeros(2, 2)}))
    assert f"has {LAYER} quantised by SDNQ with a {name};" in message


@pytest.mark.parametrize("where", ["use_hadamard", "modules_quant_config"])
def test_weights_that_sdnq_has_turned_are_refused(where: str, tmp_path: Path):
    """Nothing in the tensors tells them from others: they would load, and draw noise."""
    config = {"use_hadamard": True} if where == "use_hadamard" else {where: {LAYER: {"use_hadamard": True}}}
    message = sdnq(tmp_path, **config)
    assert "quantised by SDNQ turned by a Hadamard matrix;" in message


def test_other_settings_of_sdnq_are_no_matter(tmp_path: Path):
    settings = {"modules_quant_config": None, "svd_rank": 32, "use_quantized_matmul": True}
    files.write_sdnq(tmp_path / "lens", config=settings)
    load_denoiser(tmp_path / "lens", torch.bfloat16)


@pytest.mark.parametrize(
    ("tensor", "made", "says"),
    [
        ("scale", torch.zeros(384, 3, 1), "with scales [384, 3, 1] and zero points [384, 2, 1]"),
        ("scale", torch.zeros(()), "with scales [] and zero points [384, 2, 1]"),
        ("scale", torch.zeros(383, 2, 1), "with scales [383, 2, 1]"),
        ("zero_point", torch.zeros(384, 1, 1), "and zero points [384, 1, 1]"),
        ("scale", torch.zeros(384, 2, 1, dtype=torch.uint8), "with scales in U8 and zero points in BF16"),
        ("weight", torch.zeros(384, 63, dtype=torch.uint8), "as uint4 (U8 [384, 63])"),
        ("weight", torch.zeros(384, 128), "as uint4 (F32 [384, 128])"),
    ],
)
def test_odd_tensors_of_sdnq_are_named(tensor: str, made: Tensor, says: str, tmp_path: Path):
    message = sdnq(tmp_path, lambda tensors: tensors.update({f"{LAYER}.{tensor}": made}))
    assert f"has {LAYER} quantised by SDNQ" in message and says in message


@pytest.mark.parametrize("lost", ["scale", "weight"])
def test_a_missing_tensor_of_sdnq_is_named(lost: str, tmp_path: Path):
    message = sdnq(tmp_path, lambda tensors: tensors.pop(f"{LAYER}.{lost}"))
    assert f"has no {LAYER}.{lost}, without which a weight in SDNQ's uint4 cannot be read" in message


def test_a_layer_of_sdnq_that_lens_has_not_is_named(tmp_path: Path):
    message = sdnq(tmp_path, lambda tensors: tensors.update({"fc1.scale": torch.zeros(2)}))
    assert "has a quantised layer fc1, which Lens has not" in message


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_config_of_sdnq_is_named(content: str, tmp_path: Path):
    files.write_sdnq(tmp_path / "lens")
    (tmp_path / "lens" / "transformer" / "config.json").write_text(content, encoding="utf-8")
    assert "config.json" in refusal(tmp_path / "lens")


def test_older_scaled_files_lack_no_weight(tmp_path: Path):
    def without(path: Path) -> None:
        from safetensors.torch import load_file

        tensors = load_file(path)
        del tensors[f"{LAYER}.weight"]
        save_file(tensors, path)

    files.write_scaled(tmp_path / "lens.safetensors")
    without(tmp_path / "lens.safetensors")
    assert f"has no {LAYER}.weight, without which a weight in 8-bit floats" in refusal(
        tmp_path / "lens.safetensors"
    )
