"""Example workflows and the blueprint: which pack each node is from, and a picture for each template."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from scripts.workflow import NOTES
from tests.workflow_files import BLUEPRINTS, PACK, TEMPLATES, WORKFLOWS, nodes_of

LARGEST = 40_000  # bytes: all thumbnails are loaded at once when the list of templates opens


def version() -> str:
    """The pack's version."""
    return re.search(r'^version = "(.+)"$', (PACK / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_node_names_its_pack(path: Path):
    for node in nodes_of(path):
        if node["type"] in NOTES:
            continue
        properties = node["properties"]
        ours = node["type"].startswith("Lens") or path in BLUEPRINTS
        assert properties["cnr_id"] == ("lenspack" if ours else "comfy-core")
        assert properties["ver"] == version() if ours else re.fullmatch(r"[\d.]+", properties["ver"])


def test_every_template_has_its_picture_and_no_picture_is_left_over():
    folder = PACK / "example_workflows"
    assert sorted(folder.glob("*.jpg")) == [path.with_suffix(".jpg") for path in TEMPLATES]
    for path in folder.glob("*.jpg"):
        with Image.open(path) as picture:
            assert picture.format == "JPEG" and picture.width == 400
            picture.load()
        assert path.stat().st_size <= LARGEST


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprint_is_one_subgraph_whose_links_and_promoted_widgets_are_whole(path: Path):
    blueprint = json.loads(path.read_text(encoding="utf-8"))
    (outer,), (inner,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    # The page names it by its file; a colon there is none on Windows.
    assert outer["type"] == inner["id"] and outer["title"] == inner["name"] == path.stem
    assert inner["category"] and inner["description"] and blueprint["extra"]["BlueprintSearchAliases"]
    nodes = {node["id"]: node for node in inner["nodes"]}
    ends = {
        inner["inputNode"]["id"]: {"outputs": inner["inputs"]},
        inner["outputNode"]["id"]: {"inputs": inner["outputs"]},
    }
    for link in inner["links"]:
        origin = (nodes | ends)[link["origin_id"]]["outputs"][link["origin_slot"]]
        target = (nodes | ends)[link["target_id"]]["inputs"][link["target_slot"]]
        assert origin["type"] == target["type"] == link["type"]
        assert link["id"] in (origin.get("links") or origin.get("linkIds"))
        assert link["id"] in (target.get("link"), *target.get("linkIds", ()))
    promoted = [(link["target_id"], link["target_slot"]) for link in inner["links"] if link["origin_id"] < 0]
    names = [nodes[node]["inputs"][slot]["name"] for node, slot in promoted]
    assert names == [slot["name"] for slot in outer["inputs"]]
    assert all(
        [str(node), name] in outer["properties"]["proxyWidgets"]
        for (node, _), name in zip(promoted, names, strict=True)
    )
