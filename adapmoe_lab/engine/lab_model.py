"""The handle a user holds: a model whose experts are served on demand, under a configuration."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import torch

from adapmoe_lab.engine.clock import StepPace, VirtualClock
from adapmoe_lab.engine.decode import decode
from adapmoe_lab.engine.device import device_name
from adapmoe_lab.engine.link import EmulatedLink
from adapmoe_lab.engine.memory import MemoryPlan
from adapmoe_lab.engine.offload import OffloadEngine
from adapmoe_lab.engine.opening import store_identity
from adapmoe_lab.engine.pace import resident_layer_s
from adapmoe_lab.engine.prediction import Predictor, predictors_of
from adapmoe_lab.engine.prepared import save_store
from adapmoe_lab.models.checkpoint import Checkpoint, HFModel
from adapmoe_lab.models.families import MoELayer
from adapmoe_lab.models.hook import ExpertsHook
from adapmoe_lab.models.outline import MIXED
from adapmoe_lab.models.residual_stream import (
    last_hidden_observed_by,
    layer_outputs_observed_by,
    token_ids_observed_by,
)
from adapmoe_lab.records import LinkTarget, MoESpec, Predictors, PrefetchTable, TunedConfig
from adapmoe_lab.records.arguments import finite_number, one_string, whole_number
from adapmoe_lab.records.prefetch import Moment


class LabModel:
    """A Mixture-of-Experts model whose experts live in host memory and are served on demand.

    Attributes:
        hf: the transformers model, usable as it is; its experts run through the engine.
        tokenizer: the model's tokenizer.
        spec: shape and identity of the model.
        engine: what serves the experts.
        memory: what was planned to go where.
        config: the configuration in force.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: MoESpec,
        hook: ExpertsHook,
        engine: OffloadEngine,
        memory: MemoryPlan,
    ) -> None:
        """Take over a model whose experts the engine already serves; use `load` to make one."""
        self.hf = hook.hf
        self.tokenizer = checkpoint.load_tokenizer()
        self.spec = spec
        self.engine = engine
        self.memory = memory
        self.config = TunedConfig.untuned(spec)
        self._hook = hook
        self._checkpoint = checkpoint
        self._in_use = threading.RLock()
        self._predictors: dict[str | None, tuple[Predictor, ...]] = {}
        self._watching = ExitStack()

    def __repr__(self) -> str:
        """Describe the model, where it runs, and what crosses which link."""
        spec = self.spec
        slots = (self.config.plan or self.memory.slots).n_slots
        return (
            f"{spec.model_id}: {spec.family}, {spec.n_layers} layers x {spec.n_experts} experts, "
            f"top-{spec.top_k}, {spec.all_experts_bytes / 2**20:.1f} MiB of experts "
            f"in {spec.dtype}\n"
            f"on {device_name(self.engine.device)}, link {self.engine.link.name}, "
            f"room for {slots} of {spec.n_layers * spec.n_experts} experts"
        )

    @property
    def layers(self) -> list[MoELayer]:
        """The model's layers with routed experts, in order."""
        return self._hook.layers

    def apply(self, config: TunedConfig) -> None:
        """Run under another configuration from now on, starting with empty caches.

        Raises:
            RecordError: the config was tuned for another model.
        """
        config.check_model(self.spec)
        check_precision(config, self.spec)
        plan = config.plan if config.plan is not None else self.memory.slots
        with self._in_use:
            predictors = ()
            if config.prefetch is not None:
                self._expect_pace(config)
                predictors = self.predictors(config.prefetch.fitted)
            self.engine.configure(
                config.gating,
                plan,
                config.eviction,
                config.compensation,
                config.prefetch,
                predictors,
            )
            self._watch(config.prefetch)
            self.config = config

    def predictors(self, fitted: Predictors | None = None) -> tuple[Predictor, ...]:
        """Return everything that foresees this model's routing, fitted predictors if given.

        Raises:
            RecordError: they were fitted to another model.
        """
        key = fitted.fingerprint() if fitted is not None else None
        if key not in self._predictors:
            if fitted is not None:
                fitted.check_model(self.spec)
            with self._in_use, self.engine.reading_store():
                found = predictors_of(self.hf, self.layers, fitted)
            self._predictors = {key: found}  # of the last asked for only: they may be large
        return self._predictors[key]

    def _expect_pace(self, config: TunedConfig) -> None:
        """Tell the engine how fast this machine computes; a virtual clock is told by the user."""
        engine, hardware = self.engine, config.hardware
        if isinstance(engine.clock, VirtualClock):
            return
        if hardware is not None:
            is_gated = config.gating is not None
            dense_layer_s = hardware.dense_layer_s(self.spec.n_layers, is_gated)
            engine.pace = StepPace(dense_layer_s, hardware.expert_s, load_s=hardware.load_s)
        elif engine.pace == StepPace():
            engine.pace = StepPace(dense_layer_s=resident_layer_s(self.hf, engine))

    def _watch(self, table: PrefetchTable | None) -> None:
        """Tell the engine where forward passes begin and end, and what the table asks for."""
        self._watching.close()
        self._watching = hooks = ExitStack()
        hooks.enter_context(token_ids_observed_by(self.hf, self.engine.begin_pass))
        hooks.enter_context(last_hidden_observed_by(self.hf, self.engine.end_pass))
        if table is not None and table.speaks_at(Moment.LAYER_OUTPUT):
            hooks.enter_context(
                layer_outputs_observed_by(self.hf, self.layers, self.engine.end_layer)
            )

    @contextmanager
    def running(self, config: TunedConfig | None = None) -> Iterator[Self]:
        """Run under a config, the present one if None, with fresh caches; restore afterwards.

        Other threads that want to run the model wait until the block ends.
        """
        with self._in_use:
            previous = self.config
            try:
                self.apply(config if config is not None else previous)
                yield self
            finally:
                self.apply(previous)

    def emulate_link(self, target: LinkTarget) -> None:
        """Make loads on a CPU take as long, against computing here, as on the target machine.

        Decode is timed with every expert at hand; loading one expert then takes the target's
        ratio times one such layer.
        """
        link = self.engine.link
        if not isinstance(link, EmulatedLink):
            raise ValueError(f"{target.name!r} cannot be emulated on a machine with a real link.")
        with self._in_use:
            layer_s = resident_layer_s(self.hf, self.engine)
            link.name = f"emulated:{target.name}"
            link.bytes_per_s = self.spec.stored_expert_bytes / (layer_s * target.load_ratio)

    def encode(self, text: str) -> torch.Tensor:
        """Return the token ids of a text, int64 [T].

        Raises:
            ValueError: it is not one text.
        """
        ids = self.tokenizer(one_string("text", text))["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def generate(
        self, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """Return the prompt continued by the model.

        Args:
            prompt: text to continue, one; must not be empty.
            max_new_tokens: at most this many tokens are added.
            temperature: 0 takes the likeliest token, higher samples more freely.
            seed: makes sampling repeatable; any integer of 64 bits.

        Raises:
            ValueError: the prompt is empty or not one text, or a number is out of range.
        """
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, at_least=0)
        temperature = finite_number("temperature", temperature, at_least=0)
        seed = whole_number("seed", seed, at_least=-(2**63), at_most=2**64 - 1)
        ids = self.encode(one_string("prompt", prompt))
        if not len(ids):
            raise ValueError("The prompt is empty; give at least one word to continue.")
        stop = self.hf.generation_config.eos_token_id
        stop_ids = frozenset(stop if isinstance(stop, list) else [] if stop is None else [stop])
        with self._in_use:
            produced = decode(
                self.hf,
                ids,
                max_new_tokens,
                temperature=temperature,
                generator=torch.Generator().manual_seed(seed),
                stop_ids=stop_ids,
            )
        return self.tokenizer.decode([*ids.tolist(), *produced], skip_special_tokens=True)

    def save_experts(self, folder: str | Path) -> None:
        """Write the experts as they are stored, for `load(..., store=folder)` to reopen at once."""
        identity = store_identity(self._checkpoint, self.spec)
        save_store(self.engine.store, Path(folder).expanduser(), identity)

    def detach(self) -> HFModel:
        """Give the experts back and return the plain transformers model; the handle is spent.

        Experts stored in fewer bits come back dequantised.
        """
        with self._in_use:
            self._watching.close()
            self._hook.detach()
            self.engine.release()
            for number in range(self.spec.n_layers):
                weights = self.engine.store.fused(number, self.hf.dtype)
                on_device = {name: t.to(self.engine.device) for name, t in weights.items()}
                self._hook.give_weights(number, on_device)
            self.engine.store.close()
        return self.hf


def check_precision(config: TunedConfig, spec: MoESpec) -> None:
    """Refuse a config that was tuned for experts stored otherwise."""
    if config.precision in (None, spec.dtype):
        return
    wanted = (
        "with one precision per expert, or from the prepared store it was tuned with"
        if config.precision == MIXED
        else f"with expert_dtype={config.precision!r}"
    )
    raise ValueError(
        f"The config stores experts as {config.precision}, the model is loaded as {spec.dtype}; "
        f"load it {wanted}."
    )
