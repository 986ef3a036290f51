"""What the page shows when files are missing or a node fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.lens_page import LensPage, one_renderer
from tests.browser.test_survival import TURBO


@one_renderer
def test_missing_models_are_listed_with_downloads(page: LensPage):
    page.load(TURBO)
    page.page.get_by_test_id("error-overlay-see-errors").click()
    group = page.page.get_by_test_id("error-group-missing-model")
    group.wait_for()
    shown = group.inner_text()
    for name in ("lens_turbo_bf16", "gpt_oss_20b_nvfp4", "flux2-vae"):
        assert f"{name}.safetensors" in shown
    assert group.get_by_test_id("missing-model-download").count() == 3


@pytest.fixture
def cut_file(models: Path) -> str:
    """The name of a denoiser whose download was cut."""
    folder = models / "diffusion_models"
    whole = (folder / "lens_tiny_bf16.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    return "cut.safetensors"


def test_a_failed_node_is_named(page: LensPage, cut_file: str):
    page.load(TURBO)
    overlay = page.page.get_by_test_id("error-overlay")
    overlay.wait_for()  # the template's own files are missing: found out only now, that would hide the error
    page.use_tiny_models()
    page.set_widgets("LensModelLoader", model_name=cut_file)
    run = page.run()
    assert run.status == "error"
    assert "cut.safetensors is cut short" in run.error["exception_message"]
    overlay.wait_for()  # the page's own: its words are other ones in each version
    toast = page.page.locator(".p-toast-message", has_text="Lens Model Loader")
    assert "cut.safetensors is cut short" in toast.inner_text()
