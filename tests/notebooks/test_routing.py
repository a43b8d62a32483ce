"""The notebook on routing in a real browser: every figure is drawn, and nothing leaves."""

import pytest
from lab_page import CHROMIUM, PANEL, browser_page, lab_server, open_notebook, run_all

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]


def test_the_routing_notebook(tmp_path):
    notebooks, home = tmp_path / "notebooks", tmp_path / "home"
    home.mkdir()
    with lab_server(notebooks, home) as address, browser_page() as (page, outside):
        open_notebook(page, address, "01_routing.ipynb")
        run_all(page, timeout_s=240)
        figures = page.locator(f"{PANEL} .js-plotly-plot")
        titles = [figure.locator(".gtitle .line").first for figure in figures.all()]
        assert [title.text_content() for title in titles] == [
            "Expert use against chance",
            "Experts used together, layer 4",
            "Experts used again",
            "Specialisation in kinds of text",
        ]
        answer = page.locator(f"{PANEL} .jp-RenderedText").last.inner_text()
        assert "used again by the next token" in answer
        assert outside == []
