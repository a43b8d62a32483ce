"""Which experts the tokens of one sequence are sent to, and how decided the router is."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.records import RoutingTrace
from adapmoe_lab.views.figures import theme


@dataclass(frozen=True, eq=False)
class TokenRoutingInfo:
    """Routing of N tokens in a row.

    Attributes:
        tokens: text of each token, N of them.
        experts: int16 [L, N, K], the chosen experts, largest share first.
        shares: float32 [L, N, K], their shares in the same order.
        label: label of the sequence.
    """

    tokens: tuple[str, ...]
    experts: NDArray[np.int16]
    shares: NDArray[np.float32]
    label: str

    @property
    def top_share(self) -> NDArray[np.float32]:
        """Share of each token's best expert, float32 [L, N]."""
        return self.shares[:, :, 0]


def token_routing_info(
    trace: RoutingTrace, tokens: Sequence[str], sequence: int = 0, max_tokens: int = 48
) -> TokenRoutingInfo:
    """Collect the routing of the first tokens of one sequence.

    Args:
        trace: recorded routing.
        tokens: text of every token of that sequence, in order.
        sequence: index of the sequence in the trace.
        max_tokens: tokens shown at most.
    """
    ends = [*trace.sequence_starts[1:], trace.n_tokens]
    start, end = int(trace.sequence_starts[sequence]), int(ends[sequence])
    if len(tokens) != end - start:
        raise ValueError(
            f"Sequence {sequence} of the trace has {end - start} tokens, but {len(tokens)} token "
            "texts came; pass the text of each of its tokens."
        )
    shown = slice(start, min(end, start + max_tokens))
    shares = trace.shares[shown].transpose(1, 0, 2)  # [L, N, K]
    order = np.argsort(-shares, axis=2, kind="stable")
    experts = trace.expert_indices[shown].transpose(1, 0, 2)
    return TokenRoutingInfo(
        tokens=tuple(tokens[: shown.stop - shown.start]),
        experts=np.take_along_axis(experts, order, axis=2),
        shares=np.take_along_axis(shares, order, axis=2),
        label=trace.labels[sequence],
    )


def plot_token_routing(info: TokenRoutingInfo) -> go.Figure:
    """Draw the best expert's share of every token and layer; hovering lists the experts."""
    n_layers, n_tokens, top_k = info.shares.shape
    cells = go.Heatmap(
        z=info.top_share,
        zmin=1 / top_k,
        zmax=1,
        colorscale=theme.SEQUENTIAL,
        colorbar=theme.colour_bar("top share", tickformat=".0%", nticks=4),
        text=_hover_texts(info),
        hovertemplate="%{text}<extra></extra>",
    )
    return theme.draw(
        [cells],
        title="Routing of each token",
        subtitle="Dark: one expert carries the token; light: the router is undecided"
        + (f" ({html.escape(info.label)})" if info.label else ""),
        height=theme.heatmap_height(n_layers) + 40,
        xaxis={
            "title": {"text": "token"},
            "range": [-0.5, n_tokens - 0.5],
            "tickvals": np.arange(n_tokens),
            "ticktext": [_visible(token) for token in info.tokens],
            "tickangle": -90 if n_tokens > 20 else -45,
        },
        yaxis=theme.layer_axis(n_layers, range=[n_layers - 0.5, -0.5], showgrid=False),
    )


def _hover_texts(info: TokenRoutingInfo) -> list[list[str]]:
    texts = []
    for layer, (experts, shares) in enumerate(zip(info.experts, info.shares, strict=True)):
        row = []
        for token, chosen, weights in zip(info.tokens, experts, shares, strict=True):
            lines = [f"<b>{_visible(token)}</b>, layer {layer}"]
            lines += [f"expert {e}: {w:.0%}" for e, w in zip(chosen, weights, strict=True)]
            row.append("<br>".join(lines))
        texts.append(row)
    return texts


def _visible(token: str) -> str:
    """Return a token's text with blanks made visible and nothing read as markup."""
    shown = token.replace("\n", "↵").replace("\t", "⇥").strip(" ") or "␣"
    return html.escape(shown)
