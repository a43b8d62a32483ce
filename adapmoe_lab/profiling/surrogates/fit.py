"""Fitting surrogates: small maps that take the place of an expert when a token skips it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.host_driven.expert_sources import StoredExperts
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.loss import token_sequences
from adapmoe_lab.evaluation.texts import Texts
from adapmoe_lab.models.experts import run_expert
from adapmoe_lab.policies.allocation.ranks import affordable_ranks, ranks_by_benefit
from adapmoe_lab.policies.allocation.slots import budget_bytes as bytes_of
from adapmoe_lab.profiling.activations import LayerActivations, recorded_activations
from adapmoe_lab.profiling.surrogates.low_rank import LowRankMap, OutputMetric, fit_low_rank
from adapmoe_lab.records import Surrogates, TunedConfig
from adapmoe_lab.records.arguments import whole_number
from adapmoe_lab.records.files import digest
from adapmoe_lab.records.progress import Progress

METHOD = "reduced-rank ridge regression"
DEFAULT_RANK = 16
MOST_TIMES_EVEN = 4
"""Under a byte budget a layer gets at most this many times the rank of an even division."""

TOKENS_AT_ONCE = 1024


def fit_surrogates(
    model: LabModel,
    texts: Texts,
    *,
    rank: int | None = None,
    budget_bytes: str | float | None = None,
    gradient_weighted: bool = False,
    fit_gain: bool = True,
    max_tokens: int = 512,
    progress: Progress | None = None,
) -> Surrogates:
    """Fit a low-rank surrogate for every expert, and a gain for what is kept beside it.

    The texts are run once, ungated; then layer by layer every expert is read once and regressed on
    the tokens that have a better one, which are those that may skip it. Errors count by the square
    of the router's weight. The slots' room on the device is used for the work meanwhile.

    Args:
        model: the model; its configuration plays no part.
        texts: calibration texts the model has not memorised, one sequence each.
        rank: rank in every layer, 0 for the mean output alone; 16 if there is no budget either.
        budget_bytes: device memory for the surrogates instead: bytes, or text such as `"2%"` of
            all experts. Ranks then differ by layer.
        gradient_weighted: whether errors count by their mean squared effect on the loss, known
            from a backward pass per text; else all directions of the output count alike.
        fit_gain: whether to fit the gain on the kept experts; else it is 0.
        max_tokens: longer texts are cut to this many tokens.
        progress: called with (done, total, text); what it raises stops the run.

    Raises:
        ValueError: rank or budget is out of range, or the router chooses a single expert.
    """
    spec = model.spec
    if spec.top_k < 2:
        raise ValueError(
            f"{spec.model_id} routes every token to one expert; none can be skipped, so none needs "
            "a surrogate."
        )
    n_ranks, most = _ranks_wanted(model, rank, budget_bytes)
    sequences = token_sequences(model, texts, max_tokens)
    fits = _fit_layers(model, sequences, most, gradient_weighted, progress)
    ranks = ranks_by_benefit(np.stack([fit.worth for fit in fits]), n_ranks)
    cut = [fit.of_rank(rank) for fit, rank in zip(fits, ranks, strict=True)]
    return Surrogates(
        model_fingerprint=spec.fingerprint(),
        down=[layer.down for layer in cut],
        up=[layer.up for layer in cut],
        offset=[layer.offset for layer in cut],
        gain=[layer.gain[-1] if fit_gain else 0.0 for layer in cut],
        method=METHOD,
        n_tokens=sum(len(ids) for ids in sequences),
        texts=digest(*(ids.numpy().tobytes() for ids in sequences)),
        gradient_weighted=gradient_weighted,
    )


def _ranks_wanted(model: LabModel, rank: int | None, budget: str | float | None) -> tuple[int, int]:
    """Return how many ranks all layers have together, and the most that one may have."""
    n_layers, width = model.spec.n_layers, model.spec.hidden_size
    if budget is not None:
        if rank is not None:
            raise ValueError("Give either rank or budget_bytes, which decides the ranks.")
        n_bytes = bytes_of(budget, model.spec, "budget_bytes")
        n_ranks = affordable_ranks(model.spec, n_bytes, model.hf.dtype.itemsize)
        return n_ranks, min(MOST_TIMES_EVEN * -(-n_ranks // n_layers), width)
    rank = DEFAULT_RANK if rank is None else rank
    rank = whole_number("rank", rank, at_least=0, at_most=width)
    return n_layers * rank, rank


@dataclass(frozen=True, eq=False)
class _LayerFit:
    """What was fitted for one layer; its first r ranks are the best fit of rank r.

    Attributes:
        down: float32 [E, R, D].
        up: float32 [E, D, R].
        mean: float32 [E, D].
        at_centre: float32 [E, R], what `down` makes of the mean input.
        gain: float64 [R + 1], the best gain beside the maps of every rank.
        worth: float64 [R], what every further rank takes off the error.
    """

    down: NDArray[np.float32]
    up: NDArray[np.float32]
    mean: NDArray[np.float32]
    at_centre: NDArray[np.float32]
    gain: NDArray[np.float64]
    worth: NDArray[np.float64]

    @property
    def offset(self) -> NDArray[np.float32]:
        """What an expert's map adds to up @ down @ x, [E, D]."""
        return self.mean - np.einsum("edr,er->ed", self.up, self.at_centre)

    def of_rank(self, rank: int) -> _LayerFit:
        """Return the fit of a lower rank."""
        return replace(
            self,
            down=self.down[:, :rank],
            up=self.up[:, :, :rank],
            at_centre=self.at_centre[:, :rank],
            gain=self.gain[: rank + 1],
            worth=self.worth[:rank],
        )


