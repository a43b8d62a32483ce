"""Kept machine code is used exactly while all that it comes from is the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

import adapmoe_lab
from adapmoe_lab.records.files import CACHE_VARIABLE
from adapmoe_lab.simulation.code_digest import UnknownSourceError, code_digest

OUTSIDE = {
    "limits.py": "LIMIT = 1000\n",
    "weights.py": "WEIGHT = 100\n",
    "inner.py": "def inner(x):\n    return x + 1\n",
    "rule.py": """
import limits
from weights import WEIGHT
from inner import inner
from adapmoe_lab.simulation.compiled import inlined
OWN, called_by_rule = 10, inlined(inner)
def rule(x):
    return called_by_rule(x) + OWN + WEIGHT + limits.LIMIT
""",
    "loop.py": """
import rule
from adapmoe_lab.simulation.compiled import compiled, inlined
follow = inlined(rule.rule)
@compiled
def run(x):
    return follow(x) + 10000
""",
}
RUN_OUTSIDE = """
import loop
print(loop.run(0), sum(loop.run.dispatcher.stats.cache_hits.values()))
"""

RUN_ORACLE = """
import numpy as np
from adapmoe_lab.policies.eviction.fixed_point import FIXED_SCORES
from adapmoe_lab.policies.eviction.registry import POLICIES
from adapmoe_lab.simulation.replay.pool import Scores, Steps
from adapmoe_lab.simulation.replay.pool_loops import score_oracle
bits = np.array([[[0.55, 0.45]]], dtype=np.float16).view(np.uint16)
members, starts = np.array([[0, 1]], np.int16), np.array([[0, 2]], np.int32)
steps = Steps(np.array([0, 1]), members, starts, np.zeros((1, 2), np.int32), 0)
ask = score_oracle(POLICIES["hobbit"].oracle_input)
ask(steps, Scores(bits, FIXED_SCORES), 0, *np.zeros((2, 2), int))
print(steps.oracle_inputs.sum(), sum(ask.dispatcher.stats.cache_hits.values()))
"""

TOY = """
from adapmoe_lab.policies.eviction.policy import EvictionPolicy
LATEST, RATE = 2**40, 1
def time_left(clock):
    return LATEST - RATE * clock
def after_use(_, state, use):
    return time_left(use.clock), state
TOY = EvictionPolicy("toy", after_use)
"""
RUN_TOY = """
from toy import TOY
from replays import replay_all
from traces import make_trace
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.eviction.registry import register
from adapmoe_lab.simulation.replay.pool_loops import pool_replay
register(TOY)
trace = make_trace()
replayed = replay_all(trace, slots_plan(trace.spec, 4), "toy")
print(replayed.hits.sum(), sum(pool_replay(TOY).dispatcher.stats.cache_hits.values()))
"""


def run_fresh(code, folder):
    """Return what code prints in a new process that finds modules, and keeps code, in a folder."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
        "PYTHONDONTWRITEBYTECODE": "1",
        CACHE_VARIABLE: str(folder / "cache"),
    }
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return [int(number) for number in ran.stdout.split()]


def edit(path, old, new):
    """Change a file but neither its size nor its times."""
    text, times = path.read_text(), path.stat()
    assert old in text
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)


def test_code_from_outside_the_package_is_compiled_again_when_any_of_it_changed(tmp_path):
    for name, text in OUTSIDE.items():
        (tmp_path / name).write_text(text)
    assert run_fresh(RUN_OUTSIDE, tmp_path) == [11111, 0]
    assert run_fresh(RUN_OUTSIDE, tmp_path) == [11111, 1]
    edit(tmp_path / "inner.py", "x + 1", "x + 2")
    assert run_fresh(RUN_OUTSIDE, tmp_path) == [11112, 0]
    edit(tmp_path / "rule.py", "10,", "20,")
    assert run_fresh(RUN_OUTSIDE, tmp_path) == [11122, 0]
    edit(tmp_path / "weights.py", "100", "200")
    assert run_fresh(RUN_OUTSIDE, tmp_path) == [11222, 0]
    edit(tmp_path / "limits.py", "1000", "2000")
    assert run_fresh(RUN_OUTSIDE, tmp_path) == [12222, 0]
    edit(tmp_path / "loop.py", "10000", "20000")
    assert run_fresh(RUN_OUTSIDE, tmp_path) == [22222, 0]
    assert run_fresh(RUN_OUTSIDE, tmp_path) == [22222, 1]


