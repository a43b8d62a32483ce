"""The backward pass of a text's loss, shown layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.layer_pass import LayerGradient
from adapmoe_lab.engine.observing import observing
from adapmoe_lab.models.families import check_each_runs_once
from adapmoe_lab.models.hooks.recomputing import recomputing_layers
from adapmoe_lab.records.hook_points import HookPoint


def backpropagate(
    model: LabModel, ids: torch.Tensor, callback: Callable[[LayerGradient], None]
) -> None:
    """Differentiate the summed next-token loss of a text, token ids int64 [T], in nats.

    The callback is given the layers from the last to the first. They are recomputed on the way back
    and experts read from the store again, so that the device holds the activations of one layer and
    a single expert at a time.

    Raises:
        UnsupportedModelError: some layers run several times for each token.
    """
    check_each_runs_once(model.layers)
    embedded = model.hf.get_input_embeddings()(ids[None].to(model.engine.device)).detach()
    observed = observing(model, {HookPoint.EXPERTS_GRADIENT: callback})
    with torch.enable_grad(), recomputing_layers(model.hf), observed:
        output = model.hf(inputs_embeds=embedded.requires_grad_(), use_cache=False)
        logits = output.logits[0, :-1].float()
        following = ids[1:].to(logits.device)
        torch.nn.functional.cross_entropy(logits, following, reduction="sum").backward()
