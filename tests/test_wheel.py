"""The built wheel, used from an empty folder: the demo model and the notebooks are inside.

With it goes all that the project does, without a warning: over the tested releases of what it
needs, and over the newest ones on the newest Python, where `make test-install` has put them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lab_page import lab_server

ROOT = Path(__file__).parent.parent
CHAIN = Path(__file__).parent / "whole_chain.py"
PLAIN_INSTALL = ROOT / ".venv" / "plain-install"
PIP = ["-m", "pip", "--quiet", "--disable-pip-version-check"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return a freshly built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, *PIP, "wheel", "--no-deps", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("adapmoe_lab-*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Return the folder that the wheel is unpacked into, apart from this checkout."""
    target = tmp_path_factory.mktemp("installed")
    install = [sys.executable, *PIP, "install", "--no-deps", "--target", target, wheel]
    subprocess.run(install, check=True)
    return target


@pytest.fixture(scope="module")
def newest_python(wheel):
    """Return a Python that has the wheel and the newest releases of what it needs."""
    if not (PLAIN_INSTALL / ".installed").exists():
        pytest.skip(f"make test-install has not made {PLAIN_INSTALL}")
    python = PLAIN_INSTALL / "bin" / "python"
    reinstall = [python, *PIP, "install", "--no-deps", "--force-reinstall", wheel]
    subprocess.run(reinstall, check=True)
    return python


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


def test_the_recording_of_the_third_model_is_inside(installed, tmp_path):
    code = (
        "from adapmoe_lab.assets import recording_file\n"
        "from adapmoe_lab.records import RoutingTrace\n"
        "print(recording_file(), RoutingTrace.load(recording_file()).expert_indices.shape)"
    )
    path, shape = run_there(installed, tmp_path, "-c", code).strip().split(" ", 1)
    assert Path(path).is_relative_to(installed)
    assert shape == "(7168, 16, 8)"


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


def assert_the_chain_is_silent(python, folder, environment):
    """Run the whole chain with warnings as errors; nothing is logged as a warning either."""
    command = [python, "-W", "error", CHAIN]
    environment = {**environment, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert not re.search("warning|deprecated", ran.stderr, re.IGNORECASE), ran.stderr
    assert (folder / "tuned.json").exists()


def test_the_whole_chain_runs_without_a_warning(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    assert_the_chain_is_silent(sys.executable, tmp_path, environment)


def test_the_whole_chain_runs_on_the_newest_python_without_a_warning(newest_python, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    assert_the_chain_is_silent(newest_python, tmp_path, environment)
