"""A recipe: when training ends, how the learning rate goes, and what is refused."""

import math
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapmoe_lab.demo.recipe import Recipe
from adapmoe_lab.models.demo_architecture import DemoArchitecture

RECIPE = Recipe(learning_rate=1e-2, warmup=0.1)


def test_the_learning_rate_warms_up_in_a_line():
    assert RECIPE.learning_rate_at(0.025) == pytest.approx(0.25e-2)
    assert RECIPE.learning_rate_at(0.05) == pytest.approx(0.5e-2)
    assert RECIPE.learning_rate_at(0.1) == pytest.approx(1e-2)


def test_the_first_step_learns_something():
    assert RECIPE.learning_rate_at(0.0) == pytest.approx(1e-4)


def test_the_learning_rate_is_half_in_the_middle_of_the_decay_and_zero_at_the_end():
    assert RECIPE.learning_rate_at(0.55) == pytest.approx(0.5e-2)
    assert RECIPE.learning_rate_at(1.0) == pytest.approx(0.0, abs=1e-15)
    assert RECIPE.learning_rate_at(1.7) == pytest.approx(0.0, abs=1e-15)


@given(st.floats(0, 1), st.floats(0, 1))
def test_after_the_warm_up_the_learning_rate_only_falls(one, other):
    earlier, later = sorted((0.1 + 0.9 * one, 0.1 + 0.9 * other))
    assert RECIPE.learning_rate_at(later) <= RECIPE.learning_rate_at(earlier) <= 1e-2


def test_without_warm_up_the_learning_rate_starts_at_its_peak():
    assert Recipe(learning_rate=3.0, warmup=0.0).learning_rate_at(0.0) == 3.0


def test_progress_is_that_of_the_limit_nearest_its_end():
    both = Recipe(minutes=2.0, epochs=4.0)
    assert both.progress(n_tokens=100, seconds=60, text_tokens=100) == pytest.approx(0.5)
    assert both.progress(n_tokens=300, seconds=60, text_tokens=100) == pytest.approx(0.75)
    assert both.progress(n_tokens=0, seconds=180, text_tokens=100) == pytest.approx(1.5)


def test_a_limit_that_is_off_does_not_count():
    by_clock = Recipe(minutes=1.0, epochs=None)
    assert by_clock.progress(n_tokens=10**9, seconds=30, text_tokens=1) == pytest.approx(0.5)
    by_text = Recipe(minutes=None, epochs=2.0)
    assert by_text.progress(n_tokens=50, seconds=10**9, text_tokens=100) == pytest.approx(0.25)


def test_tokens_of_a_batch():
    assert Recipe(batch_sequences=3, sequence_length=7).batch_tokens == 21


def test_the_record_has_every_choice_but_the_architecture():
    written = Recipe(seed=5).as_dict()
    assert written["seed"] == 5
    assert Recipe(**written) == Recipe(seed=5)
    assert "architecture" not in written


def test_a_recipe_does_not_change():
    with pytest.raises(FrozenInstanceError):
        RECIPE.seed = 1


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"minutes": None}, "training needs an end: give minutes, epochs, or both"),
        ({"minutes": 0.0}, "minutes must be above 0, got 0.0"),
        ({"epochs": -1.0}, "epochs must be above 0, got -1.0"),
        ({"sequence_length": 2_000}, "sequence_length 2000 exceeds the architecture's 1024 pos"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must lie in \[0, 1\), got -0.1"),
        ({"warmup": 1.0}, r"warmup must lie in \[0, 1\), got 1.0"),
        ({"warmup": math.nan}, r"warmup must lie in \[0, 1\), got nan"),
    ],
)
def test_what_cannot_be_trained_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**choices)


def test_a_longer_sequence_needs_an_architecture_with_more_positions():
    longer = DemoArchitecture(max_positions=2_048)
    assert Recipe(architecture=longer, sequence_length=2_000).sequence_length == 2_000
