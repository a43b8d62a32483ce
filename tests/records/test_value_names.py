"""Every saved record: values it does not know and values it lacks are named, with the file."""

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from traces import make_spec

from adapmoe_lab.assets import data_folder
from adapmoe_lab.engine.store.index import read_index
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.records import (
    HardwareProfile,
    LatencyReport,
    LossReport,
    Measurement,
    Predictors,
    RecordError,
    RoutingTrace,
    SensitivityProfile,
    Surrogates,
    Traffic,
    TunedConfig,
    load_targets,
)
from adapmoe_lab.records.files import fields_of
from adapmoe_lab.records.known_models import load_known_models
from adapmoe_lab.records.published import PublishedAdapMoE

SAVED = Path(__file__).parents[1] / "fixtures" / "saved_by_0_1"
STRANGE = "strange_value"
TRAFFIC = Traffic([1, 2], [3, 4], 5, 6, 7, 8, [0, 1], [2, 0])
SECONDS = Measurement([1.0, 2.0], "s", 1, {"slots": 4})
PLAIN = {
    "spec": make_spec(),
    "measurement": SECONDS,
    "latency": LatencyReport(SECONDS, SECONDS, SECONDS, TRAFFIC, TRAFFIC),
    "loss": LossReport([10.0, 40.0], [5, 10], 0.25, "digest"),
    "traffic": TRAFFIC,
}
"""Records without a file of their own."""


def read_plain(name):
    return lambda path: type(PLAIN[name]).from_json(json.loads(path.read_text()), str(path))


JSON_FILES = {
    "config.json": TunedConfig.load,
    "hardware.json": HardwareProfile.load,
    "store_int4/experts.json": lambda path: read_index(path.parent),
    "targets.json": load_targets,
    "known_models.json": load_known_models,
    "adapmoe_published.json": PublishedAdapMoE.load,
    **{f"{name}.json": read_plain(name) for name in PLAIN},
}
HARDWARE_LATER = {
    "pageable_copy_s", "expert_s_by_precision", "layer_host_s", "host_copy_s", "miss_s", "wait_s",
    "gate_s", "guess_s", "gated_guess_s", "ask_s", "ask_output_s", "host_sync_s", "launch_s",
    "host_memory_bytes_per_s", "host_matmul_bytes_per_s",
}  # fmt: skip
LEVELS = [
    ("config.json", (), set()),
    ("config.json", ("model",), set()),
    ("config.json", ("gating",), set()),
    ("config.json", ("compensation",), set()),
    ("config.json", ("plan",), {"is_global", "pinned"}),
    ("config.json", ("eviction",), set()),
    ("config.json", ("prefetch",), set()),
    ("config.json", ("prefetch", "sources", 1), set()),
    ("config.json", ("prefetch", "fitted"), set()),
    ("config.json", ("precision",), set()),
    ("config.json", ("hardware",), HARDWARE_LATER),
    ("hardware.json", (), HARDWARE_LATER),
    ("store_int4/experts.json", (), set()),
    ("store_int4/experts.json", ("experts", 1, 2), set()),
    ("targets.json", (), set()),
    ("targets.json", ("targets", 1), set()),
    ("known_models.json", (), set()),
    ("known_models.json", ("models", 1), set()),
    ("adapmoe_published.json", (), set()),
    ("adapmoe_published.json", ("mmlu_8x7b", "cot_hub_mmlu_5shot_8x7b_nf4", 1), set()),
    ("adapmoe_published.json", ("allocations", "slots=64,adaptive_gating=true"), set()),
    ("spec.json", (), {"partial_revision"}),
    ("measurement.json", (), set()),
    ("latency.json", (), set()),
    ("latency.json", ("decode",), set()),
    ("latency.json", ("decode_traffic",), set()),
    ("loss.json", (), set()),
    ("traffic.json", (), set()),
]
"""Every place in a JSON file that holds named values, and those that old files lack there."""


@pytest.fixture
def saved(tmp_path):
    """Return a folder with a file of every kind."""
    folder = tmp_path / "saved"
    shutil.copytree(SAVED, folder)
    for name in ("targets.json", "known_models.json", "adapmoe_published.json"):
        shutil.copy(data_folder() / name, folder)
    for name, record in PLAIN.items():
        (folder / f"{name}.json").write_text(json.dumps(record.to_json()))
    return folder


