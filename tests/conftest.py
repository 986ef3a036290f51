"""Fixtures for all tests: the tiny random models, made once for all workers."""

from __future__ import annotations

from pathlib import Path

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
