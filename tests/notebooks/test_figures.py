"""Notebooks in a real browser: every figure is drawn, the question answered, and nothing leaves."""

import pytest
from lab_page import CHROMIUM, PANEL, browser_page, lab_server, open_notebook, run_all

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]

ROUTING = (
    "01_routing",
    [
        "Expert use against chance",
        "Experts used together, layer 4",
        "Experts used again",
        "Specialisation in kinds of text",
    ],
    "used again by the next token",
)
SENSITIVITY = (
    "02_sensitivity",
    [
        "Which layers are expensive?",
        "Does an estimate know the order, and does it matter?",
        "Do the layers' costs add up?",
        "Published sensitivities and cuts, mixtral-8x7b",
    ],
    "cuts by directional",
)
GATING = (
    "03_gating",
    [
        "Where each rule skips",
        "Loss against skipping",
        "Published MMLU accuracy, mixtral-8x7b",
        "What takes the place of a skipped expert",
    ],
    "a map of rank 16, over nothing",
)
CACHE_PLAN = (
    "04_cache_plan",
    [
        "Marginal benefit of a slot",
        "Where the slots go, demo",
        "Where the slots go, Mixtral-8x7B as published",
        "What each eviction loads",
        "How much of the way to Belady",
    ],
    "ms per token, emulated:",
)
PREFETCH = (
    "05_prefetch",
    [
        "Which experts a layer will need, predicted",
        "One token, on demand and with prefetching",
        "What prefetching saves",
        "Which predictors to follow",
        "Predicted and measured time per token",
    ],
    "slots, on emulated:",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "titles", "answer"),
    [
        pytest.param(*ROUTING, id="01_routing"),
        pytest.param(*SENSITIVITY, id="02_sensitivity"),
        pytest.param(*GATING, id="03_gating"),
        pytest.param(*CACHE_PLAN, id="04_cache_plan"),
        pytest.param(*PREFETCH, id="05_prefetch"),
    ],
)
def test_every_figure_is_drawn_and_the_question_answered(tmp_path, name, titles, answer):
    notebooks, home = tmp_path / "notebooks", tmp_path / "home"
    home.mkdir()
    with lab_server(notebooks, home) as address, browser_page() as (page, outside):
        open_notebook(page, address, f"{name}.ipynb")
        run_all(page, timeout_s=900)
        drawn = page.locator(f"{PANEL} .js-plotly-plot").all()
        shown = [figure.locator(".gtitle .line").first.text_content() for figure in drawn]
        assert shown == titles
        assert answer in page.locator(f"{PANEL} .jp-RenderedText").last.inner_text()
        assert outside == []
