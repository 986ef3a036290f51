"""A quantised file: the same as quantising while loading, and the same however often it was interrupted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lens_core.config import DenoiserConfig
from lens_core.denoiser import LensDenoiser
from lens_core.denoiser_file import DenoiserFile
from lens_core.errors import CheckpointError, SettingError
from lens_core.loading import load_denoiser, open_denoiser
from lens_core.quant.policy import MODES, fits, is_quantized
from lens_core.quantize_file import quantize_file, variant_of_file
from lens_core.tiny.models import random_weights
from lens_core.weights.tensor_info import DTYPES
from tests.core.quantize_cases import MODE, TENSORS, finish, raw, stop_after
from tests.denoiser_gguf import write_denoiser


@pytest.fixture(params=["lens/Lens-Turbo-tiny", "diffusion_models/lens_turbo_tiny_bf16.safetensors"])
def either(request: pytest.FixtureRequest, tiny_models: Path) -> Path:
    """A folder of F32 shards, and a file in BF16."""
    return tiny_models / request.param


@pytest.fixture
def source(tiny_folder: Path) -> DenoiserFile:
    return open_denoiser(tiny_folder)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "quantised.safetensors"


@pytest.mark.parametrize("mode", MODES)
def test_the_file_loads_as_what_is_quantised_while_loading(either: Path, target: Path, mode: str):
    seen: list[tuple[int, int]] = []
    quantize_file(open_denoiser(either), mode, target, on_tensor=lambda *step: seen.append(step))
    assert seen == [(done, TENSORS) for done in range(1, TENSORS + 1)]
    expected = load_denoiser(either, torch.bfloat16, quantization=mode).state_dict()
    got = load_denoiser(target, torch.bfloat16).state_dict()
    assert got.keys() == expected.keys()
    assert [name for name in expected if raw(got[name]) != raw(expected[name])] == []
    layers = {name.removesuffix(".comfy_quant") for name in got if name.endswith(".comfy_quant")}
    sizes = open_denoiser(either).sizes
    assert layers == {n for n in sizes if is_quantized(n) and fits(sizes[n], MODES[mode].form)} != set()


@pytest.mark.parametrize("channels", [128, 3])
@pytest.mark.parametrize("mode", MODES)
def test_the_safetensors_library_reads_it_and_every_tensor_is_aligned(
    tmp_path: Path, target: Path, mode: str, channels: int
):
    """Also with 3 channels, where proj_out.bias takes 6 bytes and lies before all blocks."""
    config = DenoiserConfig(num_layers=1, num_attention_heads=2, enc_hidden_dim=64, in_channels=channels)
    save_file(random_weights(LensDenoiser(config), torch.Generator().manual_seed(0)), tmp_path / "source")
    quantize_file(open_denoiser(tmp_path / "source"), mode, target)
    loaded = load_file(target)
    with target.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    assert header.pop("__metadata__")["lens.quantization"] == mode
    assert header.keys() == loaded.keys()
    ends = [entry["data_offsets"] for entry in header.values()]
    assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])], "no holes"
    for name, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % DTYPES[entry["dtype"]].itemsize == 0, name
    kinds = {tensor.dtype for name, tensor in loaded.items() if name.endswith((".weight", ".bias"))}
    assert torch.float32 not in kinds and torch.bfloat16 in kinds


def test_weight_only_and_dynamic_differ_by_what_they_say(source: DenoiserFile, tmp_path: Path):
    one, other = (
        load_file(quantize_file(source, mode, tmp_path / f"{mode}.safetensors"))
        for mode in ("float8_weight_only", "float8_dynamic")
    )
    layer = "transformer_blocks.0.attn.img_qkv"
    said = [json.loads(bytes(file[f"{layer}.comfy_quant"].tolist())) for file in (one, other)]
    assert said[0] == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    assert said[1] == {"format": "float8_e4m3fn"}
    assert [n for n in one if raw(one[n]) != raw(other[n]) and not n.endswith(".comfy_quant")] == []


# The variant, and what is refused


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("lens/Lens-Turbo-tiny", "Lens-Turbo"),
        ("lens/Lens-Turbo-tiny/transformer", "Lens-Turbo"),
        ("lens/Lens-tiny", "Lens"),
        ("diffusion_models/lens_turbo_tiny_bf16.safetensors", "Lens-Turbo"),
    ],
)
def test_turbo_stays_turbo_under_any_name(tiny_models: Path, tmp_path: Path, name: str, variant: str):
    out = quantize_file(open_denoiser(tiny_models / name), MODE, tmp_path / "any.safetensors")
    with safe_open(out, "pt") as file:
        assert file.metadata()["lens.variant"] == variant
    assert variant_of_file(open_denoiser(out)).name == variant


def test_the_name_tells_where_no_metadata_do(tiny_models: Path, tmp_path: Path):
    weights = load_file(tiny_models / "diffusion_models" / "lens_tiny_bf16.safetensors")
    blob = tmp_path / "0a1b2c"
    save_file(weights, blob)
    link = tmp_path / "lens_base.safetensors"
    link.symlink_to(blob)
    assert variant_of_file(open_denoiser(link)).name == "Lens-Base"
    assert variant_of_file(open_denoiser(blob)).name == "Lens"


def quantised_source(kind: str, folder: Path, tiny: DenoiserFile) -> Path:
    if kind.isupper():
        path = folder / "lens.gguf"
        write_denoiser(path, kind)
        return path
    path = folder / "source.safetensors"
    if kind != "fp8":
        return quantize_file(tiny, kind, path)
    layer = "transformer_blocks.0.attn.img_qkv.weight"
    weights = {name: tiny.checkpoint.read(name) for name in tiny.checkpoint.header}
    save_file({**weights, layer: weights[layer].to(torch.float8_e4m3fn)}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nvfp4", "nvfp4"),
        ("float8_dynamic", "float8_e4m3fn"),
        ("uint4_sdnq", "4 bits in groups of 64"),
        ("Q8_0", "Q8_0"),
        ("fp8", "float8_e4m3fn"),
    ],
)
def test_a_quantised_source_is_refused_by_its_format(
    source: DenoiserFile, tmp_path: Path, target: Path, kind: str, said: str
):
    path = quantised_source(kind, tmp_path, source)
    with pytest.raises(CheckpointError) as caught:
        quantize_file(open_denoiser(path), MODE, target)
    for words in (path.name, f"quantised already ({said})", "bf16 or fp32"):
        assert words in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_gguf_that_is_not_quantised_is_a_source(tmp_path: Path, target: Path):
    write_denoiser(tmp_path / "lens_turbo.gguf", "F16")
    file = open_denoiser(tmp_path / "lens_turbo.gguf")
    quantize_file(file, MODE, target)
    expected = load_denoiser(file.path, torch.bfloat16, quantization=MODE).state_dict()
    got = load_denoiser(target, torch.bfloat16).state_dict()
    assert [name for name in expected if raw(got[name]) != raw(expected[name])] == []
    assert variant_of_file(open_denoiser(target)).name == "Lens-Turbo"


@pytest.mark.parametrize("how", ["itself", "a link", "its part"])
def test_the_source_is_never_replaced(tiny_models: Path, tmp_path: Path, how: str):
    name = "lens.safetensors.part" if how == "its part" else "lens.safetensors"
    path = tmp_path / name
    shutil.copy(tiny_models / "diffusion_models" / "lens_tiny_bf16.safetensors", path)
    before = path.read_bytes()
    target = tmp_path / ("link.safetensors" if how == "a link" else "lens.safetensors")
    if how == "a link":
        target.symlink_to(path)
    with pytest.raises(SettingError, match=r"would replace the file that it is made from\. Give another"):
        quantize_file(open_denoiser(path), MODE, target, overwrite=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", ["none", "auto", "int3"])
def test_an_unknown_mode_is_refused(source: DenoiserFile, target: Path, mode: str):
    with pytest.raises(SettingError, match=f"one of float8_weight_only, .*, got {mode}"):
        quantize_file(source, mode, target)


def test_odd_names_are_refused(source: DenoiserFile, tmp_path: Path):
    with pytest.raises(SettingError, match=r"x\.gguf does not end in \.safetensors"):
        quantize_file(source, MODE, tmp_path / "x.gguf")
    (tmp_path / "y.safetensors").mkdir()
    with pytest.raises(SettingError, match=r"y\.safetensors is a folder"):
        quantize_file(source, MODE, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="cannot be written"):
        quantize_file(source, MODE, tmp_path / ("n" * 300 + ".safetensors"))


def test_a_file_of_another_content_needs_overwrite(source: DenoiserFile, target: Path):
    target.write_bytes(b"mine")
    with pytest.raises(SettingError, match=r"exists already and is not transformer/ .* in int8_dynamic"):
        quantize_file(source, MODE, target)
    assert target.read_bytes() == b"mine"
    assert finish(source, target, overwrite=True) == 0
    assert load_denoiser(target, torch.bfloat16) is not None


def test_a_finished_file_is_left_as_it_is(source: DenoiserFile, target: Path):
    finish(source, target)
    os.utime(target, (1, 1))
    quantize_file(source, MODE, target, on_tensor=stop_after(1))
    assert target.stat().st_mtime == 1
    with pytest.raises(SettingError, match="exists already"):
        quantize_file(source, "nvfp4", target)
    assert finish(source, target, overwrite=True) == 0
    assert target.stat().st_mtime > 1
