import io
import json
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
from traces import make_spec

from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.records import (
    OFF,
    GatingTable,
    HardwareProfile,
    PrecisionPlan,
    Predictors,
    PrefetchSource,
    PrefetchTable,
    RecordError,
    Surrogates,
    TunedConfig,
)
from adapmoe_lab.records.config.section import ConfigSection, SavedSection
from adapmoe_lab.records.files import known_values
from adapmoe_lab.records.tensors import TensorRecord, loaded_tensors, tensor_bytes

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture
def config():
    spec = make_spec()
    return TunedConfig(
        model=TunedConfig.model_identity(spec),
        gating=GatingTable.per_layer([0.7, OFF, 0.9], top_k=2),
        plan=slots_plan(spec, 4),
        precision=spec.precision,
        hardware=HardwareProfile("cpu", "emulated:x", [1000], [0.01], 0.001, 0.0001),
        evidence={"predicted": {"ms_per_token": 3.0}},
    )


def test_reads_back_equal(config, tmp_path):
    path = config.save(tmp_path / "tuned.json")
    assert TunedConfig.load(path).to_json() == config.to_json()


def test_all_sections_are_present_and_off_is_null(tmp_path):
    path = TunedConfig.untuned(make_spec()).save(tmp_path / "plain.json")
    document = json.loads(path.read_text())
    sections = [
        "gating",
        "compensation",
        "plan",
        "eviction",
        "prefetch",
        "precision",
        "hardware",
        "evidence",
    ]
    assert {name: document[name] for name in sections} == {
        **dict.fromkeys(sections),
        "eviction": {"policy": "lru"},
    }
    assert document["schema_version"] == 1


def test_a_cut_that_is_off_is_null_in_the_file(config):
    assert config.to_json()["gating"]["cuts"][1] == [None]


def test_wrong_model_is_told_with_both_names(config):
    with pytest.raises(RecordError, match=r"tuned for 'synthetic' \(mixtral, 3 layers x 8 exp"):
        config.check_model(make_spec(n_experts=4))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_file(config, tmp_path, share):
    path = config.save(tmp_path / "tuned.json")
    text = path.read_text()
    path.write_text(text[: int(len(text) * share)])
    with pytest.raises(RecordError, match=r"not a complete JSON file.*Export the config again"):
        TunedConfig.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, r"schema version 99; this adapmoe-lab reads version 1\. Upgrade"),
        ({"kind": "recipe"}, "holds a 'recipe'; expected a 'tuned-config'"),
        (
            {"prefetch": {"policy": "x"}},
            "section 'prefetch', holds 'policy', which this adapmoe-lab",
        ),
        ({"surprise": 1}, r"tuned\.json holds 'surprise', which this adapmoe-lab does not know"),
        (
            {"gating": {"quantity": "entropy", "cuts": [], "renormalise": False}},
            "Gating on 'entropy' is unknown",
        ),
        ({"plan": {"slots": [1]}}, "section 'plan', lacks 'slot_bytes', 'budget_bytes'"),
        ({"hardware": {}}, "section 'hardware', lacks 'device', 'link'"),
        ({"model": 3}, "section 'model', holds a int where named values are expected"),
        ({"evidence": 3}, "has a section of the wrong form"),
        ({"eviction": {"policy": 3}}, "Eviction must be the name of a policy, got 3"),
    ],
)
def test_wrong_content_is_named(config, tmp_path, change, message):
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({**config.to_json(), **change}))
    with pytest.raises(RecordError, match=message):
        TunedConfig.load(path)


def prefetching(spec, fitted=None, predictor="next_router"):
    source = PrefetchSource(predictor, 1, np.full((spec.n_layers, 2), 0.75))
    table = PrefetchTable([source, PrefetchSource("own_norm", 1, source.probability)], 4, fitted)
    return replace(TunedConfig.untuned(spec), prefetch=table)


def fitted_to(spec):
    shape = (spec.hidden_size + 1, spec.n_experts)
    rng = np.random.default_rng(0)
    return Predictors(
        model_fingerprint=spec.fingerprint(),
        ridge={1: rng.normal(size=(spec.n_layers, *shape))},
        table_tokens=np.arange(4),
        token_table=rng.random((4, spec.n_experts)),
        last_hidden=rng.normal(size=shape),
        n_tokens=10,
    )


