"""Tasks of lm-eval: the errors it tells, and the tasks it cannot run."""

import gzip
import json

import numpy as np
import pytest

from adapmoe_lab.assets import data_folder
from adapmoe_lab.evaluation import harness
from adapmoe_lab.evaluation.harness import evaluate, open_tasks

N_PAIRS = 24


def likelier_is_good(model, pair):
    """Whether the plain sum of log-probabilities prefers the good sentence, as the task asks."""
    sums = []
    for sentence in (pair["good"], pair["bad"]):
        ids = model.encode(sentence)
        start = ids.new_tensor([model.tokenizer.eos_token_id])
        whole = np.concatenate([start, ids])
        logits = model.hf(ids.new_tensor(whole)[None]).logits[0, :-1].detach()
        sums.append(float(logits.log_softmax(-1).gather(1, ids[:, None]).sum()))
    return sums[0] > sums[1]


def test_a_metric_comes_with_its_standard_error(load_tiny):
    model = load_tiny()
    metrics = evaluate(model, tasks="minimal_pairs", limit=np.int64(N_PAIRS))["minimal_pairs"]
    lines = (data_folder() / "evaluation" / "minimal_pairs.jsonl").read_text().splitlines()
    right = [likelier_is_good(model, json.loads(line)) for line in lines[:N_PAIRS]]
    assert 0 < sum(right) < N_PAIRS
    assert metrics["acc"] == pytest.approx(np.mean(right))
    expected = np.std(right, ddof=1) / N_PAIRS**0.5
    assert metrics["acc_stderr"] == pytest.approx(expected)


def test_one_example_has_no_standard_error(load_tiny):
    metrics = evaluate(load_tiny(), tasks=["minimal_pairs"], limit=1)["minimal_pairs"]
    assert metrics["acc"] in (0, 1)
    assert metrics["acc_stderr"] is None


def test_filters_of_one_metric_are_kept_apart():
    values = {
        "alias": "gsm8k",
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.1,
        "exact_match,flexible-extract": np.float32(0.5),
        "exact_match_stderr,flexible-extract": "N/A",
        "f1,none": float("nan"),
    }
    assert harness._metrics(values) == {
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.1,
        "exact_match,flexible-extract": 0.5,
        "exact_match_stderr,flexible-extract": None,
        "f1": None,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, "at least one task, such as 'minimal_pairs'"),
        ({"tasks": [5]}, r"tasks\[0\] must be one string, got 5"),
        ({"limit": 0}, "limit must be a whole number of at least 1, got 0"),
        ({"limit": 0.5}, r"limit must be a whole number of at least 1, got 0\.5"),
        ({"batch_size": -1}, "batch_size must be a whole number of at least 1, got -1"),
    ],
)
def test_what_it_refuses(load_tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(load_tiny(), **arguments)


class Index:
    """What lm-eval's index of tasks does here: it knows three, one of which has no data."""

    all_tasks = ("arc_easy", "arc_challenge", "hellaswag")

    def __init__(self, include_defaults=True):
        assert include_defaults

    def load(self, specs):
        if specs == ["hellaswag"]:
            raise ConnectionError("Couldn't reach 'Rowan/hellaswag'\n on the Hub")


def test_an_unknown_task_is_named_with_close_ones(monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", Index)
    with (
        pytest.raises(ValueError, match=r"no task 'arc_esy'\. Close to it: arc_easy") as refused,
        open_tasks(["arc_easy", "arc_esy"]),
    ):
        pass
    assert "hellaswag" not in str(refused.value)
    with (
        pytest.raises(ValueError, match=r"no task 'zzzz'\. Try 'minimal_pairs'"),
        open_tasks("zzzz"),
    ):
        pass


def test_a_task_without_its_data_is_named_on_one_line(monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", Index)
    with (
        pytest.raises(
            ValueError, match="cannot open the task 'hellaswag': ConnectionError: Couldn"
        ),
        open_tasks("hellaswag"),
    ):
        pass


def test_a_line_of_blimp_that_lacks_something_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPMOE_LAB_DATA", str(tmp_path))
    (tmp_path / "blimp").mkdir()
    content = b'{"UID": "a", "good": "x", "bad": "y"}\r\n{"UID": "a", "good": "x"}\r\n'
    (tmp_path / "blimp" / "blimp.jsonl.gz").write_bytes(gzip.compress(content))
    with (
        pytest.raises(ValueError, match=r"blimp\.jsonl\.gz, line 2: lacks bad"),
        open_tasks("blimp"),
    ):
        pass
