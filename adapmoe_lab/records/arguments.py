"""Arguments in the forms people pass them: taken for what they mean, or refused in words."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np


def whole_number(
    name: str, value: Any, at_least: int | None = None, at_most: int | None = None
) -> int:
    """Return a count as an int; numpy's integers are as good as Python's.

    Raises:
        ValueError: it is no whole number (a truth value is none), or out of range.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        wanted = _wanted("a whole number", at_least, at_most)
        raise ValueError(f"{name} must be {wanted}, got {described(value)}.") from None
    _check_range(name, number, "a whole number", at_least, at_most)
    return number


def finite_number(
    name: str, value: Any, at_least: float | None = None, at_most: float | None = None
) -> float:
    """Return a number as a float; text, truth values, NaN and infinity are none.

    Raises:
        ValueError: it is no finite number, or out of range.
    """
    try:
        if isinstance(value, bool | np.bool_ | str | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        wanted = _wanted("a finite number", at_least, at_most)
        raise ValueError(f"{name} must be {wanted}, got {described(value)}.")
    _check_range(name, number, "a finite number", at_least, at_most)
    return number


def strings(name: str, value: Any) -> list[str]:
    """Return one or several strings as a list; one alone is one, and not its letters.

    Anything that can be gone through once is taken, a generator too.

    Raises:
        ValueError: there is something else than strings; the text says where.
    """
    if isinstance(value, str):
        return [one_string(name, value)]
    if isinstance(value, bytes | bytearray) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a string or several, got {described(value)}.")
    return [one_string(f"{name}[{number}]", item) for number, item in enumerate(value)]


def one_string(name: str, value: Any) -> str:
    """Return a string of whole characters.

    Raises:
        ValueError: it is something else, or holds half of a surrogate pair, which is no character.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} must be one string, got {described(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds {value[error.start]!r} at position {error.start}, half of a surrogate "
            "pair: what it was read from is not UTF-8, or was cut within a character."
        ) from error
    return str(value)


def described(value: Any) -> str:
    """Return a value and its type in a few words, for an error that refuses it."""
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({type(value).__name__})"


def _check_range(
    name: str, number: float, kind: str, at_least: float | None, at_most: float | None
) -> None:
    is_low = at_least is not None and number < at_least
    if is_low or (at_most is not None and number > at_most):
        raise ValueError(f"{name} must be {_wanted(kind, at_least, at_most)}, got {number}.")


def _wanted(kind: str, at_least: float | None, at_most: float | None) -> str:
    if at_least is not None and at_most is not None:
        return f"{kind} in {at_least}..{at_most}"
    if at_least is not None:
        return f"{kind} of at least {at_least}"
    return kind if at_most is None else f"{kind} of at most {at_most}"