def test_prefetch_is_kept_with_what_was_fitted_for_it(tmp_path):
    spec = make_spec()
    plain = prefetching(spec)
    again = TunedConfig.load(plain.save(tmp_path / "plain.json"))
    assert again.prefetch.fingerprint() == plain.prefetch.fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["plain.json"]
    config = prefetching(spec, fitted_to(spec), "ridge")
    path = config.save(tmp_path / "tuned.json")
    again = TunedConfig.load(path)
    assert again.to_json("tuned") == config.to_json("tuned")
    assert again.prefetch.fingerprint() == config.prefetch.fingerprint()
    beside = path.with_name(json.loads(path.read_text())["prefetch"]["fitted"]["file"])
    with zipfile.ZipFile(io.BytesIO(config.as_one_file("tuned"))) as archive:
        assert sorted(archive.namelist()) == sorted([beside.name, "tuned.json"])
    beside.write_bytes(beside.read_bytes()[:-4])
    with pytest.raises(RecordError, match="it changed since it was saved, or is damaged"):
        TunedConfig.load(path)
    beside.unlink()
    with pytest.raises(RecordError, match=r"needs tuned\..*safetensors beside it, which is not"):
        TunedConfig.load(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda spec: prefetching(spec, predictor="oracle"),
            "Predictor 'oracle' is unknown; expected one of token_table",
        ),
        (
            lambda spec: PrefetchSource("next_router", 0, np.ones((3, 2))),
            "'next_router' predicts later layers, at distances from 1; got distance 0",
        ),
        (
            lambda spec: PrefetchSource("token_table", 1, np.ones((3, 2))),
            "'token_table' predicts layer 0 only; got distance 1",
        ),
        (
            lambda spec: PrefetchSource("next_router", 1, np.full((3, 2), 1.5)),
            r"Probabilities of predictions must lie in 0\.\.1",
        ),
        (lambda spec: prefetching(spec, predictor="ridge"), "ridge must be fitted; give what"),
        (lambda spec: PrefetchTable([], 2), "needs a predictor and room for an expert; got 0"),
        (
            lambda spec: PrefetchTable([PrefetchSource("ridge", 1, np.ones((3, 2)))] * 2, 2),
            "One predictor can predict at each hook point and distance",
        ),
        (
            lambda spec: replace(prefetching(make_spec(n_layers=4)), model=dict(
                TunedConfig.model_identity(spec)
            )),
            "The prefetch table is for 4 layers; the model has 3",
        ),
        (
            lambda spec: prefetching(spec, fitted_to(make_spec(n_experts=4)), "ridge"),
            "The predictors were fitted to a model of fingerprint",
        ),
    ],
)  # fmt: skip
def test_a_prefetch_that_cannot_be_is_refused(make, message):
    with pytest.raises(RecordError, match=message):
        make(make_spec())


def test_missing_section_is_named(config, tmp_path):
    document = config.to_json()
    del document["evidence"]
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(document))
    with pytest.raises(RecordError, match="lacks 'evidence'"):
        TunedConfig.load(path)


def test_gating_table_of_another_shape_is_refused():
    spec = make_spec()
    with pytest.raises(RecordError, match="for 2 layers and top-2; the model has 3 layers"):
        TunedConfig(
            model=TunedConfig.model_identity(spec), gating=GatingTable(np.ones((2, 1)) * 0.7)
        )


def test_not_a_number_is_never_written(config, tmp_path):
    path = config.save(tmp_path / "tuned.json")
    before = path.read_text()
    with pytest.raises(RecordError, match=r"evidence\.loss is nan, and only finite numbers"):
        config.with_evidence(loss=float("nan")).save(path)
    assert path.read_text() == before


@pytest.mark.parametrize(
    "path", sorted(FIXTURES.glob("tuned_config_v*.json")), ids=lambda p: p.stem
)
def test_files_of_every_version_can_still_be_read(path):
    """Each schema version leaves a file here, written when it was the newest."""
    config = TunedConfig.load(path)
    assert config.gating.cuts[:, 0].tolist() == [0.75, OFF, 0.875]
    assert config.plan.slots.tolist() == [4, 4, 4]
    config.check_model(make_spec())


