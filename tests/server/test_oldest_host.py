"""The oldest ComfyUI that pyproject.toml names, with the pack in a folder of another name, as the registry's
client installs it."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path

import pytest

from scripts.comfy_server import PACK, ComfyServer, error_of
from scripts.demo_run import TINY, TINY_WORKFLOW
from scripts.workflow import set_input, to_prompt

# The pack's name in the registry, whose client makes a folder of it.
FOLDER = "lenspack"


@pytest.fixture(scope="module")
def oldest(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory):
    comfyui = Path(os.environ["OLDEST_COMFYUI_PATH"])
    with ComfyServer(
        tmp_path_factory.mktemp("oldest"), tiny_models, folder=FOLDER, comfyui=comfyui
    ) as running:
        yield running


def test_it_is_the_version_that_is_promised(oldest: ComfyServer):
    version = oldest.get("/api/system_stats")["system"]["comfyui_version"]
    written = (PACK / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-comfyui = ">={version}"' in written
    assert f'name = "{FOLDER}"' in written


def test_a_workflow_saved_with_another_folder_name_draws(oldest: ComfyServer):
    info = oldest.get("/api/object_info")
    assert info["LensSampler"]["python_module"] == f"custom_nodes.{FOLDER}"
    prompt = to_prompt(json.loads(TINY_WORKFLOW.read_text(encoding="utf-8")), info)
    for node, values in TINY.items():
        set_input(prompt, node, **values)
    set_input(prompt, "LensEmptyLatent", base_resolution="256")
    entry = oldest.wait(oldest.queue(prompt))
    assert error_of(entry) is None
    assert len(oldest.images(entry)) == 1


def test_what_the_page_reads_of_the_pack_is_served(oldest: ComfyServer):
    templates = oldest.get("/api/workflow_templates")[FOLDER]
    assert sorted(templates) == sorted(path.stem for path in (PACK / "example_workflows").glob("*.json"))
    blueprints = oldest.get("/api/global_subgraphs").values()
    ours = [each["name"] for each in blueprints if each["info"]["node_pack"] == f"custom_nodes.{FOLDER}"]
    assert ours == [path.stem for path in (PACK / "subgraphs").glob("*.json")]
    assert any(each.startswith(f"/extensions/{FOLDER}/js/") for each in oldest.get("/api/extensions"))
    with urllib.request.urlopen(f"{oldest.url}/extensions/{FOLDER}/docs/LensSampler.md", timeout=30) as page:
        assert page.status == 200
