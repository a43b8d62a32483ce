"""Rules that choose cuts: what they skip, what that costs, how fast they answer."""

import itertools
import time

import numpy as np
import pytest
from traces import make_sensitivity, make_spec, make_trace

from adapmoe_lab.policies.gating.adapmoe import AdapMoERule, adapmoe_cut
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.policies.gating.least_loss import LeastLoss
from adapmoe_lab.policies.gating.registry import RULES, largest_skipped_fraction
from adapmoe_lab.policies.gating.uniform import UniformCut
from adapmoe_lab.records import OFF


@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.4])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_meets_the_skipped_fraction(name, fraction, top_k):
    trace = make_trace(make_spec(top_k=top_k), n_tokens=1000)
    table = RULES[name](trace, make_sensitivity(trace.spec)).table(fraction)
    assert 1 - kept_experts(trace, table).mean() == pytest.approx(fraction, abs=0.003)


def test_impossible_fraction_is_refused():
    with pytest.raises(ValueError, match=r"must lie in 0\.\.0\.5 for top-2 .*got 0\.6"):
        UniformCut(make_trace()).table(0.6)


def test_adapmoe_rule_is_its_formula():
    sensitivity = np.array([46.7, 1.0, 0.02])
    cuts = adapmoe_cut(0.005, sensitivity)
    shares = np.linspace(0.5, 1, 1001)
    for cut, s in zip(cuts, sensitivity, strict=True):
        np.testing.assert_array_equal(shares >= cut, (1 - shares) ** 2 * s <= 0.005)
    assert (adapmoe_cut(0.0, sensitivity) == OFF).all()


def test_least_loss_under_the_fisher_curve_is_the_adapmoe_rule():
    """The rule drops a token where (1 - W)^2 S <= T: the marginal cost of the Fisher curve."""
    trace = make_trace(n_tokens=4000)
    sensitivity = curves_of_the_fisher_penalty(trace, [9.0, 3.0, 1.0])
    for fraction in (0.05, 0.15, 0.3):
        least = LeastLoss(trace, sensitivity).table(fraction)
        rule = AdapMoERule(trace, sensitivity).table(fraction)
        agreement = (kept_experts(trace, least) == kept_experts(trace, rule)).mean()
        assert agreement > 0.99


def curves_of_the_fisher_penalty(trace, fisher):
    """Return a profile whose curves are S_l x mean (1 - share)^2 over the tokens each cut skips."""
    from dataclasses import replace

    profile = make_sensitivity(trace.spec, fisher)
    best = trace.shares.max(axis=2).astype(np.float64)
    cuts = np.linspace(0.5, 1.0, 257)
    reached = best[None] >= cuts[:, None, None]  # [B, T, L]
    increase = (reached * (1 - best) ** 2).mean(axis=1).T * np.asarray(fisher)[:, None]
    return replace(
        profile,
        cuts=cuts,
        increase_nats=increase,
        increase_se=increase / 10,
        first_order=np.zeros(increase.shape),
        first_order_se=np.zeros(increase.shape),
        skipped=reached.mean(axis=1).T / 2,
    )


def test_least_loss_equals_brute_force_over_the_offers_of_every_layer():
    trace = make_trace(n_tokens=300)
    profile = curves_of_the_fisher_penalty(trace, [9.0, 3.0, 1.0])
    offered = np.r_[profile.cuts[::32], OFF]
    rule = LeastLoss(trace, profile)
    for combination in itertools.product(offered, repeat=3):
        cuts = np.array(combination)
        skipped = (trace.shares.max(axis=2) >= cuts).mean() / 2
        best = profile.total_increase(rule.table(skipped).cuts[:, 0])[0]
        assert best <= profile.total_increase(cuts)[0] * 1.01 + 1e-6


def test_the_loss_budget_is_spent_and_kept():
    trace = make_trace(n_tokens=2000)
    sensitivity = make_sensitivity(trace.spec)
    for name, prepare in RULES.items():
        rule = prepare(trace, sensitivity)
        fraction = largest_skipped_fraction(rule, sensitivity, 2, 0.002)
        predicted = sensitivity.total_increase(rule.table(fraction).cuts[:, 0])[0]
        assert 0.0018 < predicted <= 0.002, name


def test_a_slider_over_64_layers_gets_its_answer_in_time():
    trace = make_trace(make_spec(n_layers=64, n_experts=16, top_k=4), n_tokens=2000)
    sensitivity = make_sensitivity(trace.spec, np.geomspace(9, 0.1, 64))
    rule = LeastLoss(trace, sensitivity)
    for solve in (
        lambda: rule.table(0.3),
        lambda: largest_skipped_fraction(rule, sensitivity, 4, 0.01),
    ):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            solve()
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.05
