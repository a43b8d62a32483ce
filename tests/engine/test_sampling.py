"""How tokens are chosen, against transformers' own processors and a generator written out."""

from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adapmoe_lab.engine.sampling import (
    Sampler,
    Sampling,
    among_likeliest,
    gumbel_noise,
    penalised,
)

N_TOKENS = 40


def chosen(logits, sampling, position):
    return Sampler(sampling, torch.zeros(position, dtype=torch.long)).choose(logits)


def cut(logits, top_k=N_TOKENS, top_p=np.inf):
    return among_likeliest(logits, torch.tensor(top_k), torch.tensor(top_p))


def mixed(number):
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
    return number ^ (number >> 31)


def after(state, n_steps):
    """Return what SplitMix64 gives after so many steps from a state."""
    return mixed((state + n_steps * 0x9E3779B97F4A7C15) % 2**64)


def test_the_generator_written_out_is_the_published_one():
    """Outputs for the seed 1234567, as implementations publish them to be tested with."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [after(1234567, n) for n in (1, 2, 3)] == published


@pytest.mark.parametrize("seed", [0, 3, -1, 2**63, 2**64 - 1])
def test_noise_is_a_function_of_seed_position_and_token(seed):
    for position in (0, 1, 5000):
        state = after(after(seed % 2**64, 1), position + 1)
        uniform = [((after(state, n + 1) >> 12) + 0.5) / 2**52 for n in range(N_TOKENS)]
        expected = [-log(-log(u)) for u in uniform]
        signed = torch.tensor(np.uint64(seed % 2**64).view(np.int64))
        found = gumbel_noise(signed, torch.tensor(position), N_TOKENS)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


logits_drawn = st.lists(
    st.floats(-20, 20, width=32), min_size=N_TOKENS, max_size=N_TOKENS, unique=True
).map(torch.tensor)


@settings(deadline=None)
@given(logits_drawn, st.integers(1, 60), st.sampled_from([0.05, 0.3, 0.7, 0.95]))
def test_what_is_left_out_is_what_transformers_leaves_out(logits, top_k, top_p):
    ids = torch.zeros((1, 1), dtype=torch.long)
    of_k, of_p = TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)
    assert torch.equal(cut(logits, min(top_k, N_TOKENS)), of_k(ids, logits[None])[0])
    assert torch.equal(cut(logits, top_p=top_p), of_p(ids, logits[None])[0])
    both = of_p(ids, of_k(ids, logits[None]))[0]
    assert torch.equal(cut(logits, min(top_k, N_TOKENS), top_p), both)


@settings(deadline=None)
@given(logits_drawn, st.sampled_from([0.5, 1.3, 4.0]))
def test_repetition_is_penalised_as_transformers_does(logits, penalty):
    text = torch.tensor([3, 7, 7, 21])
    is_in_text = torch.zeros(N_TOKENS, dtype=torch.bool)
    is_in_text[text] = True
    expected = RepetitionPenaltyLogitsProcessor(penalty)(text[None], logits[None].clone())[0]
    assert torch.equal(penalised(logits, is_in_text, penalty), expected)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.6), Sampling(1.4, top_k=5), Sampling(1.4, top_k=12, top_p=0.8)],
)
def test_tokens_come_as_often_as_their_probability_says(sampling):
    torch.manual_seed(1)
    logits = 2 * torch.randn(N_TOKENS)
    ids = torch.zeros((1, 1), dtype=torch.long)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, logits[None])
    if sampling.top_k is not None:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p is not None:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    probability = scores[0].softmax(-1).double().numpy()
    n_draws = 4000
    drawn = [int(chosen(logits, sampling, position)) for position in range(n_draws)]
    found = np.bincount(drawn, minlength=N_TOKENS)
    assert not found[probability == 0].any()
    spread = np.sqrt(n_draws * probability * (1 - probability))
    np.testing.assert_array_less(np.abs(found - n_draws * probability), 4.5 * spread + 1e-9)


def test_a_token_once_in_the_text_is_penalised_from_then_on():
    logits = torch.tensor([2.0, 1.9, 1.8, -5.0])
    sampler = Sampler(Sampling(repetition_penalty=2.0), torch.tensor([3]))
    assert [sampler.choose(logits) for _ in range(4)] == [0, 1, 2, 0]
    plain = Sampler(Sampling(), torch.tensor([3]))
    assert [plain.choose(logits) for _ in range(2)] == [0, 0]


def test_the_least_and_the_most_of_top_p():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert cut(logits, 3, 0.0).isfinite().tolist() == [False, True, False]
    assert cut(logits, 3, 1.0).isfinite().all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-300])
def test_the_lower_the_temperature_the_likelier_the_token(temperature):
    logits = torch.tensor([1.0, 5.0, 9.0, 8.9], dtype=torch.bfloat16)
    assert int(chosen(logits, Sampling(temperature, top_k=3, top_p=0.99), 3)) == 2


def test_positions_differ_and_a_position_repeats():
    logits = torch.zeros(1000)
    sampling = Sampling(1.0, seed=11)
    tokens = [int(chosen(logits, sampling, position)) for position in range(20)]
    assert len(set(tokens)) > 15
    sampler = Sampler(sampling, torch.zeros(5, dtype=torch.long))
    assert [sampler.choose(logits) for _ in range(15)] == tokens[5:]
