"""Figures in two steps: `x_info` computes from a record, `plot_x` only draws."""

from adapmoe_lab.views.figures.expert_use import ExpertUseInfo, expert_use_info, plot_expert_use
from adapmoe_lab.views.figures.layer_bars import LayerBarsInfo, layer_bars_info, plot_layer_bars
from adapmoe_lab.views.figures.load_heterogeneity import (
    LoadHeterogeneityInfo,
    load_heterogeneity_info,
    plot_load_heterogeneity,
)
from adapmoe_lab.views.figures.published_accuracy import (
    AccuracyCurve,
    PublishedAccuracyInfo,
    plot_published_accuracy,
    published_accuracy_info,
)
from adapmoe_lab.views.figures.published_cuts import (
    PublishedCutsInfo,
    plot_published_cuts,
    published_cuts_info,
)
from adapmoe_lab.views.figures.sensitivity import (
    SensitivityInfo,
    plot_sensitivity,
    sensitivity_info,
)
from adapmoe_lab.views.figures.token_routing import (
    TokenRoutingInfo,
    plot_token_routing,
    token_routing_info,
)
from adapmoe_lab.views.figures.tradeoff import (
    MeasuredPoint,
    TradeoffInfo,
    plot_tradeoff,
    tradeoff_info,
)

__all__ = [
    "AccuracyCurve",
    "ExpertUseInfo",
    "LayerBarsInfo",
    "LoadHeterogeneityInfo",
    "MeasuredPoint",
    "PublishedAccuracyInfo",
    "PublishedCutsInfo",
    "SensitivityInfo",
    "TokenRoutingInfo",
    "TradeoffInfo",
    "expert_use_info",
    "layer_bars_info",
    "load_heterogeneity_info",
    "plot_expert_use",
    "plot_layer_bars",
    "plot_load_heterogeneity",
    "plot_published_accuracy",
    "plot_published_cuts",
    "plot_sensitivity",
    "plot_token_routing",
    "plot_tradeoff",
    "published_accuracy_info",
    "published_cuts_info",
    "sensitivity_info",
    "token_routing_info",
    "tradeoff_info",
]
