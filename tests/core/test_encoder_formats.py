"""Every layout of the encoder loads to the same module, bit for bit where the format allows it."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lens_core.encoder import GptOssEncoder
from lens_core.errors import CheckpointMismatch
from lens_core.loading import load_encoder, open_encoder
from lens_core.quant.mxfp4 import dequantize
from lens_core.weights.banks import ExpertQuantizer
from tests import encoder_files as files

MXFP4 = "text_encoders/gpt_oss_tiny_mxfp4.safetensors"
NVFP4 = "text_encoders/gpt_oss_tiny_nvfp4.safetensors"


@pytest.fixture(scope="module")
def weights(tiny_models: Path) -> dict[str, Tensor]:
    """Hugging Face's tensors of the tiny encoder."""
    tensors = load_file(tiny_models / MXFP4)
    del tensors["tokenizer_json"]
    return tensors


@pytest.fixture(scope="module")
def published(tiny_models: Path) -> GptOssEncoder:
    return load_encoder(tiny_models / MXFP4, torch.bfloat16)[0]


def write(layout: str, folder: Path, weights: dict[str, Tensor]) -> Path:
    path = folder / ("encoder.gguf" if layout.startswith("gguf") else "encoder.safetensors")
    if layout == "original":
        return files.save(path, files.original(weights))
    if layout == "nvfp4 rebundle":
        return files.save(path, files.comfy_nvfp4(weights, files.rebundled))
    if layout.startswith("transformers"):
        return files.save(path, files.dense(weights, DTYPES[layout]))
    if layout.startswith("comfyui"):
        return files.save(path, files.comfy_dense(weights, DTYPES[layout]))
    files.write_gguf(path, weights, *GGUF[layout])
    return path


DTYPES = {
    "transformers bf16": torch.bfloat16,
    "transformers fp16": torch.float16,
    "comfyui bf16": torch.bfloat16,
    "comfyui fp32": torch.float32,
}
GGUF = {
    "gguf bf16": ("BF16",),
    "gguf bf16 experts": ("BF16", "BF16"),
    "gguf f32 experts": ("F32", "F32"),
}
LAYOUTS = ["original", "nvfp4 rebundle", *DTYPES, *GGUF]
# fp16 has bf16's bits but for numbers below 2^-14, of which the tiny models' biases and norms have few.
ROUNDED = {"transformers fp16"}


def load(path: Path, dtype: torch.dtype | None = torch.bfloat16, **settings) -> GptOssEncoder:
    file = open_encoder(path)
    encoder = GptOssEncoder(file.config, dtype=dtype, device="meta")
    file.load(encoder, dtype, **settings)
    return encoder


