"""Making loads on a CPU take as long, against computing here, as on another machine."""

from __future__ import annotations

from collections.abc import Callable

import torch

from adapmoe_lab.engine.device import device_name
from adapmoe_lab.engine.transfer.link import NO_LINK, EmulatedLink, Link
from adapmoe_lab.records import LinkTarget


def emulated(link: Link, target: LinkTarget | None, device: torch.device) -> EmulatedLink:
    """Return a link that can be made another one.

    Raises:
        ValueError: it is a real one.
    """
    if isinstance(link, EmulatedLink):
        return link
    wanted = "No link" if target is None else repr(target.name)
    raise ValueError(
        f"{wanted} cannot be emulated on {device_name(device)}, which loads over a real link; load "
        "the model with device='cpu'."
    )


def emulate(
    link: EmulatedLink,
    target: LinkTarget | None,
    expert_bytes: float,
    resident_layer_s: Callable[[], float],
) -> None:
    """Make a link that of a target: loading one expert takes its ratio times one resident layer.

    Args:
        link: the link.
        target: whose ratio it keeps; None to take what copying takes.
        expert_bytes: bytes of an expert, their mean where they differ.
        resident_layer_s: measures a layer that has every expert at hand.

    Raises:
        ValueError: a layer takes no time on a virtual clock.
    """
    if target is None:
        link.emulate(NO_LINK)
        return
    layer_s = resident_layer_s()
    if not layer_s:
        raise ValueError(
            f"{target.name!r} keeps a ratio to the time of a layer, and on a virtual clock that "
            "has no step costs a layer takes none. Load the model with link='none'."
        )
    link.emulate(f"emulated:{target.name}", expert_bytes / (layer_s * target.load_ratio))
