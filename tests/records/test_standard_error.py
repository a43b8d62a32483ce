"""Standard errors where they are not known: None in records, NaN in arrays, words on screen."""

import numpy as np
import pytest

from adapmoe_lab.records.standard_error import error_text, nan_if_unknown, none_if_unknown


@pytest.mark.parametrize("unknown", [None, float("nan"), np.float64("nan"), np.inf])
def test_what_is_not_known_is_none_and_said(unknown):
    assert none_if_unknown(unknown) is None
    assert error_text(unknown, ".1f") == "± not known"


def test_what_is_known_is_a_plain_number():
    assert type(none_if_unknown(np.float32(0.5))) is float
    assert none_if_unknown(0) == 0.0
    assert error_text(0.5, ".1f", 1e3) == "± 500.0"


def test_none_becomes_nan_in_an_array_and_back():
    rows = nan_if_unknown([(1.0, 0.5), (2.0, None)])
    assert rows.dtype == np.float64
    np.testing.assert_array_equal(rows, [[1.0, 0.5], [2.0, np.nan]])
    assert [none_if_unknown(error) for error in rows[:, 1]] == [0.5, None]