def differing(one: nn.Module, other: nn.Module) -> list[str]:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    return [
        name
        for name, tensor in first.items()
        if tensor.dtype != second[name].dtype or not torch.equal(tensor, second[name])
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_the_same_tensors(
    layout: str, weights: dict[str, Tensor], published: GptOssEncoder, tmp_path: Path, caplog
):
    with caplog.at_level(logging.WARNING):
        encoder = load(write(layout, tmp_path, weights))
    assert encoder.config == published.config
    different = differing(encoder, published)
    if layout.endswith("experts"):  # the gguf package unpacks -0 as 0
        assert all(name.endswith("_blocks") for name in different)
        for name in different:
            scales = published.state_dict()[name.replace("_blocks", "_scales")]
            pair = (module.state_dict()[name] for module in (encoder, published))
            got, want = (dequantize(blocks, scales, torch.float32) for blocks in pair)
            assert torch.equal(got, want), name
    elif layout in ROUNDED:
        assert not [name for name in different if name.endswith(("_blocks", "_scales"))]
    else:
        assert not different
    assert not caplog.records, "nothing was changed, so nothing is said"


def test_fused_rows_are_views_and_nothing_is_copied(weights: dict[str, Tensor], tmp_path: Path):
    attention = load(write("original", tmp_path, weights)).layers[3].self_attn
    q, k, v = (getattr(attention, f"{name}_proj").weight for name in "qkv")
    assert k.data_ptr() == q.data_ptr() + q.nbytes
    assert v.data_ptr() == k.data_ptr() + k.nbytes
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0", "F16", "MXFP4"])
def test_quantised_gguf_matrices_are_dequantised(weights: dict[str, Tensor], tmp_path: Path, kind: str):
    import gguf

    files.write_gguf(tmp_path / "x.gguf", weights, kind)
    encoder = load(tmp_path / "x.gguf", None)
    number = gguf.GGMLQuantizationType[kind]
    for name, tensor in (
        ("model.embed_tokens.weight", encoder.embed_tokens.weight),
        ("model.layers.7.self_attn.o_proj.weight", encoder.layers[7].self_attn.o_proj.weight),
    ):
        dense = weights[name].float().numpy()
        want = gguf.quants.dequantize(gguf.quants.quantize(dense, number), number)
        assert tensor.dtype == (torch.float16 if kind == "F16" else torch.bfloat16)
        assert torch.equal(tensor, torch.from_numpy(want).to(tensor.dtype)), name
    assert encoder.layers[7].input_layernorm.weight.dtype == torch.float32, "as stored"
    assert torch.equal(
        encoder.layers[7].mlp.experts.down_proj_blocks,
        weights["model.layers.7.mlp.experts.down_proj_blocks"],
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_but_the_experts_is_cast(layout: str, weights: dict[str, Tensor], tmp_path: Path):
    encoder = load(write(layout, tmp_path, weights), torch.float32)
    for name, tensor in encoder.state_dict().items():
        packed = name.endswith(("_blocks", "_scales"))
        assert tensor.dtype == (torch.uint8 if packed else torch.float32), name


@pytest.mark.parametrize("layout", ["original", "nvfp4 rebundle", "transformers bf16", "gguf bf16"])
def test_progress_reaches_the_end_and_may_cancel(layout: str, weights: dict[str, Tensor], tmp_path: Path):
    path = write(layout, tmp_path, weights)
    calls: list[tuple[int, int]] = []
    load(path, on_tensor=lambda *call: calls.append(call))
    assert calls == sorted(set(calls))
    assert calls[-1][0] == calls[-1][1]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(path, on_tensor=stop)


@pytest.mark.parametrize("layout", ["transformers bf16", "comfyui bf16", "gguf bf16 experts"])
def test_experts_that_are_not_mxfp4_warn_once_with_the_error(
    layout: str, weights: dict[str, Tensor], tmp_path: Path, caplog
):
    path = write(layout, tmp_path, weights)
    if path.suffix == ".gguf":
        number = write_changed_gguf(path)
    else:
        tensors = load_file(path)
        number = change_two_experts(tensors)
        files.save(path, tensors)
    with caplog.at_level(logging.WARNING):
        load(path)
    (record,) = caplog.records
    assert f"changed values by up to {number} % of the largest in their block" in record.getMessage()
    assert "Prefer a file with GPT-OSS-20B's own MXFP4 experts" in record.getMessage()


def change_two_experts(tensors: dict[str, Tensor]) -> str:
    """A block of 6 and of 7s where 6 is the largest: 7 becomes 6, a change of a seventh of it."""
    comfyui = "layers.2.mlp.experts.down_proj.weight"
    bank = tensors[comfyui] if comfyui in tensors else tensors["model.layers.2.mlp.experts.down_proj"].mT
    bank[1, 5, :32] = 0.75
    bank[1, 5, 3] = 0.875
    bank[4, 0, 32:64] = 6
    bank[4, 0, 40] = 5.25  # between 4 and 6: an error of 0.75 in 6, an eighth
    return "14.3"


def write_changed_gguf(path: Path) -> str:
    import gguf

    name = "blk.2.ffn_down_exps.weight"
    (info,) = [tensor for tensor in gguf.GGUFReader(path, "r+").tensors if tensor.name == name]
    bank = torch.from_numpy(info.data).view(torch.bfloat16).view(info.shape.tolist()[::-1])
    bank[0, 0, :32] = 0.75
    bank[0, 0, 3] = 0.875
    return "14.3"


def test_an_error_below_saturation_is_measured_too():
    quantize = ExpertQuantizer()
    weight = torch.full((1, 64), 4.0)
    quantize(weight)
    assert quantize.largest_error == 0
    weight[0, 40] = 1.25
    quantize(weight)
    assert quantize.largest_error == 0.25 / 4


def test_a_folder_with_one_gguf_is_that_gguf(weights: dict[str, Tensor], tmp_path: Path, published):
    files.write_gguf(tmp_path / "gpt-oss-20b.gguf", weights, "BF16")
    assert not differing(load(tmp_path), published)


def test_a_gguf_by_another_name_is_read_by_its_content(weights: dict[str, Tensor], tmp_path: Path, published):
    files.write_gguf(tmp_path / "encoder.safetensors", weights, "BF16")
    assert not differing(load(tmp_path / "encoder.safetensors"), published)


@pytest.mark.parametrize("layout", ["original", "nvfp4 rebundle", "comfyui bf16", "gguf bf16"])
def test_differences_are_listed_in_every_layout(layout: str, weights: dict[str, Tensor], tmp_path: Path):
    lacking = dict(weights)
    for name in ("model.layers.5.mlp.experts.down_proj_bias", "model.layers.7.self_attn.sinks"):
        del lacking[name]
    lacking["model.layers.3.mlp.router.weight"] = torch.zeros(9, 64, dtype=torch.bfloat16)
    with pytest.raises(CheckpointMismatch) as caught:
        open_encoder(write(layout, tmp_path, lacking))
    assert sorted(caught.value.missing) == [
        "layers.5.mlp.experts.down_proj_bias",
        "layers.7.self_attn.sinks",
    ]
    assert caught.value.wrong_shape == [("layers.3.mlp.router.weight", (8, 64), (9, 64))]
    assert not caught.value.unexpected


def test_the_identity_names_the_weights_not_the_place(tiny_models: Path, tiny_folder: Path, tmp_path: Path):
    source = tiny_models / MXFP4
    copied = Path(shutil.copy2(source, tmp_path / "other.safetensors"))
    one = open_encoder(source).identity
    assert open_encoder(copied).identity == one
    assert open_encoder(tiny_folder).identity != one
    assert open_encoder(tiny_models / NVFP4).identity != one
    assert len(one) == 40 and int(one, 16)


def test_the_identity_sees_a_changed_file(tiny_models: Path, tmp_path: Path):
    path = Path(shutil.copy2(tiny_models / MXFP4, tmp_path / "x.safetensors"))
    state = path.stat()
    before = open_encoder(path).identity
    with path.open("r+b") as file:  # the last bytes are sampled; the time of change is put back
        file.seek(-10, 2)
        byte = file.read(1)
        file.seek(-10, 2)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    changed = open_encoder(path).identity
    assert changed != before
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert open_encoder(path).identity not in (before, changed)
