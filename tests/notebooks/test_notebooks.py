"""Notebooks are prose: no outputs, no definitions, the model picked in the first code cell."""

import ast
import json
import time

import nbformat
import pytest
from nbclient import NotebookClient

from adapmoe_lab.assets import notebooks_folder

PROMISED_S = {
    "00_tour": 120,
    "01_routing": 60,
    "02_sensitivity": 120,
    "03_gating": 120,
    "04_cache_plan": 90,
    "05_prefetch": 120,
}
"""Seconds each notebook says it takes, on two cores at most."""
LEAVES = {
    "00_tour": ["tuned.json"],
    "04_cache_plan": ["cache_plan.json"],
    "05_prefetch": ["prefetch.json"],
}
"""Files that notebooks leave behind, beside the recordings."""
NOTEBOOKS = sorted(notebooks_folder().glob("*.ipynb"))


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_clean(path):
    for cell in code_cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_defines_nothing_and_picks_its_model_first(path):
    sources = ["".join(cell["source"]) for cell in code_cells(path)]
    assert "lab.load(" in sources[0]
    for source in sources:
        kinds = {type(node) for node in ast.walk(ast.parse(source))}
        assert not kinds & {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, tmp_path):
    """A shared machine may take twice as long as promised."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    start = time.monotonic()
    client.execute()
    assert time.monotonic() - start < 2 * PROMISED_S[path.stem]
    assert sorted(file.name for file in tmp_path.glob("*.json")) == LEAVES.get(path.stem, [])
