from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from traces import make_sensitivity, make_spec, make_trace

from adapmoe_lab.records import Prediction, RecordError, RoutingTrace

VERSION_1 = Path(__file__).parent.parent / "fixtures" / "routing_trace_v1.npz"


def predicted(shape, expert=0):
    return Prediction(np.full(shape, expert), np.zeros(shape))


def test_saved_trace_reads_back_equal(tmp_path):
    trace = make_trace()
    again = RoutingTrace.load(trace.save(tmp_path / "trace.npz"))
    assert again.fingerprint() == trace.fingerprint()
    assert again.spec == trace.spec
    assert again.labels == trace.labels
    for name in ("token_ids", "expert_indices", "weights", "router_probs", "sequence_starts"):
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name))
    (predicted,), (expected,) = (t.predictions["next_router"].values() for t in (again, trace))
    np.testing.assert_array_equal(predicted.experts, expected.experts)
    np.testing.assert_array_equal(predicted.scores, expected.scores)


def test_a_trace_of_the_chosen_experts_only_reads_back_equal(tmp_path):
    whole = make_trace()
    trace = whole.chosen_only()
    assert trace.router_probs is None
    assert not trace.predictions
    np.testing.assert_array_equal(trace.expert_indices, whole.expert_indices)
    np.testing.assert_allclose(trace.weights, whole.weights, rtol=2**-11)
    again = RoutingTrace.load(trace.save(tmp_path / "trace.npz"))
    assert again.router_probs is None
    assert again.fingerprint() == trace.fingerprint()
    np.testing.assert_array_equal(again.weights, trace.weights)
    assert again.weights.dtype == np.float32
    assert again.expert_indices.dtype == np.int16
    part = again.of_sequences([1]).first(10)
    np.testing.assert_array_equal(part.expert_indices, trace.expert_indices[100:110])
    assert part.router_probs is None
    with pytest.raises(RecordError, match=r"without router_probs.*Record the model with `profile`"):
        again.all_router_probs()


def stored_dtypes(path):
    with np.load(path) as arrays:
        return arrays["expert_indices"].dtype, arrays["weights"].dtype


def test_files_hold_smaller_types_only_where_they_are_exact(tmp_path):
    chosen = make_trace(n_tokens=12).chosen_only()
    assert stored_dtypes(chosen.save(tmp_path / "half.npz")) == (np.uint8, np.float16)
    whole = make_trace(make_spec(n_experts=300), n_tokens=12)
    assert whole.expert_indices.max() > 255
    assert stored_dtypes(whole.save(tmp_path / "whole.npz")) == (np.int16, np.float32)
    large = replace(chosen, weights=np.full((12, 3, 2), 1e6))
    assert stored_dtypes(large.save(tmp_path / "large.npz")) == (np.uint8, np.float32)
    for name, trace in (("whole", whole), ("large", large)):
        again = RoutingTrace.load(tmp_path / f"{name}.npz")
        np.testing.assert_array_equal(again.expert_indices, trace.expert_indices)
        np.testing.assert_array_equal(again.weights, trace.weights)


def test_a_file_of_version_2_must_have_all_scores(tmp_path, monkeypatch):
    trace = make_trace(n_tokens=12)
    monkeypatch.setattr("adapmoe_lab.records.routing.SCHEMA_VERSION", 2)
    whole = trace.save(tmp_path / "whole.npz")
    without = trace.chosen_only().save(tmp_path / "without.npz")
    monkeypatch.undo()
    np.testing.assert_array_equal(RoutingTrace.load(whole).router_probs, trace.router_probs)
    with pytest.raises(RecordError, match="lacks 'router_probs'"):
        RoutingTrace.load(without)


def test_a_file_that_lost_its_scores_is_refused(tmp_path):
    path = make_trace().save(tmp_path / "trace.npz")
    with np.load(path) as saved:
        arrays = {name: saved[name] for name in saved.files if name != "router_probs"}
    np.savez(path, **arrays)
    with pytest.raises(RecordError, match="router_probs"):
        RoutingTrace.load(path)


def test_arrays_cannot_be_written():
    trace = make_trace()
    with pytest.raises(ValueError, match="read-only"):
        trace.weights[0, 0, 0] = 1.0


@pytest.mark.parametrize("kept_bytes", [0, 10, 2000])
def test_cut_file_is_refused(tmp_path, kept_bytes):
    path = make_trace().save(tmp_path / "trace.npz")
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(RecordError, match=r"not a readable routing-trace.*Record it again"):
        RoutingTrace.load(path)


