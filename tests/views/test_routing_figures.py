"""Figures of how experts are used, each against chance."""

from dataclasses import replace

import numpy as np
import pytest
from traces import make_spec, make_trace

from adapmoe_lab.simulation.statistics.chance import choose_uniformly
from adapmoe_lab.simulation.statistics.routing_patterns import co_activation, pairs_given_use
from adapmoe_lab.views import figures
from adapmoe_lab.views.figures import theme
from adapmoe_lab.views.figures.routing.lift import bound_of, lift_cells

KINDS = ("story", "code")


def a_trace(expert_indices, n_experts=8, n_sequences=20):
    """A trace of the given routing [T, L, K], in sequences of one length and two kinds."""
    n_tokens, n_layers, top_k = expert_indices.shape
    trace = make_trace(make_spec(n_layers, n_experts, top_k), n_tokens)
    return replace(
        trace,
        expert_indices=expert_indices,
        sequence_starts=np.arange(n_sequences) * (n_tokens // n_sequences),
        labels=[KINDS[i % 2] for i in range(n_sequences)],
    )


def uniformly_routed(n_layers=6, n_experts=8, top_k=2, n_tokens=2000):
    rng = np.random.default_rng(0)
    layers = [choose_uniformly(rng, n_tokens, n_experts, top_k) for _ in range(n_layers)]
    return a_trace(np.stack(layers, axis=1), n_experts)


def specialised():
    """Layer 0 by chance; layer 1 sends stories to experts 0..3 and code to 4..7."""
    trace = uniformly_routed(n_layers=2)
    experts = trace.expert_indices.copy()
    code = np.repeat([label == "code" for label in trace.labels], 100)
    rng = np.random.default_rng(1)
    experts[:, 1] = choose_uniformly(rng, 2000, 4, 2) + 4 * code[:, None]
    return a_trace(experts)


def test_use_of_a_uniform_router_is_mostly_within_the_band():
    info = figures.use_against_chance_info(uniformly_routed())
    assert info.outside.sum() <= 2 * info.n_outside_by_chance
    assert info.n_outside_by_chance == pytest.approx(0.05 * 48)
    assert info.relative_use.mean() == pytest.approx(1)
    assert info.chance.mean == pytest.approx(1)
    assert (info.effective_experts > 7.9).all()


def test_use_outside_the_band_is_told_from_use_within():
    experts = uniformly_routed(n_layers=2, n_experts=6).expert_indices.copy()
    experts[:, 1] = np.where(experts[:, 1] == 5, 0, experts[:, 1])  # expert 5 unused, 0 doubled
    experts[:, 1, 1] = np.where(experts[:, 1, 0] == experts[:, 1, 1], 1, experts[:, 1, 1])
    info = figures.use_against_chance_info(a_trace(experts, n_experts=6))
    assert info.outside[1, [0, 5]].all()
    assert info.relative_use[1, 5] == 0
    figure = figures.plot_use_against_chance(info)
    more, less, within = figure.data[1:]
    n_dots = [len(dots.x) for dots in (more, less, within)]
    assert sum(n_dots) == 12
    assert n_dots[2] == (~info.outside).sum()
    assert [1, 0] in more.customdata.tolist()
    assert [1, 5] in less.customdata.tolist()
    assert np.round(np.concatenate([more.x, less.x, within.x])).tolist().count(1) == 6
    assert f"{info.outside.sum()} of 12 outside" in figure.layout.title.text


def test_co_activation_is_measured_against_both_kinds_of_chance():
    trace = make_trace(make_spec(n_experts=6, top_k=3), n_tokens=400)
    info = figures.co_activation_info(trace, layer=2)
    counts = co_activation(trace.expert_indices[:, 2], 6)
    apart = ~np.eye(6, dtype=bool)
    assert np.array_equal(info.together[apart], counts[apart])
    assert info.lift[apart] == pytest.approx(counts[apart] / (400 * 3 * 2 / (6 * 5)))
    assert info.lift_given_use[apart] == pytest.approx(
        counts[apart] / pairs_given_use(counts)[apart]
    )
    for diagonal in (info.together, info.lift, info.lift_given_use):
        assert np.isnan(np.diag(diagonal)).all()
    assert not np.diag(info.outside).any()
    assert not np.diag(info.outside_given_use).any()


def test_popular_experts_that_ignore_each_other_are_told_from_a_pair():
    """Uneven use lifts pairs over a uniform router, but not over use; a real pair does both."""
    rng = np.random.default_rng(4)
    popularity = np.array([8.0, 6, 1, 1, 1, 1, 1, 1])
    pairs = np.triu(np.outer(popularity, popularity), 1)
    pairs[2, 3] *= 12
    drawn = rng.choice(64, 4000, p=pairs.ravel() / pairs.sum())
    info = figures.co_activation_info(a_trace(np.stack([drawn // 8, drawn % 8], 1)[:, None]), 0)
    assert info.lift[0, 1] > 4
    assert info.outside[0, 1]
    assert info.lift_given_use[0, 1] < 1.3
    assert info.lift_given_use[2, 3] > 3
    assert info.outside_given_use[2, 3]


def test_a_router_of_one_expert_has_no_pairs():
    with pytest.raises(ValueError, match=r"top-1 router .*there are no pairs"):
        figures.co_activation_info(make_trace(make_spec(top_k=1)), 0)


def test_what_chance_explains_is_neutral_and_the_diagonal_a_hole():
    lift = np.array([[np.nan, 3.0, 1.4], [0.0, np.nan, 9.0]])
    outside = np.array([[False, True, False], [True, False, True]])
    cells = lift_cells(lift, outside, bound=4.0)
    assert np.isnan(cells.z[0, 0])
    assert np.isnan(cells.z[1, 1])
    assert cells.z[0, 2] == 0
    assert cells.z[0, 1] == pytest.approx(np.log2(3))
    assert (cells.z[1, 0], cells.z[1, 2]) == (-2.0, 2.0)
    assert (0.5, theme.MIDDLE) in cells.colorscale
    assert dict(zip(cells.colorbar.ticktext, cells.colorbar.tickvals, strict=True))["×1"] == 0


@pytest.mark.parametrize(
    ("lifts", "bound"),
    [([1.1, 0.8], 2.0), ([0.4, 1.2], 2.5), ([3.0], 3.0), ([0.0], 4.0), ([], 2.0)],
)
def test_colours_reach_as_far_as_the_lifts_within_limits(lifts, bound):
    assert bound_of(np.array(lifts)) == pytest.approx(bound)


def test_locality_of_a_uniform_router_lies_in_the_band_at_every_distance():
    info = figures.locality_info(uniformly_routed(n_layers=40))
    assert info.distances.tolist() == [1, 2, 4, 8, 16, 32, 64]
    assert info.n_pairs.tolist() == [20 * (100 - d) for d in info.distances]
    outside = [info.uniform.outside(by_distance) for by_distance in info.locality.T]
    assert np.mean(outside) < 0.1
    assert info.same_use == pytest.approx(0.25, abs=0.01)


def test_locality_of_repeating_tokens_is_drawn_over_the_band():
    trace = a_trace(np.repeat(uniformly_routed(3, n_tokens=1000).expert_indices, 2, axis=0))
    info = figures.locality_info(trace)
    assert info.locality[0] == pytest.approx(0.5 + 0.25 / 2, abs=0.03)
    assert info.locality[1] == pytest.approx(0.25, abs=0.03)
    assert info.uniform.outside(info.locality.T)[:, 0].all()
    figure = figures.plot_locality(info)
    found = next(trace for trace in figure.data if trace.name == "found")
    assert np.array_equal(found.y, info.locality[0])
    assert (
        f"{info.locality[0].mean():.0%} were used by the token before" in figure.layout.title.text
    )


def test_locality_of_short_sequences_stops_where_they_end():
    trace = a_trace(uniformly_routed(n_tokens=100).expert_indices, n_sequences=20)
    assert figures.locality_info(trace).distances.tolist() == [1, 2, 4]


def test_specialisation_is_found_where_it_is_and_only_there():
    info = figures.specialisation_info(specialised())
    assert info.labels == ("code", "story")
    assert info.label_bits == pytest.approx(1.0)
    assert info.information_bits == pytest.approx([0.0, 1.0], abs=0.01)
    assert info.shuffled.outside(info.information_bits).tolist() == [False, True]
    assert info.uniform.outside(info.information_bits).tolist() == [False, True]
    assert info.excess_bits[0] == pytest.approx(0, abs=0.005)
    assert info.layer == 1
    assert info.lift == pytest.approx(np.repeat([[0, 2], [2, 0]], 4, axis=1))
    assert info.outside.all()
    by_chance = figures.specialisation_info(specialised(), layer=0)
    assert by_chance.layer == 0
    assert by_chance.outside.mean() < 0.3


@pytest.mark.parametrize("labels", [["one"] * 20, [f"text {i}" for i in range(20)]])
def test_specialisation_needs_kinds_of_text(labels):
    trace = replace(uniformly_routed(), labels=labels)
    with pytest.raises(ValueError, match=r"20 texts .* different labels; pass lab\.profile"):
        figures.specialisation_info(trace)


def test_kinds_are_shown_as_they_are_and_never_as_markup():
    trace = specialised()
    trace = replace(trace, labels=[label.replace("code", "<b>c") for label in trace.labels])
    figure = figures.plot_specialisation(figures.specialisation_info(trace))
    assert figure.layout.yaxis2.ticktext == ("&lt;b&gt;c", "story")
    assert figure.data[-1].text[0][0].startswith("&lt;b&gt;c, expert 0")
