"""Fixtures for all tests: the tiny random models, made once for all workers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A ComfyUI models folder of tiny random models (``python -m lens_core.tiny``, seed 0)."""
    from lens_core.tiny.layouts import write_everything

    base = tmp_path_factory.getbasetemp()
    root = base if worker_id == "master" else base.parent
    models = root / "tiny_models"
    with FileLock(str(models) + ".lock"):
        if not (models / "vae").is_dir():
            write_everything(models, seed=0)
    return models


@pytest.fixture(scope="session")
def tiny_folder(tiny_models: Path) -> Path:
    """The tiny Lens folder in diffusers' layout (F32 denoiser, MXFP4 encoder)."""
    return tiny_models / "lens" / "Lens-tiny"


@pytest.fixture(scope="session")
def nano_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``lens`` and ``lens-turbo`` of nano Lens with random weights."""
    from tools.nano.export import export_random

    models = tmp_path_factory.mktemp("checkpoints") / "Example"
    export_random(models)
    return models


@pytest.fixture(scope="session")
def picture_prompt() -> Callable[..., dict[str, Any]]:
    """Builds an API prompt that draws a 256-pixel picture; keyword arguments override inputs, given
    as node__input, for example ``sampler__steps=3``."""

    def build(**overrides: Any) -> dict[str, Any]:
        nodes = {
            "model": ("LensModelLoader", {"model_name": "Lens-Turbo-tiny", "dtype": "auto"}),
            "encoder": ("LensEncoderLoader", {"encoder_name": "Lens-Turbo-tiny"}),
            "vae": ("LensVAELoader", {"vae_name": "Lens-Turbo-tiny"}),
            "text": ("LensTextEncode", {"clip": ["encoder", 0], "prompt": "a circle", "negative": ""}),
            "size": (
                "LensEmptyLatent",
                {"base_resolution": "256", "aspect_ratio": "1:1", "batch_size": 1},
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


@pytest.fixture(autouse=True)
def _deterministic():
    """Every test starts from the same global random state and gathers no gradients."""
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """A skipped test is a failed one: whatever it needs must be there, or the test must go."""
    report = yield
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped; no test may be."
    return report


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not go through it at each of its runs."""
    gc.collect()
    gc.freeze()
