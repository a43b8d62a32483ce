"""The comparison of `adapmoe-lab bench`: which link each row ran on, and what is left of it."""

from dataclasses import replace

import pytest

from adapmoe_lab.engine.loading import known_targets
from adapmoe_lab.profiling.routing.profile import profile
from adapmoe_lab.records import GatingTable, TunedConfig
from adapmoe_lab.tuning import compare as bench

QUICKLY = {"new_tokens": 4, "rounds": 1, "skipped_fractions": (0.25,), "say": lambda _: None}


@pytest.fixture
def model(load_tiny, texts, monkeypatch):
    monkeypatch.setattr(bench, "calibration_texts", lambda: [*texts, *texts])
    return load_tiny(link=known_targets()[0])


def state(model):
    link = model.link
    return link.name, link.bytes_per_s, link.latency_s, model.config.to_json()


def test_a_row_without_a_link_has_none_and_says_so(model):
    before = state(model)
    names = [known_targets()[0], "none"]
    report = bench.run_bench(model, targets=names, **QUICKLY)
    assert [row.link for row in report.rows] == [f"emulated:{names[0]}", "none"]
    assert [row.load_ratio is None for row in report.rows] == [False, True]
    assert [sample["link"] for sample in report.samples] == [f"emulated:{names[0]}"] * 2 + [
        "none"
    ] * 2
    rows = report.table().splitlines()[2:]
    assert rows[1].startswith("| none | none | 25.0% |")
    assert "real" not in report.table()
    assert report.conditions["links"] == [f"emulated:{names[0]}", "none"]
    assert state(model) == before


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_comparison_that_ends_early_leaves_the_model_as_it_was(model, monkeypatch, stop):
    before, calls = state(model), []

    def ends_early(*_, **__):
        calls.append(model.link.name)
        raise stop

    monkeypatch.setattr(bench, "measure_latency", ends_early)
    with pytest.raises(stop):
        bench.run_bench(model, targets=["none"], **QUICKLY)
    assert calls == ["none"]
    assert state(model) == before


def test_an_unknown_link_is_refused_before_the_work(model, monkeypatch):
    monkeypatch.setattr(bench, "profile", lambda *_: pytest.fail("the work had begun"))
    with pytest.raises(ValueError, match="link='pcie9' is unknown; expected one of"):
        bench.run_bench(model, targets=["none", "pcie9"], **QUICKLY)


@pytest.mark.parametrize(
    ("nothing", "told"),
    [
        ({"targets": []}, r"run_bench needs at least one target, such as 'none'; leave targets"),
        (
            {"skipped_fractions": ()},
            r"run_bench needs at least one skipped fraction, such as 0\.25",
        ),
    ],
)
def test_nothing_to_compare_is_refused_before_the_work(model, monkeypatch, nothing, told):
    monkeypatch.setattr(bench, "profile", lambda *_: pytest.fail("the work had begun"))
    with pytest.raises(ValueError, match=told):
        bench.run_bench(model, **{**QUICKLY, **nothing})


def test_a_model_that_skips_is_profiled_with_nothing_skipped(model, monkeypatch):
    untuned = TunedConfig.untuned(model.spec)
    model.apply(replace(untuned, gating=GatingTable.per_layer([0.6] * model.spec.n_layers, 2)))
    before, traces = state(model), []

    def kept(*given):
        traces.append(profile(*given))
        return traces[-1]

    monkeypatch.setattr(bench, "profile", kept)
    bench.run_bench(model, targets=["none"], **QUICKLY)
    assert [trace.recorded_under for trace in traces] == ["ungated"]
    assert state(model) == before
