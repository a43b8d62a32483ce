"""The command that opens JupyterLab: what is copied, and where it listens."""

import os
from pathlib import Path

import pytest

from adapmoe_lab.workbench.jupyter import TOUR, copy_notebooks, lab_command, lab_environment


def test_missing_notebooks_are_copied_and_none_is_overwritten(tmp_path):
    folder = tmp_path / "mine"
    assert TOUR in [path.name for path in copy_notebooks(folder)]
    (folder / TOUR).write_text("my own work")
    assert copy_notebooks(folder) == []
    assert (folder / TOUR).read_text() == "my own work"


def test_it_listens_on_this_machine_only(tmp_path):
    command = lab_command(tmp_path, 8899, browser=False)
    assert "--ServerApp.ip=127.0.0.1" in command
    assert "--ServerApp.port=8899" in command
    assert "--no-browser" in command
    assert "--no-browser" not in lab_command(tmp_path, None, browser=True)


def test_settings_come_first_and_a_users_own_stay(monkeypatch):
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "theirs")
    ours, theirs = lab_environment()["JUPYTER_CONFIG_PATH"].split(os.pathsep)
    assert theirs == "theirs"
    assert (Path(ours) / "labconfig" / "page_config.json").exists()


@pytest.mark.parametrize("root", [True, False])
def test_root_is_allowed_only_where_it_is_root(tmp_path, monkeypatch, root):
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000, raising=False)
    assert ("--allow-root" in lab_command(tmp_path, None, browser=True)) is root
