"""What the other tests of this folder rely on: errors of ours and missing nodes are noticed."""

from __future__ import annotations

import pytest

from tests.browser.lens_page import LensPage, one_renderer

pytestmark = one_renderer


@pytest.mark.parametrize("ours", [True, False])
def test_errors_of_ours_are_noticed(page: LensPage, ours: bool):
    folder = page.host.folder if ours else "another-pack"
    page.page.evaluate("(folder) => console.error(`/extensions/${folder}/js/x.js failed`)", folder)
    page.page.evaluate("(folder) => console.warn(`/extensions/${folder}/js/x.js is old`)", folder)
    assert len(page.errors_of_ours()) == ours
    page.start_anew()


def test_a_file_of_ours_that_is_not_there_is_noticed(page: LensPage):
    page.page.evaluate("(folder) => fetch(`/extensions/${folder}/js/none.js`)", page.host.folder)
    assert "404" in page.errors_of_ours()[0]
    page.start_anew()


def test_missing_nodes_are_noticed(page: LensPage):
    node = {"id": 1, "type": "LensNothing", "pos": [0, 0], "size": [200, 100], "properties": {}}
    page.load({"nodes": [node], "links": [], "version": 0.4})
    assert page.missing_nodes() == ["LensNothing"]
