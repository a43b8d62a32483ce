"""The command line, run as a user runs it, on a small checkpoint."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import adapmoe_lab as lab
from adapmoe_lab.cli import main
from adapmoe_lab.records import RoutingTrace, TunedConfig


@pytest.fixture
def text_file(tmp_path, texts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(texts))
    return str(path)


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_the_whole_job(tiny_checkpoint, text_file, tmp_path, capsys):
    common = (tiny_checkpoint, "--link", "none", "--texts", text_file)
    assert run("profile", *common, "--out", tmp_path / "trace.npz") == 0
    assert RoutingTrace.load(tmp_path / "trace.npz").n_tokens > 100
    tuned = tmp_path / "tuned.json"
    assert run("tune", *common, "--budget", "60%", "--skipped-fraction", 0.2, "--out", tuned) == 0
    config = TunedConfig.load(tuned)
    assert config.gating is not None
    assert config.evidence["verified"] is False
    capsys.readouterr()
    assert run("evaluate", *common, "--config", tuned) == 0
    assert "experts/token, " in capsys.readouterr().out
    generate = ("generate", tiny_checkpoint, "Hello", "--max-new-tokens", 5, "--link", "none")
    assert run(*generate, "--config", tuned) == 0
    assert capsys.readouterr().out.startswith("Hello")


def test_tune_may_verify(tiny_checkpoint, text_file, tmp_path):
    tuned = tmp_path / "tuned.json"
    arguments = (tiny_checkpoint, "--link", "none", "--texts", text_file, "--budget", "60%")
    assert run("tune", *arguments, "--verify", "--out", tuned) == 0
    evidence = TunedConfig.load(tuned).evidence
    assert evidence["verified"] is True
    assert evidence["measured"]["loss_increase_nats"] <= 0.01


def test_tune_may_fit_stand_ins_that_run_from_the_file(
    tiny_checkpoint, text_file, tmp_path, capsys
):
    tuned = tmp_path / "tuned.json"
    arguments = (tiny_checkpoint, "--link", "none", "--texts", text_file, "--budget", "60%")
    fitted = ("--surrogate-memory", "4KiB", "--skipped-fraction", 0.4)
    assert run("tune", *arguments, *fitted, "--out", tuned) == 0
    config = TunedConfig.load(tuned)
    surrogates = config.compensation
    assert surrogates is not None
    assert 0 < surrogates.n_bytes(4) <= 4 * 1024
    named = json.loads(tuned.read_text())["compensation"]["file"]
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [named]
    capsys.readouterr()
    generate = ("generate", tiny_checkpoint, "Hello", "--max-new-tokens", 5, "--link", "none")
    assert run(*generate, "--config", tuned) == 0
    assert capsys.readouterr().out.startswith("Hello")
    model = lab.load(tiny_checkpoint, config=tuned, link="none")
    ids = model.encode("Once upon a time")[None]
    with torch.no_grad():
        stood_in = model.hf(ids).logits
        model.apply(replace(config, compensation=None))
        left_out = model.hf(ids).logits
    assert not torch.allclose(stood_in, left_out)


def test_tune_fits_predictors_and_fetches_nothing_ahead_if_told(
    tiny_checkpoint, text_file, tmp_path
):
    tuned = tmp_path / "tuned.json"
    arguments = (tiny_checkpoint, "--texts", text_file, "--budget", "75%", "--out", tuned)
    assert run("tune", *arguments, "--fit-predictors") == 0
    times = TunedConfig.load(tuned).evidence["prefetch"]
    assert times is None or "nobody" in times
    assert run("tune", *arguments, "--no-prefetch") == 0
    assert TunedConfig.load(tuned).evidence["prefetch"] is None


def test_bench_prints_ratios_for_each_link(tiny_checkpoint, text_file, tmp_path, capsys):
    out = tmp_path / "bench.json"
    targets = ("mixtral-8x7b-int4/pcie4-x16", "qwen3-30b-bf16/pcie5-x16")
    common = (tiny_checkpoint, "--texts", text_file, "--new-tokens", 4, "--rounds", 1)
    assert run("bench", *common, "--targets", *targets, "--out", out) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert [row["link"] for row in report["rows"]] == [
        f"emulated:{t}" for t in targets for _ in "12"
    ]
    assert all(row["load_ratio"] > 0 for row in report["rows"])
    assert all(name in printed for name in targets)
    assert len(report["samples"]) == 2 * 3
    assert report["conditions"]["torch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "/no/such/model", "x"), "generate: No model folder at /no/such/model"),
        (("generate", "demo", ""), "generate: The prompt is empty"),
        (("generate", "demo", "x", "--dtype", "int1"), "dtype='int1' is unknown; expected 'auto'"),
        (("generate", "demo", "x", "--device", "tpu"), "device='tpu' is not supported"),
        (("generate", "demo", "x", "--link", "rope"), "link='rope' is unknown; expected one of"),
        (("generate", "demo", "x", "--config", "none.json"), "No tuned config at none.json"),
        (("profile", "demo", "--texts", "none.txt"), "No text file at none.txt"),
        (("tune", "demo", "--budget", "much"), "expert_memory='much' is not a size"),
        (("evaluate", "demo", "--tasks", "blimp"), "blimp task needs blimp/blimp.jsonl.gz"),
    ],
)
def test_errors_are_one_line_and_say_what_to_do(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADAPMOE_LAB_DATA", raising=False)
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_wrong_usage_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("conjure")
    assert stopped.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_the_installed_command_explains_itself():
    command = [sys.executable, "-m", "adapmoe_lab.cli", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("lab", "generate", "profile", "tune", "evaluate", "bench", "doctor"):
        assert name in text


def test_experts_can_be_prepared_and_packed(tiny_checkpoint, tmp_path, capsys):
    arguments = ("generate", tiny_checkpoint, "Hello", "--max-new-tokens", 5, "--link", "none")
    store = ("--expert-dtype", "int8", "--store", tmp_path / "experts", "--host-memory", "1GiB")
    assert run(*arguments, *store) == 0
    first = capsys.readouterr()
    assert "expert slots: 12 of" in first.err
    assert run(*arguments, *store) == 0
    assert capsys.readouterr().out == first.out
    assert run(*arguments, "--expert-dtype", "int5") == 1
    assert "'int5' is not a precision" in capsys.readouterr().err
    assert run(*arguments, "--expert-memory", "90%", "--host-memory", "60%") == 1
    assert "does not fit cpu" in capsys.readouterr().err


def test_the_doctor_judges_a_model(tiny_checkpoint, capsys):
    assert run("doctor", tiny_checkpoint) == 0
    assert "mixtral, 3 layers x 4 experts, top-2" in capsys.readouterr().out
