"""What the machine was measured to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records.files import (
    IDENTIFYING,
    RecordError,
    check_version,
    digest,
    fields_of,
    frozen_array,
    save_json,
)
from adapmoe_lab.records.measured import (
    check_measured,
    check_seconds,
    listed,
    measured,
    numbers_in_words,
    rate,
    saved_names,
    short,
)
from adapmoe_lab.records.precision_plan import PrecisionPlan
from adapmoe_lab.records.spec import MoESpec
from adapmoe_lab.records.step_costs import N_CHUNKS, HostCosts, StepCosts

KIND = "hardware-profile"
SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class HardwareProfile:
    """Measured times of one decode step's parts, at batch 1.

    A step takes `dense_step_s`, `expert_s` for each expert it runs, and what its misses add: the
    link's time as far as nothing hides it, `miss_s` each and `wait_s` per layer that waited.
    What is None was not measured, or there is no such thing on the device.

    Attributes:
        device: name of the compute device.
        link: what experts travel over: `pcie`, or `emulated:<target>`.
        copy_bytes: int64 [n] ascending sizes copied from host to device.
        copy_s: float64 [n] median seconds of a copy of that size, pinned where there is CUDA.
        dense_step_s: seconds of one decode step outside the experts: attention, router, head, and
            all that the host does for it, `layer_host_s` of every layer included.
        expert_s: seconds one resident expert takes for one token, as the store that was probed
            holds them; `expert_times` has those of another.
        conditions: what else the numbers depend on (versions, threads, target, dtype).
        pageable_copy_s: float64 [n], the same copies from pageable memory; CUDA only.
        expert_s_by_precision: seconds of one expert of the model's shape for one token, alone and
            not from the processor's caches, by the precision it is stored in.
        layer_host_s: seconds a layer takes around its experts when all are resident: gating, the
            expert cache, the weighted sum. Router and attention are not in it.
        host_copy_s: seconds the host itself spends on one copy over an emulated link.
        miss_s: seconds a miss adds on the host, `host_copy_s` included; emulated links only, a
            real one copies by itself.
        wait_s: seconds that a layer takes beyond what it waited for the link: above zero where
            waking up takes time; below where the host works on while a GPU waits, and then no
            more is taken off than was waited.
        gate_s: seconds that gating adds to a layer, whatever it skips.
        predict_s: seconds the host takes to query a predictor about one layer and to weigh its
            candidates.
        gated_predict_s: the same where the candidates are put to the gate too.
        predict_overhead_s: seconds of a hook point at which predictors are queried, beside the
            queries themselves.
        predict_output_overhead_s: seconds that a hook point takes more if it is a layer's output,
            for which a GPU is waited for.
        host_sync_s: seconds until the host knows that an idle device is idle; CUDA only.
        launch_s: seconds the host takes to launch a kernel; CUDA only.
        host_memory_bytes_per_s: bytes read and written by a large copy in host memory.
        host_matmul_bytes_per_s: bytes of weights that a matrix-vector product on the CPU reads.
    """

    device: str
    link: str
    copy_bytes: NDArray[np.int64]
    copy_s: NDArray[np.float64]
    dense_step_s: float
    expert_s: float
    conditions: Mapping[str, Any] = field(default_factory=dict)
    pageable_copy_s: NDArray[np.float64] | None = None
    expert_s_by_precision: Mapping[str, float] | None = None
    layer_host_s: float | None = measured("a layer around its experts")
    host_copy_s: float | None = measured()
    miss_s: float | None = measured("a miss")
    wait_s: float | None = measured("a wait", is_signed=True)
    gate_s: float | None = measured("gating a layer")
    predict_s: float | None = measured("a prediction", saved_as="guess_s")
    gated_predict_s: float | None = measured("a prediction under a gate", saved_as="gated_guess_s")
    predict_overhead_s: float | None = measured("querying predictors", saved_as="ask_s")
    predict_output_overhead_s: float | None = measured(
        "querying them at a layer's output", saved_as="ask_output_s"
    )
    host_sync_s: float | None = measured("synchronising")
    launch_s: float | None = measured("a launch")
    host_memory_bytes_per_s: float | None = measured("a copy", is_rate=True)
    host_matmul_bytes_per_s: float | None = measured("a matrix-vector product", is_rate=True)

    def __post_init__(self) -> None:
        """Freeze arrays and mappings, and check that times and rates make sense."""
        sizes = frozen_array("copy_bytes", self.copy_bytes, np.int64, (None,))
        if not len(sizes) or sizes[0] < 1 or (np.diff(sizes) <= 0).any():
            raise RecordError("copy_bytes must hold at least one size, in ascending order.")
        object.__setattr__(self, "copy_bytes", sizes)
        for name in ("copy_s", "pageable_copy_s"):
            if getattr(self, name) is not None:
                times = frozen_array(name, getattr(self, name), np.float64, sizes.shape)
                object.__setattr__(self, name, times)
        by_precision = self.expert_s_by_precision
        if by_precision is not None:
            frozen = MappingProxyType(dict(by_precision))
            object.__setattr__(self, "expert_s_by_precision", frozen)
        object.__setattr__(self, "conditions", MappingProxyType(dict(self.conditions)))
        self._check_times()

    def _check_times(self) -> None:
        for name in ("dense_step_s", "expert_s"):
            check_seconds(name, getattr(self, name))
        for name in ("copy_s", "pageable_copy_s"):
            for value in () if getattr(self, name) is None else getattr(self, name):
                check_seconds(name, value)
        if any(not 0 <= s < np.inf for s in (self.expert_s_by_precision or {}).values()):
            raise RecordError("A hardware profile cannot hold negative times of an expert.")
        check_measured(self)

    @property
    def is_emulated(self) -> bool:
        """Whether the link is emulated rather than a real bus."""
        return self.link.startswith("emulated:")

    @property
    def is_of_replays(self) -> bool:
        """Whether steps were timed as replays of captured graphs, which prefetch nothing."""
        return self.conditions.get("executor") == "graph"

    @property
    def link_latency_s(self) -> float:
        """Seconds that a copy takes whatever its size, by the line through the measured copies."""
        return self._line(self.copy_s)[0]

    @property
    def link_bytes_per_s(self) -> float:
        """Bandwidth of the link, by the line through the measured copies, its latency left out."""
        return self._line(self.copy_s)[1]

    @property
    def pageable_bytes_per_s(self) -> float | None:
        """Bandwidth of the link from pageable memory; None where that was not measured."""
        return None if self.pageable_copy_s is None else self._line(self.pageable_copy_s)[1]

    def _line(self, times: NDArray[np.float64]) -> tuple[float, float]:
        """Return seconds at size zero and bytes per second beyond, fitted to relative errors."""
        sizes = self.copy_bytes.astype(np.float64)
        if len(sizes) == 1 or not times.all():
            latency_s, byte_s = 0.0, float(times[-1] / sizes[-1])
        else:
            byte_s, latency_s = map(float, np.polyfit(sizes, times, 1, w=1 / times))
            if byte_s <= 0:  # too small to tell sizes apart
                return float(times.mean()), float("inf")
        return max(0.0, latency_s), 1 / byte_s if byte_s else float("inf")

    def dense_layer_s(self, n_layers: int, is_gated: bool) -> float:
        """Seconds of one of L layers outside the experts, gating included where there is any."""
        return self.dense_step_s / n_layers + (self.gate_s or 0.0) * is_gated

    def step_costs(self, precision: PrecisionPlan, is_gated: bool = False) -> StepCosts:
        """Return what a forward pass takes here; what was not measured is taken as nothing.

        Args:
            precision: how the experts are stored, with their bytes.
            is_gated: whether experts may be skipped.

        Raises:
            RecordError: the bytes of the experts are not known.
        """
        sizes = precision.expert_bytes
        if sizes is None:
            raise RecordError(f"Costs need the bytes of every expert; {precision} comes without.")
        derived = {
            "dense_layer_s": self.dense_layer_s(len(sizes), is_gated),
            "predict_s": (self.gated_predict_s if is_gated else None) or self.predict_s,
            "chunk_s": (self.host_copy_s or 0.0) / N_CHUNKS,
        }
        known = {name: derived.get(name, getattr(self, name, None)) for name in HostCosts._fields}
        host = HostCosts(**{name: value or 0.0 for name, value in known.items()})
        return StepCosts(host, self.expert_times(precision), self.load_s, sizes)

    def expert_times(self, precision: PrecisionPlan) -> NDArray[np.float64]:
        """Seconds that each expert of a plan takes for one token, resident, float64 [L, E].

        `expert_s` was measured on the store that was probed. An expert takes as much more or less
        as one of its precision did alone; `expert_s` where that was not timed, and where it is not
        known what was probed.
        """
        assert precision.shape is not None, "a plan of a model has its shape"  # noqa: S101
        alone, probed_s = self.expert_s_by_precision or {}, self._probed_alone_s
        ratios = {name: s / probed_s for name, s in alone.items()} if probed_s else {}
        if precision.names is None:
            return np.full(precision.shape, self.expert_s)
        relative = [[ratios.get(name, 1.0) for name in layer] for layer in precision.names]
        return self.expert_s * np.array(relative)

    @property
    def _probed_alone_s(self) -> float | None:
        """Seconds of an expert alone, averaged over the store that was probed."""
        counts = self.conditions.get("experts_by_precision")
        if counts is None and "dtype" in self.conditions:  # as version 0.1 called it
            counts = {self.conditions["dtype"]: 1}
        return mean_expert_s(self.expert_s_by_precision or {}, counts or {})

    def load_s(self, n_bytes: float) -> float:
        """Seconds to bring `n_bytes` to the device, interpolated between measured sizes."""
        if n_bytes >= self.copy_bytes[-1]:
            return float(self.copy_s[-1] * n_bytes / self.copy_bytes[-1])
        return float(np.interp(n_bytes, self.copy_bytes, self.copy_s))

    def load_ratio(self, spec: MoESpec) -> float:
        """Time to load one of a model's experts over that of a layer with every expert there.

        Where experts differ in precision, an expert of their mean size.
        """
        expert_s = float(self.expert_times(spec.precision).mean())
        layer_s = self.dense_step_s / spec.n_layers + spec.top_k * expert_s
        return self.load_s(spec.mean_expert_bytes) / layer_s

    def at_load_ratio(self, spec: MoESpec, ratio: float) -> HardwareProfile:
        """Return the profile with a real link of such a speed that `load_ratio` is `ratio`.

        What emulating a link costs the host is left out.
        """
        scaled = self.copy_s * (ratio / self.load_ratio(spec))
        wait_s = None if self.is_emulated else self.wait_s
        return replace(self, copy_s=scaled, host_copy_s=None, miss_s=None, wait_s=wait_s)

    def __str__(self) -> str:
        """Return a few lines on what was measured, and what is emulated."""
        link = f"{rate(self.link_bytes_per_s)} + {short(self.link_latency_s)}"
        if self.is_emulated:
            link += "; emulated: real copies, each held as long as on the named machine"
        if self.pageable_bytes_per_s is not None:
            link += f" pinned, {rate(self.pageable_bytes_per_s)} pageable"
        lines = {
            "device": self.device,
            "link": f"{self.link}, {link}",
            "step": f"{short(self.dense_step_s)} outside the experts",
            "expert": f"{short(self.expert_s)} resident, "
            f"{short(self.load_s(float(self.copy_bytes[-1])))} to load",
            "stored in": listed(self.expert_s_by_precision or {}, is_rate=False),
            "host": listed(numbers_in_words(self, is_rate=False), is_rate=False),
            "memory": listed(numbers_in_words(self, is_rate=True), is_rate=True),
        }
        return "\n".join(f"{name:10} {text}" for name, text in lines.items() if text)

    def fingerprint(self) -> str:
        """Identify the profile by everything it holds."""
        return digest(json.dumps(self.to_json(), sort_keys=True))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values that `from_json` reads back."""
        saved = saved_names(self)
        return {
            saved.get(name, name): _plain(getattr(self, name)) for name in self.__dataclass_fields__
        }

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], source: str = "The hardware profile"
    ) -> HardwareProfile:
        """Build a profile from what `to_json` returned; what an older version lacks is None.

        Raises:
            RecordError: a value is unknown, missing or wrong; the text names `source`.
        """
        later = [one.name for one in fields(cls) if one.default is None]
        renamed = {saved: name for name, saved in saved_names(cls).items()}
        return cls(**fields_of(cls, values, source, later, renamed))

    def save(self, path: str | Path) -> Path:
        """Write the profile as JSON, whole or not at all, and return its path."""
        path = Path(path)
        header = {"kind": KIND, "schema_version": SCHEMA_VERSION}
        save_json(path, {**header, **self.to_json()}, allow_nan=False)
        return path

    @classmethod
    def load(cls, path: str | Path) -> HardwareProfile:
        """Read a saved profile.

        Raises:
            FileNotFoundError: there is no such file.
            RecordError: cut short, of another kind or version, or with wrong values.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"No {KIND} at {path}.")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            check_version(document, KIND, SCHEMA_VERSION, path)
            values = {name: document[name] for name in document if name not in IDENTIFYING}
            return cls.from_json(values, str(path))
        except RecordError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            raise RecordError(
                f"{path} is not a readable {KIND}: it is damaged, cut short, or another kind of "
                f"file ({error}). Probe the hardware again."
            ) from error


def mean_expert_s(by_precision: Mapping[str, float], counts: Mapping[str, int]) -> float | None:
    """Return the mean seconds of experts, so many of each precision; None if one was not timed."""
    if not counts or not set(counts) <= set(by_precision):
        return None
    total = sum(counts.values())
    return sum(by_precision[name] * (count / total) for name, count in counts.items())


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return dict(value) if isinstance(value, Mapping) else value