def edited(path, level, change):
    """Change the values at one level of a JSON file."""
    document = json.loads(path.read_text())
    values = document
    for key in level:
        values = values[key]
    change(values)
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(("name", "level", "later"), LEVELS)
def test_json_with_an_unknown_or_missing_value(saved, name, level, later):
    path, load = saved / name, JSON_FILES[name]
    whole = path.read_bytes()
    load(path)
    edited(path, level, lambda values: values.update({STRANGE: 1}))
    with pytest.raises((RecordError, CheckpointError), match=f"holds '{STRANGE}', which") as error:
        load(path)
    assert str(path) in str(error.value)
    if name == "config.json" and level:
        assert f"section '{level[0]}'" in str(error.value)
    assert "upgrade adapmoe-lab" in str(error.value)
    path.write_bytes(whole)
    values = json.loads(whole)
    for key in level:
        values = values[key]
    assert later <= set(values)
    for key in values:
        path.write_bytes(whole)
        edited(path, level, lambda values, key=key: values.pop(key))
        if key in later:
            load(path)
        elif key not in ("kind", "schema_version"):  # without them it is no such file
            with pytest.raises((RecordError, CheckpointError), match=f"lacks '{key}'"):
                load(path)


@pytest.mark.parametrize("name", ["targets.json", "known_models.json", "adapmoe_published.json"])
@pytest.mark.parametrize("content", ["{", "5", '"text"', "[1]"])
def test_a_shipped_file_that_is_another_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(RecordError, match=rf"/{name} (is not|does not hold|holds a) "):
        JSON_FILES[name](tmp_path / name)


@pytest.mark.parametrize("record", PLAIN.values(), ids=PLAIN)
def test_records_without_a_file_come_back_as_they_were(record):
    again = type(record).from_json(json.loads(json.dumps(record.to_json())))
    assert again.to_json() == record.to_json()


@dataclass
class Arrays:
    """A file of arrays with a JSON header, taken apart."""

    header: dict
    arrays: dict

    @classmethod
    def of(cls, path):
        if path.suffix == ".npz":
            with np.load(path) as stored:
                arrays = {name: stored[name] for name in stored.files}
            return cls(json.loads(arrays.pop("header").tobytes()), arrays)
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["header"])
        return cls(header, load_tensors(content))

    def write(self, path):
        text = json.dumps(self.header)
        if path.suffix == ".npz":
            content = io.BytesIO()
            encoded = np.frombuffer(text.encode(), dtype=np.uint8)
            np.savez(content, **{"header": encoded, **self.arrays})
            path.write_bytes(content.getvalue())
        else:
            path.write_bytes(save_tensors(self.arrays, metadata={"header": text}))


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("trace.npz", RoutingTrace.load),
        ("sensitivity.npz", SensitivityProfile.load),
        ("surrogates.safetensors", Surrogates.load),
        ("predictors.safetensors", Predictors.load),
    ],
)
def test_arrays_with_an_unknown_or_missing_value(saved, name, load):
    path = saved / name
    whole = path.read_bytes()
    for part in ("header", "arrays"):
        path.write_bytes(whole)
        parts = Arrays.of(path)
        values = getattr(parts, part)
        values[STRANGE] = np.zeros(3) if part == "arrays" else 1
        parts.write(path)
        with pytest.raises(RecordError, match=f"holds '{STRANGE}', which this adapmoe-lab") as told:
            load(path)
        assert str(path) in str(told.value)
        del values[STRANGE]
        for key in set(values) - {"kind", "schema_version"}:
            taken = values.pop(key)
            parts.write(path)
            if not key.startswith("ridge."):  # one distance less is another record
                message = "prediction_scores" if key.startswith("predictions") else f"'{key}'"
                with pytest.raises(RecordError, match=message):
                    load(path)
            values[key] = taken


@dataclass
class Costs:
    """A record whose second value has had two names, and whose third came later."""

    layer_s: float
    expert_s: float
    head_s: float = 0.0


RENAMED = {"piece_s": "expert_s", "chunk_s": "expert_s"}


def read_costs(values):
    return Costs(**fields_of(Costs, values, "costs.json", later=("head_s",), renamed=RENAMED))


def test_a_renamed_value_is_read_by_its_old_names_and_a_later_one_may_be_missing():
    for name in ("expert_s", *RENAMED):
        assert read_costs({"layer_s": 1.0, name: 2.0}) == Costs(1.0, 2.0)
    assert read_costs({"layer_s": 1.0, "expert_s": 2.0, "head_s": 3.0}).head_s == 3.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_s": 1.0, "expert_s": 2.0, "piece_s": 3.0}, "'expert_s' and 'piece_s', which are"),
        ({"layer_s": 1.0, "chunk_s": 2.0, "piece_s": 3.0}, "'chunk_s' and 'piece_s', which are"),
        ({"layer_s": 1.0}, r"costs\.json lacks 'expert_s'\. Restore it, or make it again"),
        ({}, "lacks 'layer_s', 'expert_s'"),
        ([1.0, 2.0], r"costs\.json holds a list where named values are expected"),
        (None, "holds a NoneType where named values are expected"),
    ],
)
def test_what_is_not_the_record_is_refused_in_words(values, message):
    with pytest.raises(RecordError, match=message):
        read_costs(values)
