"""The house: no circles of files, nothing too long to read, and every room on its floor."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "adapmoe_lab"
MOST_LINES, MOST_FUNCTION_LINES = 350, 50
REASON = re.compile(r"# Long(?: on purpose)?: \S+ \S+ \S+")
"""What a comment begins with that says why a function is long: above it, or where its code begins.
It holds for the functions inside, too. Docstrings do not count as length."""

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]


def imported(name: str, tree: ast.AST) -> set[str]:
    """Return the files of the package that a file imports when it runs, anywhere in it."""
    found = set()
    for node in running_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                found.add(inside if inside in FILES else node.module)
    return (found & set(FILES)) - {name}


def running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield every node but those that only a type checker reads."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        return
    yield tree
    for child in ast.iter_child_nodes(tree):
        yield from running_nodes(child)


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the groups of files of which each imports all others, directly or not."""
    reached = {name: set(following) for name, following in graph.items()}
    changed = True
    while changed:
        changed = False
        for following in reached.values():
            more = set().union(*(reached[name] for name in following)) - following
            following |= more
            changed |= bool(more)
    looped = {name for name, following in reached.items() if name in following}
    groups = {frozenset(other for other in looped & reached[name]) for name in looped}
    return [set(group) for group in groups]


def test_a_circle_is_found_wherever_its_imports_stand():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert circles(graph) == [{"b", "c"}]
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import adapmoe_lab.cli\n"
        "def f():\n    from adapmoe_lab import assets\n"
    )
    assert imported("one", tree) == {"adapmoe_lab.assets"}


def test_no_files_import_each_other_in_a_circle():
    trees = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
    assert circles({name: imported(name, tree) for name, tree in trees.items()}) == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_can_be_read_in_one_go(name):
    assert len(FILES[name].read_text().splitlines()) <= MOST_LINES


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many lines a function has without its docstring."""
    first = function.body[0]
    documented = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) else 0
    return function.end_lineno - function.lineno + 1 - documented


def has_reason(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> bool:
    """Whether a comment says why a function is long."""
    start = min([function.lineno, *(d.lineno for d in function.decorator_list)])
    code = [*function.body[1 if ast.get_docstring(function) else 0 :], function.body[-1]]
    beside = [lines[start - 2], *lines[function.lineno : code[0].lineno]]
    comments = [line.strip() for line in beside]
    return any(map(REASON.match, comments))


def unexplained(
    tree: ast.AST, lines: list[str]
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function without a reason, of its own or of one that it lies in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if has_reason(node, lines):
                continue
            yield node
        yield from unexplained(node, lines)


def test_a_reason_counts_only_beside_its_function():
    body = "    x = 1\n" * 60
    for source, expected in (
        (f"\ndef f():\n{body}", False),
        (f"# Long: one table after another.\ndef f():\n{body}", True),
        (f'\ndef f():\n    """Say."""\n    # Long: one table after another.\n{body}', True),
        (f"\ndef f():\n    # Long on purpose: one table after another.\n{body}", True),
        (f"\ndef f():\n{body}    # Long: one table after another.\n{body}", False),
        (f"\ndef f():\n    # Long: no.\n{body}", False),
    ):
        function = ast.parse(source).body[0]
        assert code_lines(function) > MOST_FUNCTION_LINES
        assert has_reason(function, source.splitlines()) is expected


@pytest.mark.parametrize("name", FILES)
def test_a_long_function_has_a_reason_beside_it(name):
    source = FILES[name].read_text()
    long = [
        f"{function.name}, {code_lines(function)} lines"
        for function in unexplained(ast.parse(source), source.splitlines())
        if code_lines(function) > MOST_FUNCTION_LINES
    ]
    assert not long, "split it, or say why in a comment that begins with '# Long: '"


def rooms(folder: Path) -> set[str]:
    """Return the packages and modules right inside a package."""
    return {
        path.stem
        for path in folder.iterdir()
        if (path / "__init__.py").exists() or (path.suffix == ".py" and path.stem != "__init__")
    }


def test_every_room_has_a_floor():
    """A contract that knows every room fails on a new one; every package of a floor has one."""
    layered = {
        container: contract
        for contract in CONTRACTS["contracts"]
        for container in contract.get("containers", [])
    }
    assert all(contract.get("exhaustive") for contract in layered.values())
    for name, path in FILES.items():
        if path.name == "__init__.py" and len(rooms(path.parent)) > 1 and name.count(".") < 2:
            assert name in layered or name in FLAT, f"{name} has no layers of its own"
    for container, contract in layered.items():
        named = {room for layer in contract["layers"] for room in re.split(r"\s*[|:]\s*", layer)}
        named |= set(contract.get("exhaustive_ignores", []))
        there = rooms(PACKAGE.joinpath(*container.split(".")[1:]))
        assert named == there, f"{container}: {sorted(named ^ there)}"


FLAT = {"adapmoe_lab.records", "adapmoe_lab.demo"}
"""Packages of files beside each other; circles are refused there too."""

DEVICE_WORK = re.compile(r"cuda\.(?:Stream|CUDAGraph|graph\b|stream\b|graphs\b|Event)")


def test_only_the_engine_uses_streams_and_graphs():
    users = {
        name.split(".")[1] for name, path in FILES.items() if DEVICE_WORK.search(path.read_text())
    }
    assert users == {"engine"}
