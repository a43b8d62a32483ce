import pytest
from traces import make_spec

from adapmoe_lab.policies.allocation import budget_bytes, slots_plan, uniform_plan


def test_budget_text_is_read():
    spec = make_spec()  # 24 experts of 1000 bytes
    assert budget_bytes("50%", spec) == 12_000
    assert budget_bytes("2KiB", spec) == 2048
    assert budget_bytes(5000, spec) == 5000
    assert budget_bytes(None, spec) == 24_000
    with pytest.raises(ValueError, match="expert_memory='lots' is not a size: give bytes, or"):
        budget_bytes("lots", spec)


def test_uniform_plan_counts_staging():
    plan = uniform_plan(make_spec(), 12_000)
    assert plan.slots.tolist() == [4, 3, 3]  # 12 slots less 2 for staging
    assert uniform_plan(make_spec(), 24_000).slots.tolist() == [8, 8, 8]


def test_a_budget_too_small_says_what_is_missing():
    with pytest.raises(
        ValueError, match=r"2 slots cannot give 3 layers 1 each; raise the budget by 1 experts"
    ):
        uniform_plan(make_spec(), 4000)
    assert uniform_plan(make_spec(), 4000, min_slots=0).n_slots == 2


def test_slots_plan_range():
    with pytest.raises(ValueError, match=r"must lie in 0\.\.8"):
        slots_plan(make_spec(), 9)
