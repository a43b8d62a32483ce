"""What follows from a model's shape."""

import pytest
from traces import make_spec

from adapmoe_lab.records import PrefetchSource, PrefetchTable
from adapmoe_lab.records.prefetch import buffer_bytes


@pytest.mark.parametrize(("top_k", "most"), [(1, 0.0), (2, 0.5), (8, 0.875)])
def test_one_expert_is_always_run(top_k, most):
    spec = make_spec(n_experts=16, top_k=top_k)
    assert spec.max_skipped_fraction == most
    assert spec.experts_run(most) == 1
    assert spec.experts_run(0.0) == top_k


def test_a_table_takes_the_room_of_its_buffer():
    spec = make_spec()
    table = PrefetchTable([PrefetchSource("next_router", 1, [[0.5]] * spec.n_layers)], 3)
    assert table.n_bytes(100) == buffer_bytes(3, 100) == 300
