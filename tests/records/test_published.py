"""AdapMoE's published numbers, and the two units of "fewer experts"."""

import json

import numpy as np
import pytest

import adapmoe_lab as lab
from adapmoe_lab.assets import data_folder
from adapmoe_lab.policies.allocation.slots import adapmoe_loads
from adapmoe_lab.records import PublishedAdapMoE, PublishedRun, RecordError
from adapmoe_lab.records.published import N_MMLU_QUESTIONS

FILE = data_folder() / "adapmoe_published.json"


def every_run():
    """Each run, with the entry of the file it comes from."""
    stored, published = json.loads(FILE.read_text())["mmlu_8x7b"], lab.published_adapmoe()
    return [
        (run, entry)
        for evaluation, runs in published.mmlu.items()
        for run, entry in zip(runs, stored[evaluation], strict=True)
    ]


def test_it_holds_what_the_file_says_and_where_it_is_from():
    published = lab.published_adapmoe()
    assert published.source.startswith("PKU-SEC-Lab/AdapMoE")
    assert {m: len(s) for m, s in published.sensitivity.items()} == {
        "mixtral-8x7b": 32,
        "mixtral-8x22b": 56,
    }
    assert published.sensitivity["mixtral-8x7b"][[0, -1]].tolist() == [
        46.69189453125,
        0.02294778823852539,
    ]
    assert len(every_run()) == 14
    with pytest.raises(ValueError, match="read-only"):
        published.sensitivity["mixtral-8x7b"][0] = 1
    with pytest.raises(TypeError):
        published.sensitivity["mixtral-8x7b"] = np.ones(32)


def test_it_holds_what_the_authors_divided_slots_by_and_what_came_of_it():
    published, stored = lab.published_adapmoe(), json.loads(FILE.read_text())
    assert published.single_expert_ratio.tolist() == stored["single_expert_ratio_8x7b"]
    assert published.prefetch_accuracy.tolist() == stored["prefetch_accuracy_8x7b"]
    assert list(published.slots) == [32, 64, 128]
    loads = adapmoe_loads(8, published.single_expert_ratio, published.prefetch_accuracy)
    for n_slots, slots in published.slots.items():
        entry = stored["allocations"][f"slots={n_slots},adaptive_gating=true"]
        assert slots.sum() == n_slots
        cost = loads[np.arange(32), slots].sum()
        assert cost == pytest.approx(entry["published_cost"], abs=1e-5)
    with pytest.raises(ValueError, match="read-only"):
        published.slots[32][0] = 8


def test_means_over_layers_are_the_published_means():
    for run, entry in every_run():
        assert run.mean_single_expert_ratio == pytest.approx(entry["single_ratio"], rel=1e-12)
        assert run.experts_per_token == pytest.approx(entry["avg_activated_experts"], rel=1e-12)


def test_a_quarter_of_single_expert_tokens_is_an_eighth_fewer_experts():
    quarter = PublishedRun(0.005, 0.7, np.array([0.0, 0.5]))
    assert quarter.mean_single_expert_ratio == 0.25
    assert quarter.experts_per_token == 1.75
    assert quarter.skipped_fraction == 0.125
    for run, entry in every_run():
        fewer = 1 - entry["avg_activated_experts"] / 2
        assert run.skipped_fraction == pytest.approx(fewer, abs=1e-12)
    claimed = [run for run, _ in every_run() if run.threshold == 0.005]
    assert [round(run.mean_single_expert_ratio, 3) for run in claimed] == [0.259, 0.258]
    assert [round(run.skipped_fraction, 3) for run in claimed] == [0.129, 0.129]


def test_accuracies_are_whole_numbers_of_questions():
    for run, _ in every_run():
        n_right = run.accuracy * N_MMLU_QUESTIONS
        assert n_right == pytest.approx(round(n_right), abs=1e-6)
        answers = np.arange(N_MMLU_QUESTIONS) < round(n_right)
        assert run.accuracy_se == pytest.approx(answers.std() / N_MMLU_QUESTIONS**0.5)


def test_another_file_is_refused(tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"source": "elsewhere"}')
    with pytest.raises(RecordError, match=r"other\.json does not hold AdapMoE's .*'mmlu_8x7b'"):
        PublishedAdapMoE.load(other)


@pytest.mark.parametrize(("accuracy", "ratio"), [(0.7, [0.1, 1.2]), (70.0, [0.1, 0.2])])
def test_percentages_are_not_taken_for_shares(accuracy, ratio):
    with pytest.raises(RecordError, match=r"run at T = 0\.005 must be shares"):
        PublishedRun(0.005, accuracy, np.array(ratio))
