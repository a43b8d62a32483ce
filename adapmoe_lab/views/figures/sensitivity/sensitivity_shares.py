"""Which layers each way of estimating sensitivity holds expensive, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.records import SensitivityProfile
from adapmoe_lab.records.standard_error import error_text
from adapmoe_lab.simulation.statistics.layer_costs import layer_costs, shares_of_total
from adapmoe_lab.views.figures import theme

REFERENCE = "divergence"
"""What the others are judged by: measured, and with the least noise."""
N_COLUMNS = 3
HEIGHT_PER_ROW = 190
MARKERS_UP_TO = 16


@dataclass(frozen=True, eq=False)
class SensitivitySharesInfo:
    """Shares of the cost of all layers, each skipping alone, by N estimators.

    Attributes:
        names: of the estimators.
        share: float64 [N, L], of the summed cost; NaN where that is not above zero.
        share_se: float64 [N, L], its standard error.
        reference: name of the estimator the others are judged by.
        skipped_fraction: what each layer skips of its own expert activations.
        n_tokens: tokens all were measured on.
    """

    names: tuple[str, ...]
    share: NDArray[np.float64]
    share_se: NDArray[np.float64]
    reference: str
    skipped_fraction: float
    n_tokens: int

    @property
    def even_share(self) -> float:
        """What every layer has if all cost the same."""
        return 1 / self.share.shape[1]

    @property
    def error(self) -> NDArray[np.float64]:
        """Root mean square of the standard errors over the even share, float64 [N]."""
        return np.sqrt((self.share_se**2).mean(axis=1)) / self.even_share


def sensitivity_shares_info(
    profiles: Mapping[str, SensitivityProfile],
    skipped_fraction: float = 0.25,
    reference: str = REFERENCE,
) -> SensitivitySharesInfo:
    """Compare estimators at an equal skip of every layer.

    Args:
        profiles: by name of the estimator, as `lab.sensitivities` returns them.
        skipped_fraction: what each layer skips of its own expert activations.
        reference: name of the estimator the others are judged by.

    Raises:
        ValueError: the reference is not among the profiles, or no layer can skip as much.
    """
    check_reference(reference, profiles)
    shares = [shares_of_total(*layer_costs(p, skipped_fraction)) for p in profiles.values()]
    share, share_se = np.array(shares).transpose(1, 0, 2)
    return SensitivitySharesInfo(
        names=tuple(profiles),
        share=share,
        share_se=share_se,
        reference=reference,
        skipped_fraction=skipped_fraction,
        n_tokens=profiles[reference].n_tokens,
    )


def check_reference(reference: str, profiles: Mapping[str, SensitivityProfile]) -> None:
    """Raise ValueError unless there is a profile of that name."""
    if reference not in profiles:
        raise ValueError(
            f"There is no profile of {reference!r} to judge by, only of {', '.join(profiles)}; "
            f"measure it with lab.sensitivities(model, texts, [{reference!r}, ...])."
        )


def plot_sensitivity_shares(info: SensitivitySharesInfo) -> go.Figure:
    """Draw a panel for each estimator, with the reference in grey behind it."""
    grid = theme.panel_grid(len(info.names), N_COLUMNS)
    traces, axes, headings = [], {}, []
    for panel, domains in enumerate(grid):
        number = str(panel + 1) if panel else ""
        place = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        traces += [_reference(info, place), *_estimate(info, panel, place)]
        headings.append(theme.panel_title(domains[0], _heading(info, panel), domains[1][1]))
        axes[f"xaxis{number}"] = {**_layers(info, panel), "domain": domains[0]}
        axes[f"yaxis{number}"] = {**_shares(info, panel), "domain": domains[1]}
        axes[f"xaxis{number}"]["anchor"] = place["yaxis"]
        axes[f"yaxis{number}"]["anchor"] = place["xaxis"]
    return theme.draw(
        traces,
        title="Which layers are expensive?",
        subtitle=f"Each layer alone skips {100 * info.skipped_fraction:g}% of its activations, "
        f"{info.n_tokens:,} tokens; grey: {info.reference}; ±: error over an even share",
        height=110 + HEIGHT_PER_ROW * -(-len(grid) // N_COLUMNS),
        margin={"t": 92},
        showlegend=False,
        annotations=headings,
        **axes,
    )


def _layers(info: SensitivitySharesInfo, panel: int) -> dict[str, Any]:
    is_lowest = panel + N_COLUMNS >= len(info.names)
    return theme.numbered_axis("layer" if is_lowest else "", info.share.shape[1], n_labels=8)


def _shares(info: SensitivitySharesInfo, panel: int) -> dict[str, Any]:
    """Return an axis that all panels share; noise beyond twice the reference leaves it."""
    reference = info.names.index(info.reference)
    share, error = info.share[reference], info.share_se[reference]
    top = 2 * float(np.nanmax([*share, *(share + error), info.even_share]))
    bottom = float(np.nanmin([0, *(info.share - info.share_se).ravel()]))
    return {
        "title": {"text": "share of the cost" if panel % N_COLUMNS == 0 else ""},
        "range": [max(bottom, -0.25 * top), top],
        "tickformat": ".0%",
        "zeroline": True,
        "zerolinecolor": theme.FAINT,
    }


def _heading(info: SensitivitySharesInfo, panel: int) -> str:
    error = info.error[panel]
    known = error_text(error, ".0%")
    if np.isnan(info.share[panel]).any():
        known = "sum is not above zero"
    return f"<b>{info.names[panel]}</b>  {known}"


def _reference(info: SensitivitySharesInfo, place: dict[str, str]) -> go.Scatter:
    reference = info.names.index(info.reference)
    share, error = info.share[reference], info.share_se[reference]
    grey = theme.CHANCE_BAND
    return theme.band(np.arange(len(share)), share - error, share + error, fillcolor=grey, **place)


def _estimate(info: SensitivitySharesInfo, panel: int, place: dict[str, str]) -> list[go.Scatter]:
    share, error = info.share[panel], info.share_se[panel]
    layers = np.arange(len(share))
    line = go.Scatter(
        x=layers,
        y=share,
        customdata=theme.error_texts(error, ".1%"),
        mode="lines+markers" if len(layers) <= MARKERS_UP_TO else "lines",
        line={"color": theme.BLUE, "width": 1.5},
        marker={"size": 6},
        hovertemplate=f"{info.names[panel]}, layer %{{x}}<br><b>%{{y:.1%}}</b> "
        "%{customdata}<extra></extra>",
        **place,
    )
    return [theme.band(layers, share - error, share + error, **place), line]
