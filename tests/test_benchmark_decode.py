"""The benchmark of a decode step, at a tiny geometry on the CPU: what needs no GPU."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from adapmoe_lab.records import RoutingTrace
from adapmoe_lab.records.routing import Prediction
from adapmoe_lab.simulation.replay.replay import replay

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("decode", "decode_rows", "decode_bench", "given_routing", "stock_decoding")

UNCAPTURED = (
    "host", "published shape", "adapmoe host", "stock batched_mm captured",
    "stock generate static", "accelerate",
)  # fmt: skip
"""Rows that run without a GPU and without a compiler."""


@pytest.fixture(scope="module")
def decode():
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import decode

        yield decode
    finally:
        sys.path[:] = before
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def bench(decode, tmp_path_factory):
    from decode_bench import Bench

    bench = Bench("tiny", tmp_path_factory.mktemp("tiny"), torch.device("cpu"), None)
    yield bench
    bench.close()


@pytest.fixture
def routing(decode, bench):
    from given_routing import drawn_routing

    spec = bench.spec
    n_tokens = len(bench.text.ids)
    return drawn_routing(n_tokens, spec.n_layers, spec.n_experts, spec.top_k)


def test_every_row_is_saved_with_its_limit_and_what_fails_with_its_error(decode, tmp_path):
    out = tmp_path / "decode.json"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        rows = ["--rows", "graph", *UNCAPTURED, "--shares", "0.5"]
        code = decode.main(
            ["--geometry", "tiny", "--out", str(out), "--device", "cpu", "--backend", "none",
             "--seconds", "100000", "--folder", str(tmp_path), *rows]
        )  # fmt: skip
    record = json.loads(out.read_text())
    failed = [row for row in record["rows"] if "error" in row]
    assert code == 1, "captured steps need a GPU"
    assert {row["row"] for row in failed} == {"graph"}
    assert "needs a CUDA device" in failed[0]["error"]
    ran = {row["row"]: row for row in record["rows"] if row["routing"] == "drawn"}
    assert set(ran) == {"graph", *UNCAPTURED}
    for name in UNCAPTURED:
        row = ran[name]
        assert len(row["samples_ms"]) == (8 if name == "accelerate" else 64)
        assert 0 < row["limit_ms"] < row["mean_ms"]
        if name != "adapmoe host":
            assert row["largest_and_median_error"][0] < 2e-2, "rounding of bfloat16"
    assert record["not_run"] == []
    assert (tmp_path / "decode-timeline.json.gz").exists()


def test_misses_are_those_of_a_replay(bench, routing):
    from decode_rows import run_host, run_published

    bench.text.use(routing)
    trace = routing.trace(bench.spec)
    steps = np.concatenate([np.zeros(32, dtype=np.int64), np.arange(1, len(bench.text.ids) - 31)])
    at_once = {"prompt at once": steps, "token by token": np.arange(len(steps))}
    keep = np.ones(trace.weights.shape, dtype=np.bool_)
    plan = bench.plan_config(0.5).plan
    for run, name in ((run_host, "prompt at once"), (run_published, "token by token")):
        prompted = RoutingTrace(**{**vars(trace), "step_ids": at_once[name]})
        expected = replay(prompted, keep, plan, "lru").misses.sum(axis=1)[-64:]
        found = run(bench, 0.5)
        assert found.misses.tolist() == expected.tolist(), name
        assert (found.moved_bytes == expected * bench.spec.stored_expert_bytes).all()


def test_routers_choose_what_is_given_or_by_themselves(bench, routing):
    layer = bench.layers[1].router.module
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    bench.text.use(None)
    own = layer(x)
    bench.text.use(routing)
    bench.text.position.fill_(7)
    logits, weights, chosen = layer(x)
    assert torch.equal(logits, own[0])
    assert chosen.tolist() == routing.experts[7:11, 1].tolist()
    given = torch.from_numpy(routing.weights[7:11, 1])
    assert torch.allclose(weights.float(), given, atol=1e-2)
    bench.text.use(None)
    assert torch.equal(layer(x)[2], own[2])


def test_the_limit_is_the_longer_of_reading_and_fetching(decode, bench):
    from decode_bench import Rates, Steps

    n_bytes, rates = bench.spec.stored_expert_bytes, bench.rates
    counts = np.array([0, 6]), np.array([6, 6]), np.array([0, 6 * n_bytes])
    steps = Steps(np.ones(2), *counts, torch.zeros(2, 1))
    try:
        bench.rates = Rates(link=n_bytes, device=100 * n_bytes)
        limits = bench.limits_s(steps)
    finally:
        bench.rates = rates
    embedding = bench.stock.get_input_embeddings().weight.nbytes
    every = sum(p.nbytes for p in bench.stock.parameters())
    dense = every - embedding - n_bytes * bench.spec.n_layers * bench.spec.n_experts
    assert bench.dense_bytes == dense
    assert limits == pytest.approx([0.06 + dense / (100 * n_bytes), 6.0])


def test_a_recording_is_taken_from_its_longest_text(decode, bench, routing):
    from given_routing import recorded_routing

    spec, long = bench.spec, routing.trace(bench.spec)
    two = long.of_sequences([0, 0])
    recording = RoutingTrace(**{**vars(two), "sequence_starts": np.array([0, 40]), "labels": "ab"})
    taken = recorded_routing(recording, 50, spec)
    assert (taken.experts == two.expert_indices[40:90]).all()
    assert taken.name.endswith("predictions drawn"), "there are none"
    assert taken.recall[0] == 0
    assert taken.recall[1:].mean() == pytest.approx(0.85, abs=0.08)
    of_next = np.repeat(two.expert_indices[:, :, :1], 2, axis=2)
    seen = Prediction(of_next, np.zeros(of_next.shape, dtype=np.float16))
    predicting = RoutingTrace(**{**vars(recording), "predictions": {"next_router": {1: seen}}})
    assert recorded_routing(predicting, 50, spec).recall.tolist() == [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="has 212 tokens; 3 layers take 300"):
        recorded_routing(recording, 300, spec)


def test_drawn_routing_keeps_and_predicts_as_often_as_it_says(routing):
    experts = routing.experts
    stays = (experts[1:, :, :, None] == experts[:-1, :, None, :]).any(axis=-1)
    assert all(len(set(chosen)) == 2 for layer in experts for chosen in layer.tolist())
    returns = 0.6 / 7 + 0.4 / 4  # drawn again, alone or with the other
    assert stays.mean() == pytest.approx(0.6 + 0.4 * returns, abs=0.05)
    assert routing.recall[0] == 0
    assert routing.recall[1:].mean() == pytest.approx(0.85, abs=0.05)


def test_runs_are_ordered_by_importance_and_cut_by_time(decode, bench, tmp_path):
    runs = decode.runs_of(list(decode.ROWS), ["drawn", "recorded", "own"], decode.SHARES)
    assert [run.name for run in runs[:4]] == ["graph"] * 4
    assert runs[-1].name == "accelerate", "it spends the model"
    of_captured = [run.name for run in runs if run.name in ("graph", "graph compiled")]
    assert of_captured == ["graph"] * 12 + ["graph compiled"] * 12, "what is compiled stays so"
    assert len(set(runs)) == len(runs)
    out = tmp_path / "none.json"
    command = ["--geometry", "tiny", "--out", str(out), "--seconds", "0"]
    record = {"rows": []}
    decode.run_all(bench, decode.parsed(command), record)
    assert record["rows"] == []
    saved = json.loads(out.read_text())
    assert len(saved["not_run"]) == len(
        decode.runs_of(list(decode.ROWS), ["drawn", "own"], decode.SHARES)
    )