def test_our_own_policies_are_compiled_again_when_they_changed(tmp_path):
    shutil.copytree(Path(adapmoe_lab.__file__).parent, tmp_path / "adapmoe_lab")
    hobbit = tmp_path / "adapmoe_lab/policies/eviction/hobbit.py"
    assert run_fresh(RUN_ORACLE, tmp_path) == [2, 0]
    edit(hobbit, "(3, 5)", "(1, 5)")
    assert run_fresh(RUN_ORACLE, tmp_path) == [1, 0]
    edit(hobbit, "above <= part", "above >= part")
    assert run_fresh(RUN_ORACLE, tmp_path) == [1, 0]
    assert run_fresh(RUN_ORACLE, tmp_path) == [1, 1]


def test_a_policy_of_one_s_own_is_kept_and_compiled_again_when_it_changed(tmp_path):
    toy = tmp_path / "toy.py"
    toy.write_text(TOY)
    latest_first = run_fresh(RUN_TOY, tmp_path)
    assert latest_first[1] == 0
    assert run_fresh(RUN_TOY, tmp_path) == [latest_first[0], 1]
    edit(toy, "LATEST - RATE", "LATEST + RATE")
    oldest_first = run_fresh(RUN_TOY, tmp_path)
    assert oldest_first[0] > latest_first[0]
    assert oldest_first[1] == 0
    edit(toy, "2**40, 1", "2**40, 0")
    lowest_first = run_fresh(RUN_TOY, tmp_path)
    assert lowest_first[0] != oldest_first[0]
    assert lowest_first[1] == 0
    assert run_fresh(RUN_TOY, tmp_path) == [lowest_first[0], 1]


def test_what_compiled_code_reads_by_name_is_found_when_names_change_places(tmp_path):
    shutil.copytree(Path(adapmoe_lab.__file__).parent, tmp_path / "adapmoe_lab")
    (tmp_path / "toy.py").write_text(TOY)
    n_hits, _ = run_fresh(RUN_TOY, tmp_path)
    fields = [f"    {name}: NDArray[np.int64]\n" for name in ("penalty", "lowest")]
    pool = tmp_path / "adapmoe_lab/simulation/replay/pool.py"
    edit(pool, "".join(fields), "".join(reversed(fields)))
    assert run_fresh(RUN_TOY, tmp_path) == [n_hits, 0]


def function_of(text, **values):
    """Return a function called `f`, defined by its text, that sees these globals."""
    names = {"np": np, "numba": numba, **values}
    exec(text, names)  # noqa: S102
    return names["f"]


READS = "def f(x):\n    return x + value"
CALLS = "def f(x):\n    return value(x)"


@pytest.mark.parametrize(
    ("text", "one", "other"),
    [
        (READS, 1, 2),
        (READS, 1, 1.0),
        (READS, 1, True),
        (READS, (1, (2, 3)), (1, (2, 4))),
        (READS, np.arange(3), np.arange(3) + 1),
        (READS, np.arange(3), np.arange(3.0)),
        (READS, np.int64(1), np.int32(1)),
        (CALLS, numba.njit(lambda x: x + 1), numba.njit(lambda x: x + 2)),
        (CALLS, numba.njit(lambda x: x + 1), numba.njit(fastmath=True)(lambda x: x + 1)),
        (CALLS, numba.njit(lambda x, y=1: x + y), numba.njit(lambda x, y=2: x + y)),
        (CALLS, abs, round),
        ("def f(x):\n    return [x * value for _ in range(3)]", 1, 2),
        ("def f(x):\n    return (lambda y: y + value)(x)", 1, 2),
    ],
)
def test_whatever_is_read_is_told_apart(text, one, other):
    digests = [code_digest(function_of(text, value=value)) for value in (one, one, other)]
    assert digests[0] == digests[1] != digests[2]


def test_closures_and_constants_are_told_apart():
    def adding(number):
        return lambda x: x + number

    assert code_digest(adding(1)) == code_digest(adding(1)) != code_digest(adding(2))
    one, other = (function_of(f"def f(x):\n    return x in {{1, {n}}}") for n in (2, 3))
    assert code_digest(one) != code_digest(other)


def test_where_it_is_defined_and_what_it_does_not_read_do_not_count():
    plain = function_of(READS, value=1)
    moved = function_of("\n\n" + READS, value=1, unread=2)
    assert code_digest(plain) == code_digest(moved)


def test_functions_that_call_each_other_end():
    text = "def g(x):\n    return f(x)\ndef f(x):\n    return g(x) if x else value"
    one, other = function_of(text, value=1), function_of(text, value=2)
    assert code_digest(one) != code_digest(other)


def test_what_cannot_be_followed_is_named():
    with pytest.raises(UnknownSourceError, match=r"Compiled code reads \[1\]: expected .* a list"):
        code_digest(function_of(READS, value=[1]))
