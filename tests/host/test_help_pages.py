"""The help pages that ComfyUI shows of ``web/docs``: one for each node, with a picture of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

DOCS = Path(__file__).parents[2] / "web" / "docs"
PICTURES = DOCS / "pictures"
LARGEST = 40_000


def ours(host) -> dict:
    return {node_id: node for node_id, node in host.node_classes.items() if node_id.startswith("Lens")}


def test_each_node_has_a_page_and_a_picture(host):
    """And there are no others. ``python -m scripts.help_pictures`` takes the pictures."""
    assert {path.name for path in DOCS.iterdir()} == {f"{node_id}.md" for node_id in ours(host)} | {
        "pictures"
    }
    assert {path.name for path in PICTURES.iterdir()} == {f"{node_id}.png" for node_id in ours(host)}


def test_pages_name_every_input_and_output(host):
    for node_id, node in ours(host).items():
        text = (DOCS / f"{node_id}.md").read_text(encoding="utf-8")
        schema = node.GET_SCHEMA()
        for kind, entries in (("input", schema.inputs), ("output", schema.outputs)):
            named = set(re.findall(r"\w+", " ".join(_first_column(text, kind))))
            assert {entry.display_name or entry.id for entry in entries} <= named, node_id


def _first_column(text: str, kind: str) -> list[str]:
    _, _, table = text.partition(f"\n| {kind} | meaning |\n|---|---|\n")
    return re.findall(r"^\| ([^|]+) \|", table.partition("\n\n")[0], re.MULTILINE)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_pictures_and_links(page: Path):
    """Pictures lie beside the pages, so that the pack's folder may have any name; the page gives that base to
    pictures alone, so a link must be whole."""
    text = page.read_text(encoding="utf-8")
    pictures = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", text)
    title = text.partition("\n")[0].removeprefix("# ")
    assert pictures == [(title, f"pictures/{page.stem}.png")]
    for address in re.findall(r"(?<!!)\[[^\]]+\]\(([^)]+)\)", text):
        assert address.startswith("https://"), address
    assert "<img" not in text and "/extensions/" not in text


@pytest.mark.parametrize("path", sorted(PICTURES.glob("*.png")), ids=lambda path: path.stem)
def test_pictures_are_small_and_sharp(path: Path):
    """Two pixels for each of the page's."""
    assert path.stat().st_size < LARGEST
    with Image.open(path) as picture:
        assert picture.mode == "P" and picture.width >= 800 and picture.height >= 100
        assert len(picture.getcolors()) > 8, "an empty picture"
