import numpy as np
import pytest
from traces import make_sensitivity, make_spec, make_trace

from adapmoe_lab.records import RecordError, RoutingTrace


def test_saved_trace_reads_back_equal(tmp_path):
    trace = make_trace()
    again = RoutingTrace.load(trace.save(tmp_path / "trace.npz"))
    assert again.fingerprint() == trace.fingerprint()
    assert again.spec == trace.spec
    assert again.labels == trace.labels
    for name in ("token_ids", "expert_indices", "weights", "router_probs", "sequence_starts"):
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name))
    predicted = again.predictions["next_router"][1]
    np.testing.assert_array_equal(predicted, trace.predictions["next_router"][1])


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
    assert part.predictions["next_router"][1].shape[0] == 60


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
