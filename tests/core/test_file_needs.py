"""What is computed from headers is what the models have once they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lens_core.file_needs import denoiser_file_needs, encoder_file_needs
from lens_core.loading import build_denoiser, load_vae, open_denoiser, open_encoder
from lens_core.needs import Picture, picture_needs
from lens_core.text_encoder import TextEncoder

CPU = torch.device("cpu")
PICTURE = Picture(320, 256, 2, 100, 4)


@pytest.mark.parametrize("mode", ["none", "int8_dynamic", "uint4_sdnq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_needs_are_those_of_the_loaded_models(tiny_folder: Path, mode: str, dtype: torch.dtype):
    file, encoder = open_denoiser(tiny_folder), open_encoder(tiny_folder)
    model, text = build_denoiser(file, dtype, mode=mode), TextEncoder(encoder, dtype)
    vae, quantized = load_vae(tiny_folder, dtype), mode != "none"
    loaded = picture_needs(text, "auto", model, vae, PICTURE, CPU, dtype, quantized)
    assert denoiser_file_needs(file, mode, CPU, dtype, dtype, PICTURE) == loaded.denoiser
    assert encoder_file_needs(encoder, "auto", dtype, PICTURE) == loaded.encoder


@pytest.mark.parametrize("dense", [False, True])
def test_an_encoder_at_once_or_in_layers(tiny_folder: Path, dense: bool):
    file = open_encoder(tiny_folder)
    total = TextEncoder(file, torch.float32, dense=dense).total
    assert encoder_file_needs(file, "gpu", torch.float32, PICTURE, dense=dense).rest == total
    streamed = encoder_file_needs(file, "stream", torch.float32, PICTURE)
    assert streamed.layers == () and streamed.rest == 0 and streamed.working > 0
    assert encoder_file_needs(file, "cpu", torch.float32, PICTURE).peak(0) == 0
