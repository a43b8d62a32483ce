"""What a text shall be: how long at most, how its tokens are chosen, where it ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from adapmoe_lab.engine.sampling import Sampling
from adapmoe_lab.records.arguments import strings, whole_number


@dataclass(frozen=True)
class WantedText:
    """What is wanted of a text.

    Attributes:
        max_new_tokens: at most this many tokens are added.
        sampling: how they are chosen.
        stop: the text ends before the first of these.

    Raises:
        ValueError: a number is out of range, or a stop string is empty or no string.
    """

    max_new_tokens: int
    sampling: Sampling
    stop: str | Iterable[str] = ()

    def __post_init__(self) -> None:
        """Take arguments in the forms people pass them."""
        n_tokens = whole_number("max_new_tokens", self.max_new_tokens, at_least=0)
        stop = tuple(strings("stop", self.stop))
        if "" in stop:
            raise ValueError("stop holds an empty string, which is before every text.")
        object.__setattr__(self, "max_new_tokens", n_tokens)
        object.__setattr__(self, "stop", stop)
