"""The handle a user holds: a model whose experts are served on demand, under a configuration."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from adapmoe_lab.engine.config_checks import check_eviction, check_precision, parts_of_one_model
from adapmoe_lab.engine.device import device_name
from adapmoe_lab.engine.executor import Decoder, Executor
from adapmoe_lab.engine.generation.text_model import TextModel
from adapmoe_lab.engine.link_emulation import emulate, emulated
from adapmoe_lab.engine.memory_plan import MemoryPlan
from adapmoe_lab.engine.prefetch.predictors import Predictor, predictors_of
from adapmoe_lab.engine.resident_layer import resident_layer_s
from adapmoe_lab.engine.store.expert_store import ExpertStore
from adapmoe_lab.engine.store.on_disk import save_store
from adapmoe_lab.engine.transfer.clock import VirtualClock
from adapmoe_lab.engine.transfer.link import Link
from adapmoe_lab.models.checkpoint.checkpoint import HFModel
from adapmoe_lab.models.families import MoELayer
from adapmoe_lab.models.hooks.experts_hook import ExpertsHook
from adapmoe_lab.models.hooks.observing import observing_model
from adapmoe_lab.records import LinkTarget, MoESpec, Predictors, TunedConfig
from adapmoe_lab.records.step_costs import HostCosts, StepCosts


class LabModel(TextModel):
    """A Mixture-of-Experts model whose experts live in host memory and are served on demand.

    `close` frees what it holds; so does the end of a `with` block, and the last reference to it.

    Attributes:
        hf: the transformers model, usable as it is.
        tokenizer: the model's tokenizer.
        spec: shape and identity of the model.
        engine: what serves the experts.
        store: where all experts lie.
        link: what they travel over.
        memory: what was planned to go where.
        config: the configuration in force.
        in_use: held while the model runs.
    """

    def __init__(
        self,
        tokenizer: Any,
        spec: MoESpec,
        hook: ExpertsHook,
        engine: Executor,
        store: ExpertStore,
        link: Link,
        memory: MemoryPlan,
    ) -> None:
        """Take over a model whose experts the engine already serves; use `load` to make one."""
        self.hf = hook.hf
        self.tokenizer = tokenizer
        self.spec = spec
        self.engine = engine
        self.store = store
        self.link = link
        self.memory = memory
        self.config = TunedConfig.untuned(spec)
        self._hook = hook
        self.in_use = threading.RLock()
        self._predictors: dict[str | None, tuple[Predictor, ...]] = {}
        self._watching = ExitStack()
        self._measured_costs: StepCosts | None = None

    def __enter__(self) -> Self:
        """Use the model for a block, and close it afterwards."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the model."""
        self.close()

    def __repr__(self) -> str:
        """Describe the model, where it runs, and what crosses which link."""
        spec, slots = self.spec, (self.config.plan or self.memory.slots).n_slots
        return (
            f"{spec.model_id}: {spec.family}, {spec.n_layers} layers x {spec.n_experts} experts, "
            f"top-{spec.top_k}, {spec.all_experts_bytes / 2**20:.1f} MiB of experts "
            f"in {spec.dtype}\n"
            f"on {device_name(self.engine.device)}, link {self.link.name}, "
            f"room for {slots} of {spec.n_layers * spec.n_experts} experts" + self._why_not_replayed
        )

    @property
    def _why_not_replayed(self) -> str:
        """Say why steps are driven by the host, where a captured graph was asked for."""
        why = self.engine.why_not_replayed
        return "" if why is None else f"\nsteps are driven by the host: {why}"

    @property
    def layers(self) -> list[MoELayer]:
        """The model's layers with routed experts, in order."""
        return self._hook.layers

    @property
    def effective_config(self) -> TunedConfig:
        """The config in force, with the slots and precisions in use where it leaves them open."""
        plan = self.config.plan if self.config.plan is not None else self.memory.slots
        return replace(self.config, plan=plan, precision=self.spec.precision)

    def apply(self, config: TunedConfig) -> None:
        """Run under another configuration from now on, starting with empty caches.

        A config of version 0.1 that does not say how experts of several precisions were laid out
        runs on those that are loaded, with a warning.

        Raises:
            RecordError: the config was tuned for another model.
            ValueError: it was tuned for experts stored otherwise, or the executor does not run it.
            RuntimeError: the model was closed.
        """
        self.engine.check_open()
        for part in parts_of_one_model(config):
            part.check_model(self.spec)
        check_precision(config, self.spec)  # here: warnings name the caller's line
        self._check_able(config)
        self.put_in_force(config)

    def _check_able(self, config: TunedConfig) -> None:
        """Refuse a config that the executor cannot run."""
        check_eviction(config)
        self.engine.capabilities.check(config, self.spec.precision)

    def put_in_force(self, config: TunedConfig) -> None:
        """Run under a config that is known to be this model's; `apply` checks that first."""
        plan = config.plan if config.plan is not None else self.memory.slots
        with self.in_use:
            predictors = ()
            if config.prefetch is not None:
                predictors = self._kept_predictors(config.prefetch.fitted)
            self.engine.configure(
                config.gating,
                plan,
                config.eviction,
                config.compensation,
                config.prefetch,
                predictors,
                self._step_costs(config),
            )
            self._watch()
            self.config = config

    def predictors(self, fitted: Predictors | None = None) -> tuple[Predictor, ...]:
        """Return everything that predicts this model's routing, fitted predictors if given.

        Raises:
            RecordError: they were fitted to another model.
        """
        if fitted is not None and fitted.fingerprint() not in self._predictors:
            fitted.check_model(self.spec)
        return self._kept_predictors(fitted)

    def _kept_predictors(self, fitted: Predictors | None) -> tuple[Predictor, ...]:
        key = fitted.fingerprint() if fitted is not None else None
        if key not in self._predictors:
            with self.in_use, self.engine.reading_store():
                found = predictors_of(self.hf, self.layers, fitted)
            self._predictors = {key: found}  # of the last asked for only: they may be large
        return self._predictors[key]

    def _step_costs(self, config: TunedConfig) -> StepCosts | None:
        """Return what steps are expected to take under a config.

        Without hardware in the config they are measured, once for the model. None on a virtual
        clock, whose user sets them.
        """
        hardware = config.hardware
        if isinstance(self.engine.clock, VirtualClock):
            return None
        if config.prefetch is None:
            return StepCosts()
        if hardware is not None:
            return hardware.step_costs(self.spec.precision, config.gating is not None)
        if self._measured_costs is None:
            self._measured_costs = StepCosts(HostCosts(dense_layer_s=self._resident_layer_s()))
        return self._measured_costs

    def _resident_layer_s(self) -> float:
        n_runs = sum(layer.n_runs for layer in self.layers)
        return resident_layer_s(self.hf, self.engine, n_runs)

    def _watch(self) -> None:
        """Show the engine what it wants to see of forward passes."""
        self._watching.close()
        self._watching = ExitStack()
        observed = observing_model(self.hf, self.layers, self.engine.callbacks)
        self._watching.enter_context(observed)

    @contextmanager
    def running(self, config: TunedConfig | None = None) -> Iterator[Self]:
        """Run under a config, the present one if None, with fresh caches; restore afterwards.

        Other threads that want to run the model wait until the block ends. A config other than
        the present one is checked as by `apply`.
        """
        with self.in_use:
            self.engine.check_open()
            previous = self.config
            if config is not None and config is not previous:
                for part in parts_of_one_model(config):
                    part.check_model(self.spec)
                check_precision(config, self.spec)
                self._check_able(config)
            try:
                self.put_in_force(config if config is not None else previous)
                yield self
            finally:
                if not self.engine.is_closed:
                    self.put_in_force(previous)

    def emulate_link(self, target: LinkTarget | None) -> None:
        """Make loads on a CPU take as long, against computing here, as on the target machine.

        Decode is timed with every expert at hand and nothing skipped; loading one expert, of the
        mean size where they differ, then takes the target's ratio times one such layer. None
        leaves the link out: loads take what copying takes.

        Raises:
            ValueError: the link is a real one, or decoding takes no time on a virtual clock.
        """
        link = emulated(self.link, target, self.engine.device)
        with self.in_use:
            emulate(link, target, self.spec.mean_expert_bytes, self._resident_layer_s)

    @contextmanager
    def linked(self, target: LinkTarget | None) -> Iterator[Self]:
        """Load over another emulated link, over none if None; over the present one afterwards.

        Other threads that want to run the model wait until the block ends.

        Raises:
            ValueError: as `emulate_link`.
        """
        link = emulated(self.link, target, self.engine.device)
        with self.in_use, link.restored():
            self.emulate_link(target)
            yield self

    def decoder(self) -> Decoder:
        """Return what decodes one sequence under the config in force; see `generate_tokens`."""
        return self.engine.decoder(self.hf)

    def save_experts(self, folder: str | Path) -> None:
        """Write the experts as they are stored, for `load(..., store=folder)` to reopen at once."""
        self.engine.check_open()
        save_store(self.store, Path(folder).expanduser(), self.spec.fingerprint())

    def detach(self) -> HFModel:
        """Give the experts back and return the plain transformers model; the handle is spent.

        Experts stored in fewer bits come back dequantised.
        """
        with self.in_use:
            self.engine.check_open()
            self._watching.close()
            self._hook.detach()
            self.engine.release()
            for number in range(self.spec.n_layers):
                weights = self.store.fused(number, self.hf.dtype)
                on_device = {name: t.to(self.hf.device) for name, t in weights.items()}
                self._hook.give_weights(number, on_device)
            self.engine.close()
        return self.hf

    def close(self) -> None:
        """Free the experts, their room on the device and pinned memory, and close all files.

        Handle and `hf` are spent then: running either is an error. Waits for a thread that runs
        the model. Closing twice, or after `detach`, does nothing.
        """
        with self.in_use:
            if not self.engine.is_closed:
                self._watching.close()
                self._predictors = {}
                self.engine.close()
