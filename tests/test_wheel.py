"""The built wheel, used from an empty folder: the demo model and the notebooks are inside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lab_page import lab_server

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the folder that a freshly built wheel is unpacked into, apart from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("adapmoe_lab-*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    return target


def run_there(installed, folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_the_wheel_and_not_this_checkout_is_used(installed, tmp_path):
    where = run_there(installed, tmp_path, "-c", "import adapmoe_lab; print(adapmoe_lab.__file__)")
    assert Path(where.strip()).is_relative_to(installed)


def test_it_generates_with_the_model_inside(installed, tmp_path):
    arguments = ("-m", "adapmoe_lab.cli", "generate", "demo", "Once upon a time", "--link", "none")
    text = run_there(installed, tmp_path, *arguments, "--max-new-tokens", "8")
    assert text.startswith("Once upon a time")
    assert len(text.split()) > 5


def test_lab_serves_copies_of_the_notebooks(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(installed))
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    for own in (None, "my own work"):
        with lab_server(None, home):
            tour = tmp_path / "adapmoe-lab-notebooks" / "00_tour.ipynb"
            assert tour.exists()
            if own is None:
                tour.write_text("my own work")
    assert tour.read_text() == "my own work"
