"""The README's own code, run as it stands."""

import re
from pathlib import Path

import pytest

from adapmoe_lab.records import TunedConfig

README = Path(__file__).parent.parent / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102 our own example
    assert "Once upon a time" in capsys.readouterr().out
    config = TunedConfig.load("tuned.json")
    assert config.evidence["verified"] is True
    assert config.evidence["measured"]["loss_increase_nats"] <= 0.01


def test_every_make_target_it_names_exists():
    makefile = (README.parent / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)", "\n".join(blocks("sh"))))
    assert targets >= {"lab", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_its_pictures_and_links_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith("http")]
    assert "docs/workbench.png" in local
    for link in local:
        assert (README.parent / link).exists(), link
