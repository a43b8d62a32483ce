"""Which precision every expert is stored in: told apart, kept whole, or said not to be known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import make_spec, make_trace

from adapmoe_lab.policies.allocation.slots import budget_bytes, slots_plan, uniform_plan
from adapmoe_lab.records import (
    PRECISIONS,
    MoESpec,
    PrecisionPlan,
    RecordError,
    RoutingTrace,
    TunedConfig,
)

SAVED = Path(__file__).parent.parent / "fixtures" / "saved_by_0_1"
HALF, OTHER_HALF = [["int4", "int8"]] * 2, [["int8", "int4"]] * 2
BYTES = {"int4": 50, "int8": 90}


def plan_of(names):
    return PrecisionPlan(names, [[BYTES[name] for name in layer] for layer in names])


def test_as_many_of_each_precision_are_not_the_same_layout():
    one, other = plan_of(HALF), plan_of(OTHER_HALF)
    assert str(one) == str(other) == "2 x int4, 2 x int8"
    assert one.n_bytes == other.n_bytes == 280
    assert one != other
    assert one.fingerprint() != other.fingerprint()
    assert one.n_unlike(other) == 4
    again = plan_of(HALF)
    assert (one, one.fingerprint(), hash(one)) == (again, again.fingerprint(), hash(again))


def test_one_precision_has_a_name():
    plan = PrecisionPlan.uniform("bf16", (2, 3), [[10], [20]])
    assert (plan.name, str(plan), plan.shape) == ("bfloat16", "bfloat16", (2, 3))
    assert plan.expert_bytes.tolist() == [[10] * 3, [20] * 3]
    assert not plan.expert_bytes.flags.writeable
    assert plan_of(HALF).name is None


@given(
    names=st.integers(1, 4).flatmap(
        lambda n_experts: st.lists(
            st.lists(st.sampled_from(sorted(PRECISIONS)), min_size=n_experts, max_size=n_experts),
            min_size=1,
            max_size=4,
        )
    ),
    has_bytes=st.booleans(),
)
def test_reads_back_equal(names, has_bytes):
    sizes = [[10 * len(name) for name in layer] for layer in names] if has_bytes else None
    plan = PrecisionPlan(names, sizes)
    values = json.loads(json.dumps(plan.to_json()))
    assert PrecisionPlan.from_json(plan.shape, values) == plan


def test_what_is_alike_is_written_once():
    assert PrecisionPlan.uniform("int4", (9, 9), 50).to_json() == {"experts": "int4", "bytes": 50}
    rows = [["int4", "int4"], ["int4", "int8"]]
    expected = {"experts": ["int4", ["int4", "int8"]], "bytes": [50, [50, 90]]}
    assert plan_of(rows).to_json() == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrecisionPlan("int4"), r"names a precision per expert, \[L\]\[E\], got 'int4'"),
        (lambda: PrecisionPlan([["int4"], ["int4", "int8"]]), r"as many experts .* got \[1, 2\]"),
        (lambda: PrecisionPlan([["int5"]]), "'int5' is not a precision experts can be stored in"),
        (lambda: PrecisionPlan(HALF, [[1, 2]]), r"expert_bytes must have shape \[2, 2\], got"),
        (lambda: PrecisionPlan([["int4"]], [[0]]), "takes at least one byte"),
        (
            lambda: PrecisionPlan.from_json((2, 3), {"experts": [["int4"]]}),
            r"an entry per expert, 2 layers of 3; got \[1\]",
        ),
        (lambda: plan_of(HALF).n_unlike(plan_of(HALF[:1])), "Two layouts of one model can be"),
        (
            lambda: replace(make_spec(), precision=plan_of(HALF)),
            r"a model of 3 layers x 8 experts gives the bytes of each, got \[2, 2\]",
        ),
        (
            lambda: replace(TunedConfig.untuned(make_spec()), precision=plan_of(HALF)),
            "plan is for 2 layers of 2 experts; the model has 3 layers of 8",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def spec_of(names):
    spec = make_spec(n_layers=len(names), n_experts=len(names[0]))
    return replace(spec, precision=plan_of(names), expert_bytes=BYTES)


def test_bytes_of_a_mixed_store_are_the_sum_of_its_experts():
    spec = spec_of([["int4", "int8"], ["int4", "int4"]])
    assert spec.all_experts_bytes == 3 * 50 + 90
    assert budget_bytes("50%", spec) == 120
    assert spec.mean_expert_bytes == 60
    assert spec.stored_expert_bytes == 90
    assert slots_plan(spec, 1).slot_bytes.tolist() == [90, 50]
    assert slots_plan(spec, 1).budget_bytes == 140 + 2 * 90
    assert uniform_plan(spec, 2 * 140).slots.tolist() == [2, 2]
    assert MoESpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_known_layout_is_kept_by_trace_and_config(tmp_path):
    trace = make_trace(spec_of(HALF), n_tokens=12)
    again = RoutingTrace.load(trace.save(tmp_path / "trace.npz"))
    assert again.spec.precision == plan_of(HALF) != plan_of(OTHER_HALF)
    config = replace(TunedConfig.untuned(trace.spec), precision=trace.spec.precision)
    read = TunedConfig.load(config.save(tmp_path / "config.json"))
    assert read.precision == plan_of(HALF)
    assert read.to_json() == config.to_json()


def test_a_layout_that_an_old_config_only_calls_mixed_is_not_known():
    documents = [json.loads((SAVED / f"{name}.json").read_text()) for name in ("config_mixed",) * 2]
    one, other = (PrecisionPlan.from_json((3, 4), d["precision"]) for d in documents)
    assert one.names is None
    assert one != other
    assert str(one) == "several precisions, not known which"
    assert TunedConfig.load(SAVED / "config_mixed.json").to_json() == documents[0]
    with pytest.raises(RecordError, match="can be compared, got several precisions, not known"):
        one.n_unlike(plan_of(HALF))


def test_an_old_config_of_one_precision_is_known_and_gets_its_bytes_from_the_trace():
    config, trace = TunedConfig.load(SAVED / "config.json"), RoutingTrace.load(SAVED / "trace.npz")
    assert config.precision == PrecisionPlan.uniform("float32", (3, 4))
    assert trace.spec.sizes_in(config.precision) == trace.spec.precision
    assert trace.spec.precision == PrecisionPlan.uniform("float32", (3, 4), 18432)
    in_int4 = trace.spec.sizes_in(PrecisionPlan.uniform("int4", (3, 4)))
    assert in_int4.expert_bytes.tolist() == [[8672] * 4] * 3


def test_an_old_trace_of_a_mixed_store_counts_every_expert_as_the_widest():
    values = RoutingTrace.load(SAVED / "trace.npz").spec.to_json()
    del values["precision"]
    sizes = {**values["expert_bytes"], "mixed": 18432}
    spec = MoESpec.from_json({**values, "dtype": "mixed", "expert_bytes": sizes})
    assert spec.precision.names is None
    assert spec.all_experts_bytes == 12 * 18432
    assert "mixed" not in spec.expert_bytes
    np.testing.assert_array_equal(spec.sizes_in(None).expert_bytes, spec.stored_bytes)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"experts": "int5"}, "'int5' is not a precision experts can be stored in; give one of"),
        ({"experts": 4}, "4 is not a precision"),
        ({"experts": None}, "None is not a precision"),
        ({"experts": {}}, r"names a precision per expert, \[L\]\[E\], got"),
        ({"experts": "int4", "bytes": "abc"}, r"must be whole numbers, one per expert, .*'abc'"),
        ({"experts": "int4", "bytes": 1.5}, r"must be whole numbers, one per expert, .*1\.5"),
        ({"experts": "int4", "bytes": True}, "must be whole numbers, one per expert, .*True"),
        ({"experts": "int4", "bytes": {}}, r"must be whole numbers, one per expert, .*\{\}"),
        ({"experts": "int4", "bytes": [[None, 1], 1]}, "must be whole numbers, .*None"),
        ({"experts": "int4", "bytes": -1}, "takes at least one byte"),
        ({"experts": "int4", "bytes": 0}, "takes at least one byte"),
    ],
)
def test_what_is_no_plan_is_refused_in_words_with_its_file(tmp_path, values, told):
    with pytest.raises(RecordError, match=rf"The precision plan cannot be used: .*{told}"):
        PrecisionPlan.from_json((2, 2), values)
    document = TunedConfig.untuned(make_spec(2, 2)).to_json()
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({**document, "precision": values}))
    with pytest.raises(RecordError, match=rf"tuned\.json, section 'precision', cannot be .*{told}"):
        TunedConfig.load(path)


@pytest.mark.parametrize(
    ("names", "sizes", "told"),
    [
        (4, None, "names a precision per expert"),
        ([4], None, "names a precision per expert"),
        ([["int4"]], [[1.0]], "must be whole numbers"),
        (None, [[1, 2], [3]], "must be whole numbers"),
    ],
)
def test_what_is_no_table_is_refused_in_words(names, sizes, told):
    with pytest.raises(RecordError, match=told):
        PrecisionPlan(names, sizes)
