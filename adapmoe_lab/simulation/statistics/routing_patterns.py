"""How a model uses its experts: how often, together, again, and for which texts.

Arrays only, so that a recorded trace and a forward pass under way are counted alike; what chance
alone would give is in `adapmoe_lab.simulation.statistics.chance`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.records import RoutingTrace


def expert_use(expert_indices: NDArray[np.integer], n_experts: int) -> NDArray[np.float64]:
    """Return the fraction of tokens routed to each expert, float64 [L, E].

    `expert_indices` is [T, L, K]; a row of the result sums to K.
    """
    n_tokens, n_layers, _ = expert_indices.shape
    counts = [
        np.bincount(expert_indices[:, layer].ravel(), minlength=n_experts)
        for layer in range(n_layers)
    ]
    return np.stack(counts) / n_tokens


def effective_experts(use: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how many evenly used experts would spread the load as widely, float64 [L], 1..E.

    Two to the entropy of the load over experts; `use` is [L, E].
    """
    return 2 ** _entropy_bits(use / use.sum(axis=1, keepdims=True), axis=1)


def overlap(experts: NDArray[np.integer], others: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the share of `experts` that `others` has too, float64 [L]; both are [N, L, K]."""
    found = (experts[:, :, :, None] == others[:, :, None, :]).any(axis=3)  # [N, L, K]
    return found.mean(axis=(0, 2))


def tokens_after(n_tokens: int, sequence_starts: ArrayLike, distance: int) -> NDArray[np.int64]:
    """Return the tokens that have one `distance` before them in their sequence, int64 [N].

    Raises:
        ValueError: no sequence is that long.
    """
    starts = np.zeros(n_tokens, dtype=np.int64)
    starts[np.asarray(sequence_starts)] = np.asarray(sequence_starts)
    places = np.arange(n_tokens) - np.maximum.accumulate(starts)  # within the sequence
    tokens = np.flatnonzero(places >= distance)
    if not len(tokens):
        raise ValueError(
            f"Locality compares each token with the one {distance} before it, but no sequence of "
            f"this trace has more than {places.max() + 1} tokens. Profile longer texts."
        )
    return tokens


def locality(
    expert_indices: NDArray[np.integer], sequence_starts: ArrayLike, distance: int = 1
) -> NDArray[np.float64]:
    """Return the share of a token's experts that the token `distance` before used, float64 [L].

    `expert_indices` is [T, L, K]; `sequence_starts` [S] holds the first token of each sequence.

    Raises:
        ValueError: no sequence has a token so far before another.
    """
    tokens = tokens_after(len(expert_indices), sequence_starts, distance)
    return overlap(expert_indices[tokens], expert_indices[tokens - distance])


def locality_by_chance(use: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the locality of tokens that choose alike but independently, float64 [L].

    `use` is [L, E], as `expert_use` gives it.
    """
    return (use**2).sum(axis=1) / use.sum(axis=1)


def co_activation(experts: NDArray[np.integer], n_experts: int) -> NDArray[np.int64]:
    """Return how many tokens use both experts of each pair, int64 [E, E], zero on the diagonal.

    `experts` [T, K] are one layer's.
    """
    chosen = np.zeros((len(experts), n_experts), dtype=np.float32)  # exact up to 2^24 tokens
    np.put_along_axis(chosen, experts.astype(np.int64), 1.0, axis=1)
    together = (chosen.T @ chosen).astype(np.int64)
    np.fill_diagonal(together, 0)
    return together


def pairs_given_use(together: NDArray[np.integer], n_rounds: int = 1000) -> NDArray[np.float64]:
    """Return the pairs to expect if partners were chosen by their use alone, float64 [E, E].

    Every expert keeps the number of partners it has in `together` [E, E], and the count of a pair
    is a product of one factor per expert, zero on the diagonal (quasi-independence); the factors
    are found by iterative proportional fitting.
    """
    partners = together.sum(axis=1).astype(np.float64)
    factors = np.sqrt(partners)
    for _ in range(n_rounds):
        offered = factors * (factors.sum() - factors)
        ratio = np.divide(partners, offered, out=np.zeros_like(partners), where=offered > 0)
        factors = factors * np.sqrt(ratio)
    expected = np.outer(factors, factors)
    np.fill_diagonal(expected, 0)
    return expected


def use_by_sequence(trace: RoutingTrace) -> NDArray[np.int64]:
    """Return how many tokens of each sequence use each expert, int64 [S, L, E]."""
    n_layers, n_experts = trace.spec.n_layers, trace.spec.n_experts
    counts = np.zeros((len(trace.sequence_starts), n_layers, n_experts), dtype=np.int64)
    ends = [*trace.sequence_starts[1:], trace.n_tokens]
    for sequence, (start, end) in enumerate(zip(trace.sequence_starts, ends, strict=True)):
        experts = trace.expert_indices[start:end].transpose(1, 0, 2).reshape(n_layers, -1)
        np.add.at(counts[sequence], (np.arange(n_layers)[:, None], experts), 1)
    return counts


def counts_by_label(
    by_sequence: NDArray[np.integer], labels: ArrayLike, n_labels: int
) -> NDArray[np.float64]:
    """Return the sum over the sequences of each label, float64 [L, D, E].

    `by_sequence` is [S, L, E]; `labels` [S] numbers the label of each sequence.
    """
    belongs = np.eye(n_labels)[np.asarray(labels)]  # [S, D]
    return np.einsum("sd,sle->lde", belongs, by_sequence.astype(np.float64), optimize=True)


def label_information(counts: NDArray[np.number]) -> NDArray[np.float64]:
    """Return the mutual information of label and expert in bits, from counts [..., D, E].

    What one expert of one token tells about the label of its text: 0 if every label uses the
    experts alike, at most the entropy of the labels.
    """
    joint = counts / counts.sum(axis=(-2, -1), keepdims=True)
    of_labels = _entropy_bits(joint.sum(axis=-1), axis=-1)
    of_experts = _entropy_bits(joint.sum(axis=-2), axis=-1)
    return of_labels + of_experts - _entropy_bits(joint, axis=(-2, -1))


def _entropy_bits(
    probabilities: NDArray[np.float64], axis: int | tuple[int, ...]
) -> NDArray[np.float64]:
    logs = np.log2(np.where(probabilities > 0, probabilities, 1.0))
    return -(probabilities * logs).sum(axis=axis)