def running(spec):
    """Return a config in which every section is on."""
    return replace(
        prefetching(spec),
        gating=GatingTable.per_layer([0.7] * 3, top_k=2),
        compensation=Surrogates.scaling(spec, 0.5),
        plan=slots_plan(spec, 4),
        precision=spec.precision,
        hardware=HardwareProfile("cpu", "emulated:x", [1000], [0.01], 0.001, 0.0001),
        evidence={"predicted": {"ms_per_token": 3.0}},
    )


OTHERWISE = {
    "gating": lambda config: GatingTable.per_layer([0.7, 0.7, 0.8], top_k=2),
    "compensation": lambda config: Surrogates.scaling(make_spec(), 0.6),
    "plan": lambda config: slots_plan(make_spec(), 3),
    "eviction": lambda config: "lfu",
    "prefetch": lambda config: replace(config.prefetch, buffer_slots=2),
    "precision": lambda config: PrecisionPlan.uniform("float32", (3, 8), 2000),
    "hardware": lambda config: replace(config.hardware, expert_s=2e-4),
}
"""Another value of every section that decides what runs."""


def test_every_field_but_the_model_is_a_section():
    names = [section.name for section in TunedConfig.SECTIONS]
    assert ["model", *names] == [f.name for f in fields(TunedConfig)]


@pytest.mark.parametrize("section", TunedConfig.SECTIONS, ids=lambda section: section.name)
def test_every_section_is_in_the_fingerprint_or_said_to_decide_nothing(section):
    """A new section fails here until it has another value in `OTHERWISE`."""
    name, config = section.name, running(make_spec())
    assert (name in OTHERWISE) == section.decides
    before = config.section_fingerprints()
    assert None not in before.values()
    if not section.decides:
        assert name not in before
        return
    other = replace(config, **{name: OTHERWISE[name](config)})
    after = other.section_fingerprints()
    assert [section for section in before if before[section] != after[section]] == [name]
    assert other.fingerprint() != config.fingerprint()


def test_what_is_known_about_a_config_is_not_in_its_fingerprint(tmp_path):
    config = running(make_spec())
    plan = replace(config.plan, method="by hand", budget_bytes=1, expected_loads=[1.0] * 3)
    same = replace(config, plan=plan, evidence={})
    assert same.fingerprint() == config.fingerprint()
    assert TunedConfig.load(config.save(tmp_path / "a.json")).fingerprint() == config.fingerprint()
    another = replace(make_spec(), revision="weights:others")
    assert (
        TunedConfig.untuned(another).fingerprint() != TunedConfig.untuned(make_spec()).fingerprint()
    )


def test_times_of_the_machine_count_only_where_something_is_fetched_ahead():
    config = replace(running(make_spec()), prefetch=None)
    faster = replace(config.hardware, expert_s=1e-5)
    assert replace(config, hardware=faster).fingerprint() == config.fingerprint()


def test_pins_and_pools_tell_plans_apart():
    plan = slots_plan(make_spec(), 2)
    pinned = [replace(plan, pinned=((first, 5),) * 3) for first in (0, 1)]
    pool = replace(plan, is_global=True)
    plans = [plan, *pinned, pool, replace(plan, slots=[1, 2, 3])]
    assert len({p.fingerprint() for p in plans}) == 5
    assert replace(pool, slots=[1, 2, 3]).fingerprint() == pool.fingerprint()


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("gating", {"cuts": "abc"}),
        ("gating", {"cuts": [[0.5], [0.5, 0.5], [0.5]]}),
        ("plan", {"slots": ["many", 1, 1]}),
    ],
)
def test_values_that_are_no_numbers_are_refused_with_the_file(config, tmp_path, section, value):
    document = config.to_json()
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({**document, section: {**document[section], **value}}))
    with pytest.raises(RecordError, match=r"tuned\.json has a section of the wrong form: ValueErr"):
        TunedConfig.load(path)


SAVED = FIXTURES / "saved_by_0_1"


