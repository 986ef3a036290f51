"""Every layout of the encoder loads to the same module, bit for bit where the format allows it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lens_core.encoder import GptOssEncoder
from lens_core.loading import load_encoder, open_encoder
from lens_core.quant.mxfp4 import dequantize
from tests import encoder_files as files

MXFP4 = "text_encoders/gpt_oss_tiny_mxfp4.safetensors"


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
