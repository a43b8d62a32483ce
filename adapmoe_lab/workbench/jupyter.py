"""JupyterLab as this project opens it: at the tour, on this machine only, without prompts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from adapmoe_lab.assets import notebooks_folder

TOUR = "00_tour.ipynb"
SETTINGS = Path(__file__).with_name("jupyter_settings")


def copy_notebooks(folder: Path) -> list[Path]:
    """Copy the shipped notebooks that `folder` lacks and return them; nothing is overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    copied = []
    for source in sorted(notebooks_folder().glob("*.ipynb")):
        target = folder / source.name
        if not target.exists():
            shutil.copyfile(source, target)
            copied.append(target)
    return copied


def lab_command(folder: Path, port: int | None, browser: bool) -> list[str]:
    """Return the command that serves `folder`, reachable from this machine only."""
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.root_dir={folder.resolve()}",
        f"--LabApp.default_url=/lab/tree/{TOUR}",
    ]
    if port is not None:
        command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    if not browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    return command


def lab_environment() -> dict[str, str]:
    """Return the environment in which JupyterLab neither fetches news nor looks for updates."""
    paths = [str(SETTINGS), *filter(None, [os.environ.get("JUPYTER_CONFIG_PATH")])]
    return {**os.environ, "JUPYTER_CONFIG_PATH": os.pathsep.join(paths)}


def open_lab(folder: Path, port: int | None = None, browser: bool = True) -> int:
    """Serve the notebooks of `folder` until it is stopped; return JupyterLab's exit status.

    Where the system allows it this process becomes JupyterLab, so that whatever stops the one
    stops the other.
    """
    command, environment = lab_command(folder, port, browser), lab_environment()
    if os.name == "posix":
        os.execve(command[0], command, environment)  # noqa: S606 our own command line
    return subprocess.run(command, env=environment).returncode  # noqa: S603
