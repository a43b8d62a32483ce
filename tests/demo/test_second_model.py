"""The second trained model: its committed records, and the command that makes it again."""

import shutil

import numpy as np
import pytest
from model_records import (
    DEMO,
    RECORDS,
    SECOND,
    documented_commands,
    read,
    recorded_files,
    recorded_recipe,
)

from adapmoe_lab.demo.card import write_card
from adapmoe_lab.models.demo_architecture import build_model, n_parameters


def test_it_is_of_another_family_and_of_the_demo_s_size():
    record = read(SECOND, "training_record.json")
    shape = recorded_recipe(SECOND).architecture
    assert (shape.family, shape.n_experts, shape.top_k) == ("qwen3_moe", 32, 4)
    assert record["n_parameters"] == n_parameters(build_model(shape, 0))
    demo = read(DEMO, "training_record.json")
    assert record["n_parameters"] == pytest.approx(demo["n_parameters"], rel=0.01)


def test_it_is_trained_as_the_demo_was():
    demo, second = recorded_recipe(DEMO).as_dict(), recorded_recipe(SECOND).as_dict()
    assert {name for name in demo if second[name] != demo[name]} == {"minutes"}
    assert recorded_files(SECOND) == recorded_files(DEMO)


def test_the_documented_commands_are_the_recipes_that_were_run():
    commands = documented_commands()
    assert commands["data/demo"] == recorded_recipe(DEMO)
    assert commands["SECOND"] == recorded_recipe(SECOND)


def test_no_weights_are_committed():
    assert not list(SECOND.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in SECOND.iterdir()) < 200_000


def test_its_recorded_quality_is_close_to_the_demo_s():
    measured, demo = read(SECOND, "measurements.json"), read(DEMO, "measurements.json")
    assert measured["held_out"].keys() == demo["held_out"].keys()
    for name, loss in measured["held_out"].items():
        assert loss["n_tokens"] == demo["held_out"][name]["n_tokens"]
        assert loss["nats_per_token"] == pytest.approx(
            demo["held_out"][name]["nats_per_token"], abs=0.05
        )
    assert measured["minimal_pairs"]["accuracy"] >= 0.85


def test_no_router_collapsed():
    """Every layer spreads its tokens as if over 28 of its 32 experts or more, and uses them all."""
    use = np.array(read(SECOND, "measurements.json")["routing"]["expert_use"])
    assert use.shape == (8, 32)
    assert use.sum(1) == pytest.approx(4, abs=0.01)
    shares = use / use.sum(1, keepdims=True)
    effective = np.exp(-(shares * np.log(shares)).sum(1))
    assert effective.min() >= 28
    assert use.min() >= 0.03


@pytest.mark.parametrize("folder", [DEMO, SECOND], ids=lambda folder: folder.name)
def test_cards_are_what_their_records_give(folder, tmp_path):
    for name in RECORDS:
        shutil.copy(folder / name, tmp_path)
    write_card(tmp_path)
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert written == (folder / "README.md").read_text(encoding="utf-8")
