"""The benchmark of prompts, at a tiny geometry on the CPU: what needs no GPU."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("prefill", "decode_bench", "given_routing", "stock_decoding")


@pytest.fixture
def prefill(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import prefill

    monkeypatch.setattr(prefill, "LENGTHS", (3, 9))
    yield prefill
    for name in MODULES:
        sys.modules.pop(name, None)


def test_every_row_says_how_far_from_its_bound_it_is(prefill, tmp_path):
    out = tmp_path / "prefill.json"
    given = ["--geometry", "tiny", "--device", "cpu", "--folder", str(tmp_path)]
    assert prefill.main([*given, "--out", str(out), "--traces", str(tmp_path / "traces")]) == 0
    saved = json.loads(out.read_text())
    assert [(row["share_of_experts_with_slots"], row["n_tokens"]) for row in saved["rows"]] == [
        (1.0, 3), (1.0, 9), (0.5, 3), (0.5, 9),
    ]  # fmt: skip
    for row in saved["rows"]:
        bound = max(row["empty_slots"]["link_ms"], row["stock_ms"])
        ratio = row["empty_slots"]["ours_ms"] / bound
        assert row["empty_slots"]["times_the_bound"] == pytest.approx(ratio)
        assert row["median_relative_error_of_last_logits"] < 0.1
        assert len(row["ours_s"]) == len(row["stock_s"]) == len(row["bytes"])
    assert saved["rows"][0]["bytes"][0] > 0
    assert saved["conditions"]["executor"] == "host"
    assert len(list((tmp_path / "traces").iterdir())) == 2
