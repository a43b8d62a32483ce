"""What is known of captured steps covers every family that is served exactly."""

import pytest

from adapmoe_lab.engine.graph.requirements import check_capturable, reason_of
from adapmoe_lab.models.capturable import CAPTURED, NOT_CAPTURED, capture_in_words
from adapmoe_lab.models.support import VERIFIED


def test_every_exact_family_is_captured_or_has_a_reason():
    assert VERIFIED.keys() == CAPTURED | NOT_CAPTURED.keys()
    assert not CAPTURED & NOT_CAPTURED.keys()


def test_a_family_that_is_not_captured_is_refused_with_its_reason():
    with pytest.raises(ValueError, match="Load the model with executor='host'") as refused:
        check_capturable("minimax")
    assert reason_of(refused.value) == (
        "executor='graph' cannot serve minimax: its forward takes no cache but one of its own"
    )
    for family in ("mixtral", "a family of tomorrow"):
        check_capturable(family)


def test_what_is_known_is_said_in_words():
    assert capture_in_words("mixtral") == "captured"
    assert capture_in_words("minimax").startswith("not captured: its forward takes no cache")
    assert capture_in_words("a family of tomorrow").startswith("never tried")
