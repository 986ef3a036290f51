"""One real ComfyUI server with the pack and the tiny models, for all tests of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.comfy_server import ComfyServer


@pytest.fixture(scope="session")
def server(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running server; its models folder is a copy, which tests may add files to."""
    base = tmp_path_factory.mktemp("server")
    shutil.copytree(tiny_models, base / "tiny")
    with ComfyServer(base / "comfy", base / "tiny") as running:
        yield running


@pytest.fixture(scope="session")
def picture_prompt() -> Callable[..., dict[str, Any]]:
    """Builds an API prompt that draws a 512-pixel picture; keyword arguments override inputs, given
    as node__input, for example ``sampler__steps=3``."""

    def build(**overrides: Any) -> dict[str, Any]:
        nodes = {
            "model": ("LensModelLoader", {"model_name": "Lens-Turbo-tiny", "dtype": "auto"}),
            "encoder": ("LensEncoderLoader", {"encoder_name": "Lens-Turbo-tiny"}),
            "vae": ("LensVAELoader", {"vae_name": "Lens-Turbo-tiny"}),
            "text": ("LensTextEncode", {"clip": ["encoder", 0], "prompt": "a circle", "negative": ""}),
            "size": (
                "LensEmptyLatent",
                {"base_resolution": "512", "aspect_ratio": "1:1", "batch_size": 1},
            ),
            "sampler": (
                "LensSampler",
                {
                    "model": ["model", 0],
                    "positive": ["text", 0],
                    "negative": ["text", 1],
                    "latent": ["size", 0],
                    "seed": 7,
                    "steps": 2,
                    "cfg": 1.0,
                    "noise": "host",
                    "denoise": 1.0,
                },
            ),
            "decode": ("LensVAEDecode", {"latent": ["sampler", 0], "vae": ["vae", 0]}),
            "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "test"}),
        }
        for key, value in overrides.items():
            node, _, name = key.partition("__")
            nodes[node][1][name] = value
        return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}

    return build
