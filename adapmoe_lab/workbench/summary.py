"""The five numbers of a setting, predicted beside measured, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapmoe_lab.records.standard_error import error_text
from adapmoe_lab.simulation.simulate import Simulation

NOT_MEASURED = "not measured"

STYLE = """<style>
.adapmoe-tiles{display:flex;flex-wrap:wrap;gap:8px;
 font:13px var(--jp-ui-font-family,system-ui,sans-serif);color:var(--jp-ui-font-color1,#222)}
.adapmoe-tiles>div{flex:1 1 92px;min-width:0;border:1px solid var(--jp-border-color2,#ddd);
 border-radius:8px;padding:8px 10px;background:var(--jp-layout-color1,#fff)}
.adapmoe-tiles>div.with-error{flex:1.5 1 138px}
.adapmoe-tiles .name{color:var(--jp-ui-font-color2,#666);font-size:12px}
.adapmoe-tiles .name,.adapmoe-tiles .predicted,.adapmoe-tiles .measured{white-space:nowrap;
 overflow:hidden;text-overflow:ellipsis}
.adapmoe-tiles .predicted{font-size:21px;font-weight:600;font-variant-numeric:tabular-nums}
.adapmoe-tiles .predicted small{font-size:12px;font-weight:400}
.adapmoe-tiles .measured{font-size:12px;color:var(--jp-success-color1,#187a3b);
 font-variant-numeric:tabular-nums}
.adapmoe-tiles .measured.none{color:var(--jp-ui-font-color3,#999)}
</style>"""


@dataclass(frozen=True)
class Tile:
    """One number: its name with the unit, and the values in words; None if not measured."""

    name: str
    predicted: str
    error: str
    measured: str | None


def tiles(prediction: Simulation, measured: Mapping[str, Any]) -> list[Tile]:
    """Return the five tiles of a setting.

    Args:
        prediction: what the setting is predicted to do.
        measured: what was measured under exactly this setting: `latency` and `loss`, or neither.
    """
    latency, loss = measured.get("latency"), measured.get("loss")
    top = _of(latency, "experts_per_token", "{:.2f}")
    nats, error = prediction.loss_increase_nats, prediction.loss_increase_se
    time = prediction.ms_per_token
    return [
        Tile("Experts / token", f"{prediction.mean_experts_per_token:.2f}", "", top),
        Tile(
            "Skipped",
            f"{prediction.skipped_fraction:.1%}",
            "",
            _of(latency, "skipped_fraction", "{:.1%}"),
        ),
        Tile("Hit rate", f"{prediction.mean_hit_rate:.0%}", "", _of(latency, "hit_rate", "{:.0%}")),
        Tile(
            "ms / token",
            "–" if time is None else f"{time:.1f}",
            "",
            _of(latency, "ms_per_token", "{:.1f}"),
        ),
        Tile(
            "Loss, millinats",
            "–" if nats is None else f"{1e3 * nats:+.1f}",
            "" if nats is None else error_text(error, ".1f", 1e3),
            loss
            and f"{1e3 * loss['increase_nats']:+.1f} {error_text(loss['increase_se'], '.1f', 1e3)}",
        ),
    ]


def _of(measured: Mapping[str, Any] | None, name: str, form: str) -> str | None:
    return None if measured is None else form.format(measured[name])


def as_html(shown: Sequence[Tile]) -> str:
    """Return tiles as one HTML fragment; the text in them is ours, none is a user's."""
    return STYLE + '<div class="adapmoe-tiles">' + "".join(_tile(tile) for tile in shown) + "</div>"


def _tile(tile: Tile) -> str:
    below = (
        f'<div class="measured none">{NOT_MEASURED}</div>'
        if tile.measured is None
        else f'<div class="measured">measured {tile.measured}</div>'
    )
    shape = ' class="with-error"' if tile.error else ""
    return (
        f'<div{shape} data-tile="{tile.name}"><div class="name">{tile.name}</div>'
        f'<div class="predicted">{tile.predicted} <small>{tile.error}</small></div>{below}</div>'
    )
