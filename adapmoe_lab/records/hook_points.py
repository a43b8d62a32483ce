"""The points of a forward pass at which something can be observed or predicted."""

from __future__ import annotations

from enum import IntEnum


class HookPoint(IntEnum):
    """A point of a forward pass.

    The first four lie between the parts of any transformers model, and predictors predict at them;
    at the first and the last of these, layer 0 is a predictor's source as well as its target. The
    other two are known only to an executor, which runs the experts.
    """

    TOKEN = 0
    """A forward pass begins: its token ids; to observers [B, T], to predictors [T]."""
    EXPERTS_INPUT = 1
    """A layer's router has chosen: hidden states [T, D] as router and experts get them."""
    LAYER_OUTPUT = 2
    """A layer is done: the residual stream [T, D] after it."""
    LAST_HIDDEN = 3
    """A forward pass is done: its final hidden states [T, D]; of use for the token after each."""
    EXPERTS_OUTPUT = 4
    """A layer's experts are done: what they were given, which were run, and what they gave."""
    EXPERTS_GRADIENT = 5
    """The backward pass has reached a layer's experts: the gradient at their output."""