class _Samples:
    """One layer's recorded tokens on the device, and what their experts make of them."""

    def __init__(self, model: LabModel, layer: int, seen: LayerActivations) -> None:
        device, n_experts = model.engine.device, model.spec.n_experts
        self.hidden = seen.hidden.to(device)
        self.indices = torch.from_numpy(seen.indices).to(device)
        is_chosen = self.indices < n_experts
        self.weights = torch.from_numpy(seen.weights).to(device, torch.float64) * is_chosen
        best = self.weights.argmax(dim=1, keepdim=True)
        self.may_skip = is_chosen.scatter(1, best, False)
        self.n_experts = n_experts
        self.metric = None
        if seen.gradient is not None:
            self.metric = OutputMetric.of_gradients(seen.gradient.to(device, torch.float64))
        self._layer = layer
        self._module = model.layers[layer].experts
        self._source = StoredExperts(model.store, device)

    def outputs(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield every chosen expert, its tokens [n], their columns [n] and outputs [n, D]."""
        chosen = self.indices[self.indices < self.n_experts].unique().tolist()
        for expert, weights in self._source.fetch_experts(self._layer, chosen, self.hidden):
            tokens, columns = torch.nonzero(self.indices == expert, as_tuple=True)
            with torch.autocast(self.hidden.device.type, enabled=False):  # as the engine runs them
                parts = [
                    run_expert(self._module, weights, self.hidden[part]).double()
                    for part in tokens.split(TOKENS_AT_ONCE)
                ]
            yield expert, tokens, columns, torch.cat(parts)


def _fit_layers(
    model: LabModel,
    sequences: Sequence[torch.Tensor],
    max_rank: int,
    gradient_weighted: bool,
    progress: Progress | None,
) -> list[_LayerFit]:
    """Run the sequences, then fit layer by layer; the room of the slots is free meanwhile."""
    fits = []
    with model.running(TunedConfig.untuned(model.spec)):
        model.engine.release()
        with recorded_activations(
            model, sequences, gradients=gradient_weighted, progress=progress
        ) as activations:
            for layer in range(model.spec.n_layers):
                if progress is not None:
                    progress(layer, model.spec.n_layers, "fitting surrogates")
                samples = _Samples(model, layer, activations.layer(layer))
                fits.append(_fit_layer(samples, max_rank))
    return fits


@torch.no_grad()
def _fit_layer(samples: _Samples, max_rank: int) -> _LayerFit:
    kept = torch.zeros_like(samples.hidden, dtype=torch.float64)
    skipped = torch.zeros_like(kept)
    none = kept[:0]
    maps = [fit_low_rank(none, none, none[:, 0], max_rank)] * samples.n_experts
    for expert, tokens, columns, output in samples.outputs():
        weights, may_skip = samples.weights[tokens, columns], samples.may_skip[tokens, columns]
        weighted = output * weights[:, None]
        kept[tokens[~may_skip]] += weighted[~may_skip]
        skipped[tokens[may_skip]] += weighted[may_skip]
        inputs = samples.hidden[tokens[may_skip]].double()
        counting = weights[may_skip] ** 2
        maps[expert] = fit_low_rank(inputs, output[may_skip], counting, max_rank, samples.metric)
    worth = torch.stack([one.gains for one in maps]).sum(dim=0)
    if samples.metric is None:
        # Without a metric only shares of a layer's own error compare with those of others.
        worth = worth / (skipped**2).sum().clamp(min=torch.finfo(worth.dtype).tiny)
    return _LayerFit(
        down=_stacked(one.down for one in maps),
        up=_stacked(one.up for one in maps),
        mean=_stacked(one.mean for one in maps),
        at_centre=_stacked(one.down @ one.centre for one in maps),
        gain=_best_gains(samples, maps, kept, skipped).cpu().numpy(),
        worth=worth.cpu().numpy(),
    )


def _best_gains(
    samples: _Samples, maps: Sequence[LowRankMap], kept: torch.Tensor, skipped: torch.Tensor
) -> torch.Tensor:
    """Return the gain of least squared error beside maps of every rank, float64 [R + 1].

    By least squares of what the maps leave of the skipped experts' summed output [T, D] on the
    kept expert's output [T, D] times W_B / W_A, with every expert skipped but the best.
    """
    of_skipped = (samples.weights * samples.may_skip).sum(dim=1)
    ratio = of_skipped / (samples.weights.sum(dim=1) - of_skipped)
    scaled = kept * ratio[:, None]
    counted = scaled if samples.metric is None else samples.metric.applied(scaled)
    along = (skipped * counted).sum().repeat(len(maps[0].gains) + 1)
    for expert, one in enumerate(maps):
        tokens, columns = torch.nonzero(
            (samples.indices == expert) & samples.may_skip, as_tuple=True
        )
        pull = counted[tokens] * samples.weights[tokens, columns, None]
        inputs = samples.hidden[tokens].double() - one.centre
        along -= (pull @ one.mean).sum()
        along[1:] -= ((pull @ one.up) * (inputs @ one.down.T)).sum(dim=0).cumsum(dim=0)
    square = (scaled * counted).sum()
    return along / square if square > 0 else torch.zeros_like(along)


def _stacked(tensors: Iterable[torch.Tensor]) -> NDArray[np.float32]:
    return torch.stack(list(tensors)).float().cpu().numpy()
