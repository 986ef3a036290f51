"""A node's help page opens in the page, with its table."""

from __future__ import annotations

from tests.browser.lens_page import LensPage
from tests.browser.test_survival import TURBO


def test_a_nodes_help_page_opens_with_its_table(page: LensPage):
    page.load(TURBO)
    page.open_help("LensSampler")
    table = page.help_page().locator("table").first
    table.wait_for()
    assert "steps" in table.inner_text()
