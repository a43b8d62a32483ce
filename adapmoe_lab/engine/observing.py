"""The one way to watch a model run, with or without its experts served on demand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.models.checkpoint.checkpoint import HFModel
from adapmoe_lab.models.families import find_moe_layers
from adapmoe_lab.models.hooks.observing import OF_EXPERTS, Callback, observing_model
from adapmoe_lab.records.hook_points import HookPoint


@contextmanager
def observing(model: LabModel | HFModel, callbacks: Mapping[HookPoint, Callback]) -> Iterator[None]:
    """Call back at points of every pass inside the block; leave nothing behind afterwards.

    A callback must not change what it is given. What it raises ends the pass. Batch and sequence
    are one axis T except in token ids; layers are counted among those with experts. Blocks nest.

        with observing(model, {HookPoint.LAYER_OUTPUT: note, HookPoint.EXPERTS_OUTPUT: add}):
            model.generate("Once upon a time")

    Args:
        model: what `load` returned, or a transformers model.
        callbacks: by hook point, called with

            - TOKEN: token ids int64 [B, T] and the key-value cache that the pass continues, None
              if there is none; a pass that is given embeddings instead is not shown;
            - EXPERTS_INPUT: a layer's number and its experts' input [T, D];
            - EXPERTS_OUTPUT: a `LayerPass`; only of what `load` returned;
            - LAYER_OUTPUT: a layer's number and the residual stream [T, D] after it;
            - LAST_HIDDEN: the final hidden states [T, D], which the output embeddings read;
            - EXPERTS_GRADIENT: a `LayerGradient`, as the backward pass of a forward made inside
              the block reaches the layer; only of what `load` returned.

    Raises:
        ValueError: a key is no hook point, or the experts of a plain transformers model are to be
            observed at work.
        UnsupportedModelError: outputs are to be observed of a layer that has no number, or a plain
            model has no routed experts that can be found.
    """
    unknown = [key for key in callbacks if not isinstance(key, HookPoint)]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is no hook point; expected keys among "
            f"{', '.join(f'HookPoint.{point.name}' for point in HookPoint)}."
        )
    of_experts = {point: callbacks[point] for point in OF_EXPERTS if point in callbacks}
    of_model = {point: call for point, call in callbacks.items() if point not in of_experts}
    with ExitStack() as observed:
        if isinstance(model, LabModel):
            observed.enter_context(observing_model(model.hf, model.layers, of_model))
            observed.enter_context(model.engine.observing(of_experts))
        elif of_experts:
            raise ValueError(
                f"HookPoint.{next(iter(of_experts)).name} is seen only where this project runs the "
                "experts; give what `load` returned instead of a plain transformers model."
            )
        else:
            observed.enter_context(observing_model(model, find_moe_layers(model), of_model))
        yield
