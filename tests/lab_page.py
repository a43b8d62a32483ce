"""JupyterLab as the project opens it, driven by a real Chromium; nothing may leave this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Error, Page, sync_playwright

TOKEN = "a-token-for-tests"  # noqa: S105
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LOCAL = re.compile(r"^(https?|wss?)://127\.0\.0\.1[:/]|^(data|blob|about):")
PANEL = ".jp-NotebookPanel:not(.lm-mod-hidden)"
STARTED = f"""() => [...document.querySelectorAll('{PANEL} .jp-CodeCell .jp-InputPrompt')]
  .some(prompt => /^\\[[\\d*]+\\]:$/.test(prompt.textContent.trim()))"""
FINISHED = f"""() => {{
  const cells = [...document.querySelectorAll('{PANEL} .jp-CodeCell .jp-InputPrompt')];
  return cells.length && cells.every(p => /^\\[\\d+\\]:$/.test(p.textContent.trim()));
}}"""
ERRORS = (
    f"{PANEL} .jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'], "
    f"{PANEL} .jp-RenderedText[data-mime-type='application/vnd.jupyter.error']"
)


def free_port() -> int:
    """Return a port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def lab_server(folder: Path | None, home: Path) -> Iterator[str]:
    """Run `adapmoe-lab lab`, with a FOLDER if one is given; yield its address.

    JupyterLab's own files go to `home`.
    """
    port = free_port()
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = {
        **os.environ,
        "HOME": str(home),
        **{name: str(home / name) for name in names},
        "JUPYTER_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        sys.executable,
        "-m",
        "adapmoe_lab.cli",
        "lab",
        *([] if folder is None else [folder]),
    ]
    command += ["--no-browser", "--port", str(port)]
    with (home / "lab.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_up(f"{address}/api/status?token={TOKEN}", process, home / "lab.log")
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_up(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"JupyterLab ended at once:\n{log.read_text()}")
        try:
            urllib.request.urlopen(address).close()  # noqa: S310 our own address
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not come up:\n{log.read_text()}")


@contextmanager
def browser_page() -> Iterator[tuple[Page, list[str]]]:
    """Open an empty page; yield it with the list of requests that left this machine."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(viewport={"width": 1560, "height": 1150})
        outside: list[str] = []
        context.on("request", lambda r: LOCAL.match(r.url) or outside.append(r.url))
        yield context.new_page(), outside
        browser.close()


def open_notebook(page: Page, address: str, name: str) -> None:
    """Open a notebook and wait for its kernel.

    The page shows an idle kernel before it has one, and Run All in that moment starts a second
    kernel that the widgets never reach. So the server is asked as well.
    """
    page.goto(f"{address}/lab/tree/{name}?token={TOKEN}")
    page.wait_for_selector(f"{PANEL} .jp-Cell", timeout=90_000)
    end = time.monotonic() + 90
    while not _has_idle_kernel(address):
        assert time.monotonic() < end, "the kernel did not become idle in 90 s"
        time.sleep(0.25)
    idle = f"{PANEL} .jp-Notebook-ExecutionIndicator[data-status=idle]"
    page.wait_for_selector(idle, timeout=90_000)


def _has_idle_kernel(address: str) -> bool:
    with urllib.request.urlopen(f"{address}/api/sessions?token={TOKEN}") as answer:  # noqa: S310
        kernels = [session["kernel"] for session in json.load(answer)]
    return any(k["connections"] >= 1 and k["execution_state"] == "idle" for k in kernels)


def run_all(page: Page, timeout_s: float) -> None:
    """Run every cell and fail on any error; a Run All that a fresh kernel drops is repeated."""
    for _ in range(5):
        dialogs = page.locator(".jp-Dialog").all_inner_texts()
        assert dialogs == [], f"JupyterLab asks something: {dialogs}"
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try:
            page.wait_for_function(STARTED, timeout=4000)
            break
        except Error:
            continue
    errors = page.locator(ERRORS)
    end = time.monotonic() + timeout_s
    while not page.evaluate(FINISHED) and errors.count() == 0:
        assert time.monotonic() < end, f"the cells did not finish in {timeout_s:.0f} s"
        time.sleep(0.25)
    assert errors.count() == 0, errors.first.inner_text()[:3000]
