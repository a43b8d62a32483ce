"""Whether a model may run under a config, checked once when a user brings the config."""

from __future__ import annotations

import warnings

from adapmoe_lab.policies.eviction.registry import policy_named
from adapmoe_lab.records import MoESpec, Predictors, Surrogates, TunedConfig


def parts_of_one_model(config: TunedConfig) -> list[TunedConfig | Predictors | Surrogates]:
    """Return what of a config belongs to one model's weights, each with a `check_model`.

    Parts that name the same weights as the config itself are left out.
    """
    fitted = config.prefetch.fitted if config.prefetch is not None else None
    parts = [part for part in (config.compensation, fitted) if part is not None]
    own = config.model["fingerprint"]
    return [config, *(part for part in parts if part.model_fingerprint != own)]


def check_eviction(config: TunedConfig) -> None:
    """Refuse a config whose eviction policy is not known, or cannot be followed with its plan.

    Raises:
        ValueError: there is no such policy, only a simulation can follow it, or one of policy and
            plan keeps pinned experts without the other.
    """
    policy = policy_named(config.eviction)
    policy.check_runnable()
    policy.check_plan(config.plan)


def check_precision(config: TunedConfig, spec: MoESpec) -> None:
    """Refuse a config that was tuned for experts stored otherwise.

    One of version 0.1 that only says that they were mixed passes wherever they are, with a warning
    that names the line which called the caller.

    Raises:
        ValueError: an expert is stored in another precision than the config says.
    """
    wanted, stored = config.precision, spec.precision
    if wanted is None:
        return
    if wanted.names is None:
        if stored.is_uniform:
            raise ValueError(
                f"The config stores experts as {wanted}, the model is loaded as {stored}. Load it "
                "with one precision per expert, or from the prepared store it was tuned with."
            )
        warnings.warn(
            f"The config was saved for experts in {wanted}; it runs on those that are loaded, "
            f"{stored}, which may lie otherwise. Tune this model and save the config again to have "
            "that checked.",
            stacklevel=4,
        )
    elif wanted.names != stored.names:
        n_experts, n_unlike = spec.n_layers * spec.n_experts, wanted.n_unlike(stored)
        expert_dtype = repr(wanted.name) if wanted.is_uniform else "config.precision.names"
        raise ValueError(
            f"The config stores experts as {wanted}, the model is loaded as {stored}: "
            f"{n_unlike} of {n_experts} experts differ. Load it with expert_dtype={expert_dtype}, "
            "or tune it as it is."
        )