def test_other_record_is_refused(tmp_path):
    path = make_sensitivity().save(tmp_path / "profile.npz")
    with pytest.raises(RecordError, match="holds a 'sensitivity-profile'; expected a 'routing-tr"):
        RoutingTrace.load(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="No routing-trace at"):
        RoutingTrace.load(tmp_path / "none.npz")


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = make_trace(seed=1).save(tmp_path / "trace.npz")
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        make_trace(seed=2).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_shares_sum_to_one_for_routers_that_do_not_normalise():
    trace = make_trace()
    values = {name: getattr(trace, name) for name in trace.__dataclass_fields__}
    scaled = RoutingTrace(**{**values, "weights": trace.weights * 2.5})
    np.testing.assert_allclose(scaled.shares, trace.shares, rtol=1e-6)


def test_as_decode_gives_every_token_a_step():
    decode = make_trace(tokens_per_step=50).as_decode()
    assert decode.is_decode.all()
    assert len(np.unique(decode.step_ids)) == decode.n_tokens


def test_first_cuts_everything_alike():
    part = make_trace(n_tokens=200).first(60)
    assert part.n_tokens == 60
    assert part.labels == ("first",)
    assert part.predictions["next_router"][1].experts.shape[0] == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weights": np.ones((4, 3, 1))},
            r"weights must have shape \[200, 3, 2\], got \[4, 3, 1\]",
        ),
        ({"expert_indices": np.full((200, 3, 2), 8)}, r"must lie in 0\.\.7"),
        ({"labels": ("one",)}, "2 sequences need as many labels"),
        ({"sequence_starts": [5]}, "ascending sequence_starts from 0"),
        ({"step_ids": np.arange(200)[::-1]}, "must not descend"),
        (
            {"predictions": {"mine": {2: predicted((199, 3, 2))}}},
            r"mine/2 must have shape \[200, 3, 1 or more\], got \[199, 3, 2\]",
        ),
        (
            {"predictions": {"mine": {2: predicted((200, 3, 2), 8)}}},
            r"mine/2 must name experts 0\.\.7, or -1",
        ),
    ],
)
def test_wrong_parts_are_named(change, message):
    trace = make_trace()
    values = {name: getattr(trace, name) for name in trace.__dataclass_fields__}
    with pytest.raises(RecordError, match=message):
        RoutingTrace(**{**values, **change})


def test_spec_refuses_impossible_counts():
    with pytest.raises(RecordError, match="top_k=9 exceeds the 8 experts"):
        make_spec(top_k=9)


def test_a_version_1_file_reads_without_its_predictions():
    old, new = RoutingTrace.load(VERSION_1), make_trace(n_tokens=12)
    assert not old.predictions
    for name in ("token_ids", "expert_indices", "weights", "router_probs", "step_ids"):
        np.testing.assert_array_equal(getattr(old, name), getattr(new, name))


def test_a_version_of_the_future_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("adapmoe_lab.records.routing.SCHEMA_VERSION", 4)
    path = make_trace(n_tokens=12).save(tmp_path / "trace.npz")
    monkeypatch.undo()
    with pytest.raises(
        RecordError, match=r"version 4; this adapmoe-lab reads version 1 or 2 or 3\."
    ):
        RoutingTrace.load(path)


def test_what_was_predicted_tells_traces_apart():
    trace = make_trace()
    (given,) = trace.predictions["next_router"].values()
    others = [
        {},
        {"next_router": {2: given}},
        {"mine": {1: given}},
        {"next_router": {1: Prediction(given.experts, given.scores / 2)}},
    ]
    changed = [replace(trace, predictions=predictions) for predictions in others]
    assert len({t.fingerprint() for t in (trace, *changed)}) == 5


def test_scores_must_fit_their_experts():
    with pytest.raises(RecordError, match=r"predicted scores must have shape \[4, 3, 2\], got"):
        Prediction(np.zeros((4, 3, 2)), np.zeros((4, 3, 1)))


def test_sequences_are_taken_in_the_order_given():
    trace = make_trace(
        n_tokens=200, tokens_per_step=30
    )  # a step reaches from the first to the second
    part = trace.of_sequences([1, 0, 1])
    tokens = np.r_[100:200, 0:100, 100:200]
    np.testing.assert_array_equal(part.token_ids, trace.token_ids[tokens])
    np.testing.assert_array_equal(
        part.predictions["next_router"][1].experts, trace.expert_indices[tokens]
    )
    assert part.sequence_starts.tolist() == [0, 100, 200]
    assert part.labels == ("second", "first", "second")
    assert np.bincount(part.step_ids).tolist() == [20, 30, 30, 20, 30, 30, 30, 10, 20, 30, 30, 20]
    with pytest.raises(RecordError, match="A trace needs tokens"):
        trace.of_sequences([])
