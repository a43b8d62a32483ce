"""Arguments in the forms people pass: one meaning each, or words that fit."""

import numpy as np
import pytest

from adapmoe_lab.records.arguments import finite_number, one_string, strings, whole_number


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3)])
def test_every_kind_of_integer_is_a_whole_number(value):
    number = whole_number("repeats", value, at_least=1)
    assert (number, type(number)) == (3, int)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0, "repeats must be a whole number of at least 1, got 0."),
        (-2, "got -2"),
        (2.0, r"got 2\.0 \(float\)"),
        ("3", r"got '3' \(str\)"),
        (None, r"got None \(NoneType\)"),
        (True, r"got True \(bool\)"),
        (np.bool_(True), r"got np\.True_ \(bool\)"),
    ],
)
def test_what_is_no_count_is_refused_with_what_it_is(value, told):
    with pytest.raises(ValueError, match=told):
        whole_number("repeats", value, at_least=1)


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.int64(1)])
def test_every_kind_of_number_is_a_number(value):
    number = finite_number("temperature", value, at_least=0)
    assert (number, type(number)) == (1.0, float)


@pytest.mark.parametrize(
    "value", [-1, float("nan"), float("inf"), "1", None, False, np.True_, [1.0, 2.0]]
)
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(ValueError, match="temperature must be a finite number of at least 0, got"):
        finite_number("temperature", value, at_least=0)


def test_ranges_are_told_from_both_ends():
    with pytest.raises(ValueError, match=r"n must be a whole number in 1\.\.8, got 9\."):
        whole_number("n", 9, at_least=1, at_most=8)
    with pytest.raises(ValueError, match=r"f must be a finite number of at most 1, got 2\.0\."):
        finite_number("f", 2, at_most=1)
    assert whole_number("n", -5) == -5


def test_one_string_is_one_and_not_its_letters():
    assert strings("tasks", "abc") == ["abc"]
    assert strings("tasks", (word for word in ("a", "b"))) == ["a", "b"]
    assert strings("tasks", np.array(["a", "b"])) == ["a", "b"]
    assert type(strings("tasks", np.array(["a"]))[0]) is str


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (b"abc", r"tasks must be a string or several, got b'abc' \(bytes\)"),
        (None, r"tasks must be a string or several, got None \(NoneType\)"),
        (["a", 5], r"tasks\[1\] must be one string, got 5 \(int\)"),
        (["a", ["b"]], r"tasks\[1\] must be one string, got \['b'\] \(list\)"),
        (["a\udc9f"], r"tasks\[0\] holds '\\udc9f' at position 1, half of a surrogate pair"),
    ],
)
def test_other_things_are_refused_with_their_place(value, told):
    with pytest.raises(ValueError, match=told):
        strings("tasks", value)


def test_a_long_value_is_not_repeated_whole():
    with pytest.raises(ValueError, match=r"got \['aaa") as refused:
        one_string("prompt", ["a" * 5000])
    assert len(str(refused.value)) < 150