@pytest.mark.parametrize("name", ["config.json", "config_mixed.json"])
def test_a_config_of_version_0_1_is_saved_again_byte_for_byte(tmp_path, name):
    config = TunedConfig.load(SAVED / name)
    path = config.save(tmp_path / name)
    assert path.read_bytes() == (SAVED / name).read_bytes()
    beside = sorted(tmp_path.glob("*.safetensors"))
    assert len(beside) == len(config.tensors)
    for file in beside:
        assert file.read_bytes() == (SAVED / file.name).read_bytes()


def test_fingerprints_are_those_of_version_0_1():
    """Measurements carry them in their conditions."""
    config = TunedConfig.load(SAVED / "config.json")
    assert config.fingerprint() == "a3061f71c55272ee"
    assert config.section_fingerprints() == {
        "gating": "29b15015e652e10c",
        "compensation": "487c0b58e2a17ae4",
        "plan": "5354e558d4ff33a5",
        "eviction": "lfu_aged",
        "prefetch": "e55db564b0e3e879",
        "precision": "ded2aafa5ee2e086",
        "hardware": "0d6d321e7d36cfc3",
    }


class Steering(TensorRecord):
    """A toy technique: a push [L] to every layer, kept in a file of tensors."""

    def __init__(self, push):
        self.push = np.asarray(push, dtype=np.float32)

    def to_bytes(self):
        return tensor_bytes("steering", 1, {}, {"push": self.push})


class SteeringSection(ConfigSection[Steering]):
    name = "steering"
    is_later = True

    def checked(self, value: Steering, config: TunedConfig) -> Steering:
        if len(value.push) != config.model["n_layers"]:
            raise RecordError(f"{len(value.push)} pushes for {config.model['n_layers']} layers.")
        return value

    def tensors(self, value: Steering) -> Steering:
        return value

    def to_json(self, value: Steering, name: str) -> dict:
        return {"file": f"{name}.{value.sha256[:12]}.safetensors"}

    def from_json(self, saved: SavedSection) -> Steering:
        values = known_values(saved.values, saved.source, ("file",))
        path = saved.path.with_name(values["file"])
        with loaded_tensors(path, "steering", 1) as (_, tensors):
            return Steering(tensors["push"])


@dataclass(frozen=True, eq=False)
class SteeredConfig(TunedConfig):
    """A config with one section more: a class, a line and a field."""

    SECTIONS = (*TunedConfig.SECTIONS, SteeringSection())

    steering: Steering | None = None


def test_a_new_section_is_saved_loaded_and_fingerprinted_without_another_edit(tmp_path):
    plain = running(make_spec())
    config = SteeredConfig(**vars(plain), steering=Steering([1, 2, 3]))
    assert set(config.tensors) == {"compensation", "steering"}
    again = SteeredConfig.load(config.save(tmp_path / "tuned.json"))
    assert again.steering.push.tolist() == [1, 2, 3]
    assert again.to_json() == config.to_json()
    assert again.fingerprint() == config.fingerprint() != plain.fingerprint()
    assert again.section_fingerprints()["steering"] == config.steering.fingerprint()
    with zipfile.ZipFile(io.BytesIO(config.as_one_file())) as archive:
        assert len(archive.namelist()) == 3


def test_a_new_section_is_refused_in_words(tmp_path):
    with pytest.raises(RecordError, match="2 pushes for 3 layers"):
        SteeredConfig(TunedConfig.model_identity(make_spec()), steering=Steering([1, 2]))
    path = tmp_path / "tuned.json"
    document = {**running(make_spec()).to_json(), "compensation": None, "steering": {"push": 1}}
    path.write_text(json.dumps(document))
    with pytest.raises(RecordError, match="section 'steering', holds 'push', which this adapmoe"):
        SteeredConfig.load(path)
    with pytest.raises(RecordError, match="holds 'steering', which this adapmoe-lab does not know"):
        TunedConfig.load(path)


def test_files_from_before_a_section_load_with_it_off_and_their_old_fingerprint():
    plain = TunedConfig.load(SAVED / "config.json")
    steered = SteeredConfig.load(SAVED / "config.json")
    assert steered.steering is None
    assert steered.fingerprint() == plain.fingerprint()
