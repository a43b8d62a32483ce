"""The whole job in a real browser: open, run, move, measure, cancel, export, load."""

import os
import shutil
import time
from pathlib import Path

import pytest
from lab_page import CHROMIUM, PANEL, browser_page, lab_server, open_notebook, run_all

from adapmoe_lab.records import OFF, TunedConfig
from adapmoe_lab.workbench.jupyter import TOUR

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]

SCREENSHOT = "ADAPMOE_LAB_SCREENSHOT"
"""Names a file to keep the picture of the workbench in."""


def tile(page, name, part):
    return page.locator(f"{PANEL} [data-tile='{name}'] .{part}").first


def wait_for_text(locator, wanted, timeout_s=90):
    for _ in range(timeout_s * 10):
        if locator.count() and wanted(locator.inner_text()):
            return locator.inner_text()
        time.sleep(0.1)
    raise AssertionError(f"not the text that was waited for: {locator.inner_text()!r}")


def button(page, name):
    return page.locator(PANEL).get_by_role("button", name=name)


def test_the_tour(tmp_path):
    notebooks, home = tmp_path / "notebooks", tmp_path / "home"
    home.mkdir()
    with lab_server(notebooks, home) as address, browser_page() as (page, outside):
        open_notebook(page, address, TOUR)
        assert page.locator(".jp-toast-button, .jp-Dialog").all_inner_texts() == []  # no news
        run_all(page, timeout_s=900)
        move_a_control_by_keyboard(page)
        drag_the_curve(page)
        measure_and_cancel(page)
        export(page, notebooks)
        if os.environ.get(SCREENSHOT):
            take_screenshot(page, Path(os.environ[SCREENSHOT]))
        assert outside == []


def move_a_control_by_keyboard(page):
    handle = page.locator(f"{PANEL} .noUi-handle").first
    handle.scroll_into_view_if_needed()
    before = tile(page, "Skipped", "predicted").inner_text()
    bars = page.locator(f"{PANEL} .live-figure .bars path").first.get_attribute("d")
    handle.focus()
    page.keyboard.press("Home")
    wait_for_text(tile(page, "Skipped", "predicted"), lambda text: text == "0.0%")
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    wait_for_text(tile(page, "Skipped", "predicted"), lambda text: text == "15.0%")
    assert before not in ("0.0%", "15.0%")
    for _ in range(100):
        if page.locator(f"{PANEL} .live-figure .bars path").first.get_attribute("d") != bars:
            return
        time.sleep(0.1)
    raise AssertionError("the bars did not move with the slider")


def drag_the_curve(page):
    before = tile(page, "Skipped", "predicted").inner_text()
    dot = page.locator(f"{PANEL} [role=slider][aria-label='layer 3']")
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 90, steps=8)
    page.mouse.up()
    after = wait_for_text(tile(page, "Skipped", "predicted"), lambda text: text != before)
    time.sleep(1)  # were the slider to answer with its rounded value, the curve would be undone
    assert float(dot.get_attribute("aria-valuenow")) < 0.8
    assert tile(page, "Skipped", "predicted").inner_text() >= after


def measure_and_cancel(page):
    button(page, "Measure latency").click()
    wait_for_text(
        tile(page, "ms / token", "measured"), lambda text: text.startswith("measured "), 200
    )
    button(page, "Measure loss").click()
    cancel = page.locator(PANEL).get_by_role("button", name="Cancel").nth(1)
    cancel.click()
    wait_for_text(page.locator(PANEL).get_by_text("cancelled").first, lambda text: bool(text))
    button(page, "Measure loss").click()
    wait_for_text(tile(page, "Loss, millinats", "measured"), lambda text: "±" in text, 200)


def export(page, notebooks):
    field = page.locator(f"{PANEL} input[type=text]").first
    field.fill("mine.json")
    field.press("Enter")
    page.locator(f"{PANEL} .widget-button", has_text="Save").click()
    page.locator(PANEL).get_by_text("mine.json").first.wait_for()
    config = TunedConfig.load(notebooks / "mine.json")
    assert (config.gating.cuts < OFF).all()
    assert config.evidence["verified"] is True
    assert config.evidence["measured"]["latency"]["link"].startswith("emulated:")
    with page.expect_download() as download:
        page.locator(f"{PANEL} .widget-button", has_text="Download").click()
    assert download.value.suggested_filename == "mine.json"
    saved = notebooks / "downloaded.json"
    shutil.copyfile(download.value.path(), saved)
    assert TunedConfig.load(saved).to_json() == config.to_json()


def take_screenshot(page, path):
    page.keyboard.press("Escape")
    page.keyboard.press("Control+b")  # the file browser makes room
    page.mouse.move(5, 5)
    time.sleep(2)
    page.locator(f"{PANEL} .jp-OutputArea-output:has(.adapmoe-tiles)").screenshot(path=path)
