"""Figures in two steps: `x_info` computes from a record, `plot_x` only draws."""

from __future__ import annotations

from typing import Any

from adapmoe_lab.deprecated import moved_name
from adapmoe_lab.views.figures.cache.eviction_loads import (
    EvictionLoadsInfo,
    eviction_loads_info,
    plot_eviction_loads,
    plot_gap_closed,
)
from adapmoe_lab.views.figures.cache.marginal_benefit import (
    MarginalBenefitInfo,
    marginal_benefit_info,
    plot_marginal_benefit,
)
from adapmoe_lab.views.figures.cache.slot_plans import (
    SlotPlansInfo,
    plot_slot_plans,
    slot_plans_info,
)
from adapmoe_lab.views.figures.gating.loss_by_rule import (
    LossByRuleInfo,
    RuleLoss,
    loss_by_rule_info,
    plot_loss_by_rule,
)
from adapmoe_lab.views.figures.gating.published_accuracy import (
    AccuracyCurve,
    PublishedAccuracyInfo,
    plot_published_accuracy,
    published_accuracy_info,
)
from adapmoe_lab.views.figures.gating.published_cuts import (
    PublishedCutsInfo,
    plot_published_cuts,
    published_cuts_info,
)
from adapmoe_lab.views.figures.gating.rule_cuts import (
    RuleCutsInfo,
    plot_rule_cuts,
    rule_cuts_info,
)
from adapmoe_lab.views.figures.gating.surrogates import (
    SurrogatesInfo,
    plot_surrogates,
    surrogates_info,
)
from adapmoe_lab.views.figures.gating.tradeoff import (
    MeasuredPoint,
    TradeoffInfo,
    plot_tradeoff,
    tradeoff_info,
)
from adapmoe_lab.views.figures.layer_bars import LayerBarsInfo, layer_bars_info, plot_layer_bars
from adapmoe_lab.views.figures.prefetch.predictability import (
    PredictabilityInfo,
    plot_predictability,
    predictability_info,
)
from adapmoe_lab.views.figures.prefetch.prefetch_gain import (
    PrefetchGainInfo,
    plot_prefetch_choices,
    plot_prefetch_gain,
    prefetch_gain_info,
)
from adapmoe_lab.views.figures.routing.co_activation import (
    CoActivationInfo,
    co_activation_info,
    plot_co_activation,
)
from adapmoe_lab.views.figures.routing.expert_use import (
    ExpertUseInfo,
    expert_use_info,
    plot_expert_use,
)
from adapmoe_lab.views.figures.routing.load_heterogeneity import (
    LoadHeterogeneityInfo,
    load_heterogeneity_info,
    plot_load_heterogeneity,
)
from adapmoe_lab.views.figures.routing.locality import (
    LocalityInfo,
    locality_info,
    plot_locality,
)
from adapmoe_lab.views.figures.routing.specialisation import (
    SpecialisationInfo,
    plot_specialisation,
    specialisation_info,
)
from adapmoe_lab.views.figures.routing.token_routing import (
    TokenRoutingInfo,
    plot_token_routing,
    token_routing_info,
)
from adapmoe_lab.views.figures.routing.use_against_chance import (
    UseAgainstChanceInfo,
    plot_use_against_chance,
    use_against_chance_info,
)
from adapmoe_lab.views.figures.sensitivity.estimator_agreement import (
    EstimatorAgreementInfo,
    estimator_agreement_info,
    plot_estimator_agreement,
)
from adapmoe_lab.views.figures.sensitivity.sensitivity import (
    SensitivityInfo,
    plot_sensitivity,
    sensitivity_info,
)
from adapmoe_lab.views.figures.sensitivity.sensitivity_shares import (
    SensitivitySharesInfo,
    plot_sensitivity_shares,
    sensitivity_shares_info,
)
from adapmoe_lab.views.figures.sensitivity.sum_of_layers import (
    LayerSums,
    SumOfLayersInfo,
    plot_sum_of_layers,
    sum_of_layers_info,
)
from adapmoe_lab.views.figures.timing.predicted_measured import (
    PredictedMeasuredInfo,
    plot_predicted_measured,
    predicted_measured_info,
)
from adapmoe_lab.views.figures.timing.timeline import TimelineInfo, plot_timeline, timeline_info

__all__ = [
    "AccuracyCurve",
    "CoActivationInfo",
    "EstimatorAgreementInfo",
    "EvictionLoadsInfo",
    "ExpertUseInfo",
    "LayerBarsInfo",
    "LayerSums",
    "LoadHeterogeneityInfo",
    "LocalityInfo",
    "LossByRuleInfo",
    "MarginalBenefitInfo",
    "MeasuredPoint",
    "PredictabilityInfo",
    "PredictedMeasuredInfo",
    "PrefetchGainInfo",
    "PublishedAccuracyInfo",
    "PublishedCutsInfo",
    "RuleCutsInfo",
    "RuleLoss",
    "SensitivityInfo",
    "SensitivitySharesInfo",
    "SlotPlansInfo",
    "SpecialisationInfo",
    "SumOfLayersInfo",
    "SurrogatesInfo",
    "TimelineInfo",
    "TokenRoutingInfo",
    "TradeoffInfo",
    "UseAgainstChanceInfo",
    "co_activation_info",
    "estimator_agreement_info",
    "eviction_loads_info",
    "expert_use_info",
    "layer_bars_info",
    "load_heterogeneity_info",
    "locality_info",
    "loss_by_rule_info",
    "marginal_benefit_info",
    "plot_co_activation",
    "plot_estimator_agreement",
    "plot_eviction_loads",
    "plot_expert_use",
    "plot_gap_closed",
    "plot_layer_bars",
    "plot_load_heterogeneity",
    "plot_locality",
    "plot_loss_by_rule",
    "plot_marginal_benefit",
    "plot_predictability",
    "plot_predicted_measured",
    "plot_prefetch_choices",
    "plot_prefetch_gain",
    "plot_published_accuracy",
    "plot_published_cuts",
    "plot_rule_cuts",
    "plot_sensitivity",
    "plot_sensitivity_shares",
    "plot_slot_plans",
    "plot_specialisation",
    "plot_sum_of_layers",
    "plot_surrogates",
    "plot_timeline",
    "plot_token_routing",
    "plot_tradeoff",
    "plot_use_against_chance",
    "predictability_info",
    "predicted_measured_info",
    "prefetch_gain_info",
    "published_accuracy_info",
    "published_cuts_info",
    "rule_cuts_info",
    "sensitivity_info",
    "sensitivity_shares_info",
    "slot_plans_info",
    "specialisation_info",
    "sum_of_layers_info",
    "surrogates_info",
    "timeline_info",
    "token_routing_info",
    "tradeoff_info",
    "use_against_chance_info",
]

MOVED = {
    "SlotWorthInfo": "figures.MarginalBenefitInfo",
    "StandInsInfo": "figures.SurrogatesInfo",
    "plot_slot_worth": "figures.plot_marginal_benefit",
    "plot_stand_ins": "figures.plot_surrogates",
    "slot_worth_info": "figures.marginal_benefit_info",
    "stand_ins_info": "figures.surrogates_info",
}
"""By the name in notebooks of version 0.1, the public name below `lab`."""


def __getattr__(name: str) -> Any:
    """Return a figure by its name of version 0.1, with a warning."""
    return moved_name(__name__, name, MOVED)
