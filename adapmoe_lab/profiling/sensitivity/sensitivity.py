"""What skipping experts costs, layer by layer: estimated from gradients, or measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.loss import token_sequences
from adapmoe_lab.evaluation.texts import Texts
from adapmoe_lab.profiling.sensitivity.estimators import ESTIMATORS, MEASURED, OF_ALL
from adapmoe_lab.profiling.sensitivity.gradient_terms import GradientTerms, gradient_terms
from adapmoe_lab.profiling.sensitivity.loss_change import LossChanges, loss_changes
from adapmoe_lab.records import OFF, GatingTable, SensitivityProfile, Surrogates, TunedConfig
from adapmoe_lab.records.arguments import strings
from adapmoe_lab.records.progress import Progress
from adapmoe_lab.records.sensitivity import NOTHING, RENORMALISED
from adapmoe_lab.records.standard_error import nan_if_unknown
from adapmoe_lab.simulation.statistics.jackknife import jackknife

Floats = NDArray[np.float64]

N_CUTS = 33
ABLATED = (0.15, 0.3, 0.5, 0.7, 0.85, 1.0)
"""Where one layer skips alone, as shares of the experts that can be skipped at all."""
ANCHORS = (0.1, 0.2, 0.3)
"""Where all layers skip at once, as fractions of all expert activations."""
LARGEST_ANCHOR = 0.9
"""And once more far beyond: the share of the experts that can be skipped at all."""
TINY = 1e-15
"""A standard error below any that texts give, in nats per token."""


def sensitivity(
    model: LabModel,
    texts: Texts,
    *,
    estimator: str = "directional",
    renormalise: bool = False,
    compensation: Surrogates | None = None,
    max_tokens: int = 256,
    anchored: bool = True,
    progress: Progress | None = None,
) -> SensitivityProfile:
    """Measure how much the loss depends on each layer's experts.

    Every profile has AdapMoE's S_l, the trace of the Fisher information of the summed next-token
    loss with respect to layer l's expert output (arXiv 2408.10284, section 4.1), and a curve for
    each layer: the loss increase at every cut, as the estimator sees it. With `anchored` all layers
    skip at once at a few cuts, and the increase is predicted as its first-order part and so much of
    the curves as was measured there. First-order parts do add up over layers.

    Args:
        model: the model; experts are read from the store, its configuration plays no part.
        texts: calibration texts the model has not memorised, one sequence each.
        estimator: one of `profiling.sensitivity.estimators`: from gradients, `fisher`,
            `fisher-change`, `directional` or `second-order`; measured one layer at a time,
            `ablation` or `divergence`, which take about 6 L forward passes per text.
        renormalise: whether the weights of the experts kept are scaled up for those skipped.
        compensation: surrogates of skipped experts; the surrogates' gain takes the place of
            `renormalise`.
        max_tokens: longer texts are cut to this many tokens.
        anchored: whether to complete the estimate by what all layers together are measured to do.
        progress: called with (done, total, text); what it raises stops the run.

    Raises:
        ValueError: the estimator is unknown, there is no text, one is too short or something else,
            or there is both `renormalise` and `compensation`.
    """
    return sensitivities(
        model,
        texts,
        [estimator],
        renormalise=renormalise,
        compensation=compensation,
        max_tokens=max_tokens,
        anchored=anchored,
        progress=progress,
    )[estimator]


def sensitivities(
    model: LabModel,
    texts: Texts,
    estimators: str | Iterable[str] = (*ESTIMATORS, *MEASURED),
    *,
    renormalise: bool = False,
    compensation: Surrogates | None = None,
    max_tokens: int = 256,
    anchored: bool = True,
    progress: Progress | None = None,
) -> dict[str, SensitivityProfile]:
    """Measure the sensitivity in several ways on the same texts; see `sensitivity`."""
    names = list(dict.fromkeys(strings("estimators", estimators)))
    known = (*ESTIMATORS, *MEASURED)
    for name in names:
        if name not in known:
            raise ValueError(f"estimator={name!r} is unknown; expected one of {', '.join(known)}.")
    if renormalise and compensation is not None:
        raise ValueError(
            "renormalise=True and compensation exclude each other: the surrogates' gain says what "
            "becomes of the weights kept. Leave one of them out."
        )
    sequences = token_sequences(model, texts, max_tokens)
    ungated = replace(TunedConfig.untuned(model.spec), compensation=compensation)
    cuts = np.linspace(1 / max(2, model.spec.top_k), 1.0, N_CUTS)
    from_gradients = [name for name in names if name in ESTIMATORS]
    with model.running(ungated), model.engine.reading_store():
        terms = _gradient_pass(model, sequences, from_gradients, cuts, renormalise, progress)
    assembly = _Assembly(model, sequences, cuts, terms, renormalise, compensation)
    profiles = {
        name: assembly.estimated(name, number) for number, name in enumerate(from_gradients)
    }
    ablations = assembly.ablations() if set(names) & set(MEASURED) else []
    anchors = assembly.anchors() if anchored else []
    if model.spec.top_k == 1 or not ablations + anchors:
        return profiles
    changes = loss_changes(model, ungated, sequences, [*ablations, *anchors], progress)
    for name in names:
        if name in MEASURED:
            profiles[name] = assembly.measured(name, changes.of_tables(slice(len(ablations))))
    if anchored:
        at_anchors = changes.of_tables(slice(len(ablations), None))
        profiles = {
            name: assembly.anchored(profile, anchors, at_anchors)
            for name, profile in profiles.items()
        }
    return {name: profiles[name] for name in names}


def _gradient_pass(
    model: LabModel,
    sequences: Sequence[torch.Tensor],
    names: Sequence[str],
    cuts: Floats,
    renormalise: bool,
    progress: Progress | None,
) -> list[GradientTerms]:
    found = []
    for done, ids in enumerate(sequences):
        if progress is not None:
            progress(done, len(sequences), "measuring sensitivity")
        found.append(gradient_terms(model, ids, names, cuts, renormalise))
    return found


class _Assembly:
    """Turns what was found on every text into profiles, with errors over texts."""

    def __init__(
        self,
        model: LabModel,
        sequences: Sequence[torch.Tensor],
        cuts: Floats,
        terms: Sequence[GradientTerms],
        renormalise: bool,
        compensation: Surrogates | None,
    ) -> None:
        self._spec = model.spec
        self._most = model.spec.max_skipped_fraction
        self._cuts, self._terms, self._renormalise = cuts, terms, renormalise
        self._stand_in = RENORMALISED if renormalise else NOTHING
        if compensation is not None:
            self._stand_in = compensation.fingerprint()
        self._n_tokens = np.array([len(ids) for ids in sequences])
        self._squares = np.array([text.squares for text in terms])
        self._fisher, self._fisher_se = jackknife(lambda w: w @ self._squares, self._n_tokens)
        weights = self._n_tokens / self._n_tokens.sum()
        self._skipped = np.tensordot(weights, [text.skipped for text in terms], axes=1)  # [L, B]
        first_order = np.array([text.first_order for text in terms])
        self._first_order, self._first_order_se = jackknife(
            lambda w: np.tensordot(w, first_order, axes=1), self._n_tokens
        )

    def estimated(self, name: str, number: int) -> SensitivityProfile:
        """Return the profile of an estimator that uses gradients."""
        terms = np.array([text.terms[number] for text in self._terms])

        def curves(weights: Floats) -> Floats:
            mean = np.tensordot(weights, terms, axes=1)  # [L, B]
            scale = weights @ self._squares if ESTIMATORS[name].times_fisher else 1.0
            return (mean.T * scale).T

        increase, increase_se = jackknife(curves, self._n_tokens)
        return self._profile(name, self._cuts, increase, increase_se)

    def ablations(self) -> list[GatingTable]:
        """Return a table for every layer and cut to measure, in that order."""
        tables = []
        for layer in range(self._spec.n_layers):
            for cut in self._ablated_cuts():
                cuts = np.full(self._spec.n_layers, OFF)
                cuts[layer] = cut
                tables.append(self._table(cuts))
        return tables

    def measured(self, name: str, changes: LossChanges) -> SensitivityProfile:
        """Return the profile whose curves were measured under `ablations`."""
        increase, increase_se = (
            values.reshape(self._spec.n_layers, -1) for values in getattr(changes, f"mean_{name}")
        )
        return self._profile(name, self._ablated_cuts(), increase, increase_se)

    def anchors(self) -> list[GatingTable]:
        """Return tables with one cut for all layers, those that skip least first."""
        fractions = (*ANCHORS, LARGEST_ANCHOR * self._most)
        cuts = self._cuts_skipping(fractions)
        return [self._table(np.full(self._spec.n_layers, cut)) for cut in cuts]

    def anchored(
        self, profile: SensitivityProfile, tables: Sequence[GatingTable], changes: LossChanges
    ) -> SensitivityProfile:
        """Return the profile completed by what was measured with all layers skipping."""
        cuts = [table.cuts[:, 0] for table in tables]
        sums = np.array([profile.total_increase(some)[0] for some in cuts])
        rising = np.flatnonzero(np.diff(np.maximum.accumulate([0.0, *sums])) > 0)
        sums, cuts = sums[rising], [cuts[number] for number in rising]
        loss, loss_se = (values[rising] for values in changes.mean_ablation)
        divergence, divergence_se = (values[rising] for values in changes.mean_divergence)
        if profile.estimator not in OF_ALL:
            profile = replace(
                profile,
                first_order=self._at(profile.cuts, self._first_order),
                first_order_se=self._at(profile.cuts, self._first_order_se),
            )
        first_order = np.array([profile.first_order_increase(some).sum() for some in cuts])
        profile = replace(
            profile,
            anchors=np.stack([sums, divergence, divergence_se], axis=1),
            factor=(loss - first_order) / sums,
            joint_error=np.ones(len(sums)),
        )
        errors = [profile.total_increase(some)[1] for some in cuts]
        independent = np.maximum(nan_if_unknown(errors), TINY)
        return replace(profile, joint_error=loss_se / independent)

    def _table(self, cuts: Floats) -> GatingTable:
        return GatingTable.per_layer(cuts, self._spec.top_k, self._renormalise)

    def _ablated_cuts(self) -> Floats:
        """Return the ascending cuts at which one layer skips alone."""
        return self._cuts_skipping([self._most * share for share in ABLATED])[::-1]

    def _cuts_skipping(self, fractions: Sequence[float]) -> Floats:
        """Return the cut that skips each fraction of all activations, if all layers use it."""
        skipped = self._skipped.mean(axis=0)[::-1]  # ascends where cuts descend
        return np.interp(fractions, skipped, self._cuts[::-1])

    def _profile(
        self, name: str, cuts: Floats, increase: Floats, increase_se: Floats
    ) -> SensitivityProfile:
        is_fisher = name == "fisher"
        return SensitivityProfile(
            model_fingerprint=self._spec.fingerprint(),
            estimator=name,
            stand_in=self._stand_in,
            n_tokens=int(self._n_tokens.sum()),
            n_sequences=len(self._n_tokens),
            cost=self._fisher if is_fisher else increase[:, 0],
            standard_error=self._fisher_se if is_fisher else increase_se[:, 0],
            fisher=self._fisher,
            fisher_se=self._fisher_se,
            cuts=cuts,
            increase_nats=increase,
            increase_se=increase_se,
            first_order=np.zeros(increase.shape),
            first_order_se=np.zeros(increase.shape),
            skipped=self._at(cuts, self._skipped),
        )

    def _at(self, cuts: Floats, values: Floats) -> Floats:
        """Return values [L, B] of the assembly's cuts at others, [L, len(cuts)]."""
        return np.array([np.interp(cuts, self._cuts, row) for row in values])
