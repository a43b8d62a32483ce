"""Two processes that write to one path: whoever reads meanwhile finds one or the other, whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from traces import make_spec, make_trace

from adapmoe_lab.records import RoutingTrace, TunedConfig

N_SAVES = 30

WRITER = f"""
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from traces import make_spec, make_trace
from adapmoe_lab.records import Surrogates, TunedConfig

seed, folder = int(sys.argv[1]), Path(sys.argv[2])
trace = make_trace(seed=seed)
spec = make_spec()
maps = np.full((spec.n_layers, spec.n_experts, 2, spec.hidden_size), seed)
surrogates = Surrogates(
    spec.fingerprint(), maps, maps.swapaxes(2, 3), maps[:, :, 0], np.zeros(spec.n_layers), "none"
)
config = replace(TunedConfig.untuned(spec), compensation=surrogates)
print("ready", flush=True)
sys.stdin.readline()
for _ in range({N_SAVES}):
    trace.save(folder / "traces" / "trace.npz")
    config.save(folder / "exports" / "tuned.json")
"""


@pytest.fixture
def written(tmp_path):
    """Let two processes write to a folder at once, and return it with the processes."""
    tests = Path(__file__).parent.parent
    paths = os.pathsep.join((str(tests.parent), str(tests)))
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "env": {**os.environ, "PYTHONPATH": paths},
    }
    runs = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(seed), str(tmp_path)], **pipes)
        for seed in range(2)
    ]
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * 2
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.close()
    yield tmp_path, runs
    for run in runs:
        run.wait()
        run.stdout.close()


def read_until_done(runs, path: Path, read):
    """Return what was read of a path, again and again, until nobody writes any more."""
    found = []
    while any(run.poll() is None for run in runs):
        if path.exists():
            found.append(read(path))
    assert all(run.returncode == 0 for run in runs)
    return [*found, read(path)]


def test_a_trace_is_one_of_theirs(written):
    folder, runs = written
    theirs = [make_trace(seed=seed).expert_indices.tolist() for seed in range(2)]
    found = read_until_done(runs, folder / "traces" / "trace.npz", RoutingTrace.load)
    assert all(trace.expert_indices.tolist() in theirs for trace in found)
    assert [path.name for path in (folder / "traces").iterdir()] == ["trace.npz"]


def test_a_config_is_one_of_theirs_with_its_own_tensors(written):
    folder, runs = written
    found = read_until_done(runs, folder / "exports" / "tuned.json", TunedConfig.load)
    config = TunedConfig.untuned(make_spec())
    assert all(read.model == config.model for read in found)
    assert len({read.compensation.sha256 for read in found}) <= 2
    names = sorted(path.name for path in (folder / "exports").iterdir())
    assert len(names) == 3, "a JSON, and the tensors of both"
    assert TunedConfig.load(folder / "exports" / "tuned.json").compensation is not None
