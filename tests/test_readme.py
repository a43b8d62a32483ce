"""What the README names exists."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


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
