"""The command line, run as a user runs it, on a small checkpoint."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import adapmoe_lab as lab
from adapmoe_lab.cli import main
from adapmoe_lab.records import HardwareProfile, RoutingTrace, TunedConfig
from adapmoe_lab.records.verify_report import VerifyReport


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


def test_tune_may_fit_surrogates_that_run_from_the_file(
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
    assert times is None or "none" in times
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


@pytest.fixture
def unprobed(monkeypatch):
    """Leave out of a verification what takes seconds."""
    hardware = HardwareProfile("cpu", "none", [1000], [1e-5], 1e-3, 1e-4)
    monkeypatch.setattr("adapmoe_lab.tuning.verify.verify.probe_hardware", lambda _: hardware)


def test_verify_prints_a_line_per_check_and_writes_a_record(
    tiny_checkpoint, text_file, tmp_path, unprobed, capsys
):
    given = (tiny_checkpoint, "--link", "none", "--expert-memory", "60%", "--texts", text_file)
    assert run("verify", *given, "--new-tokens", 4, "--repeats", 1) == 0
    printed = capsys.readouterr().out.splitlines()
    names = ["check", "---", "exactness", "executor", "speed", "prediction", "loss"]
    assert [line.split(" | ")[0] for line in printed[:-1]] == [f"| {name}" for name in names]
    assert printed[2].startswith("| exactness | passed | logits: largest error ")
    assert printed[-1] == "Wrote verify.json."
    report = VerifyReport.load(tmp_path / "verify.json")
    assert report.table().splitlines() == printed[:-1]
    assert report.conditions["versions"]["torch"] == torch.__version__


def test_a_check_that_fails_is_written_too_and_the_status_is_1(
    tiny_checkpoint, text_file, tmp_path, unprobed, monkeypatch
):
    monkeypatch.setattr("adapmoe_lab.evaluation.exactness.CPU_ERROR", -1.0)
    given = (tiny_checkpoint, "--link", "none", "--texts", text_file, "--new-tokens", 2)
    assert run("verify", *given, "--repeats", 1, "--out", "out/failed.json") == 1
    report = VerifyReport.load(tmp_path / "out" / "failed.json")
    assert report.failed == ("exactness",)


def test_a_verification_that_is_stopped_writes_nothing(
    tiny_checkpoint, text_file, tmp_path, unprobed, monkeypatch, capsys
):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("adapmoe_lab.tuning.verify.verify.check_loss", stopped)
    given = (tiny_checkpoint, "--link", "none", "--texts", text_file, "--new-tokens", 2)
    assert run("verify", *given, "--repeats", 1) == 130
    assert "verify: stopped." in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.txt"]


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
        (
            ("generate", "demo", "x", "--compile-steps"),
            "compile_steps=True compiles what a captured",
        ),
        (("verify", "demo", "--executor", "fast"), "executor='fast' (str) is unknown; expected"),
    ],
)
def test_errors_are_one_line_and_say_what_to_do(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADAPMOE_LAB_DATA", raising=False)
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.fixture
def no_load(tmp_path, monkeypatch):
    """Refuse to load any model, in a folder that has a file in the way."""

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("adapmoe_lab.engine.loading.load", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "five.jsonl").write_text('{"text": 5}')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("profile", "demo", "--out", "file/trace.npz"), "trace.npz cannot be written: "),
        (("tune", "demo", "--out", "file/tuned.json"), "file is no folder. Name another place."),
        (("tune", "demo", "--out", "."), "is a folder; name a file to write"),
        (("tune", "demo", "--method", "magic"), "method='magic' is unknown; expected one of"),
        (("tune", "demo", "--texts", "five.jsonl"), "line 1: its text must be one string, got 5"),
        (("bench", "demo", "--out", "file/bench.json"), "bench.json cannot be written: "),
        (("bench", "demo", "--texts", "none.txt"), "No text file at none.txt"),
        (("verify", "demo", "--out", "file/verify.json"), "verify.json cannot be written: "),
        (("verify", "demo", "--texts", "none.txt"), "No text file at none.txt"),
        (("evaluate", "demo", "--texts", "five.jsonl"), "its text must be one string"),
        (("evaluate", "demo", "--tasks", "blimp"), "blimp task needs blimp/blimp.jsonl.gz"),
    ],
)
def test_what_can_be_refused_is_refused_before_the_model_is_loaded(
    no_load, arguments, message, capsys, monkeypatch
):
    monkeypatch.delenv("ADAPMOE_LAB_DATA", raising=False)
    assert run(*arguments) == 1
    assert message in capsys.readouterr().err


def test_a_project_in_the_way_is_found_before_tuning(no_load, monkeypatch, capsys):
    monkeypatch.setenv("ADAPMOE_LAB_PROJECT", "file/project")
    assert run("tune", "demo") == 1
    assert "Pass project=, or set $ADAPMOE_LAB_PROJECT" in capsys.readouterr().err


def test_an_unknown_task_is_one_line_with_close_names(no_load, capsys):
    assert run("evaluate", "demo", "--tasks", "hellaswagg") == 1
    error = capsys.readouterr().err
    assert "evaluate: lm-eval knows no task 'hellaswagg'. Close to it: hellaswag" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("generate", "demo", "x", "--max-new-tokens", "-3"),
            "whole number of at least 0, got '-3'",
        ),
        (("generate", "demo", "x", "--max-new-tokens", "2.5"), "at least 0, got '2.5'"),
        (("generate", "demo", "x", "--temperature", "nan"), "a number of at least 0, got 'nan'"),
        (("generate", "demo", "x", "--temperature", "-1"), "a number of at least 0, got '-1'"),
        (("generate", "demo", "x", "--top-k", "0"), "whole number of at least 1, got '0'"),
        (("generate", "demo", "x", "--top-p", "-1"), "a number of at least 0, got '-1'"),
        (("evaluate", "demo", "--limit", "0"), "whole number of at least 1, got '0'"),
        (("bench", "demo", "--new-tokens", "1"), "whole number of at least 2, got '1'"),
        (("bench", "demo", "--rounds", "x"), "whole number of at least 1, got 'x'"),
        (("verify", "demo", "--new-tokens", "1"), "whole number of at least 2, got '1'"),
        (("verify", "demo", "--repeats", "0"), "whole number of at least 1, got '0'"),
        (("tune", "demo", "--max-loss-increase-nats", "inf"), "a number of at least 0, got 'inf'"),
    ],
)
def test_a_number_out_of_range_is_wrong_usage(no_load, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_text_is_sampled_stopped_and_replied_to_as_asked(tiny_checkpoint, capsys):
    model = lab.load(tiny_checkpoint, link="none", announce=lambda text: None)
    arguments = ("generate", tiny_checkpoint, "Hello", "--max-new-tokens", 20, "--link", "none")
    sampled = ("--temperature", 1.5, "--top-k", 9, "--top-p", 0.9, "--repetition-penalty", 1.2)
    options = {"top_k": 9, "top_p": 0.9, "repetition_penalty": 1.2}
    whole = model.generate("Hello", 20, 1.5, **options)
    assert run(*arguments, *sampled) == 0
    assert capsys.readouterr().out == whole + "\n"
    stop = whole[8:10]
    assert run(*arguments, *sampled, "--stop", "\N{SNOWMAN}", "--stop", stop) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop, 5)] + "\n"
    assert run(*arguments, "--chat") == 1
    assert "generate: The tokenizer of this model has no chat template" in capsys.readouterr().err
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    model.tokenizer.chat_template = template
    folder = tiny_checkpoint.parent / "tiny-chat"
    shutil.copytree(tiny_checkpoint, folder)
    model.tokenizer.save_pretrained(folder)
    assert run("generate", folder, *arguments[2:], "--chat") == 0
    reply = model.generate([{"role": "user", "content": "Hello"}], 20)
    assert capsys.readouterr().out == reply + "\n"


@pytest.mark.parametrize("content", ["Héllo", "\ufeffHéllo"])
def test_a_prompt_may_come_in_as_a_file_would(tiny_checkpoint, content, monkeypatch, capsys):
    generate = ("generate", tiny_checkpoint, "-", "--max-new-tokens", 0, "--link", "none")
    stream = io.TextIOWrapper(io.BytesIO(content.encode()), encoding="ascii")
    monkeypatch.setattr("sys.stdin", stream)
    assert run(*generate) == 0
    assert capsys.readouterr().out == "Héllo\n"


def test_a_prompt_that_is_no_text_is_refused(no_load, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ok\n\xff"), encoding="ascii"))
    assert run("generate", "demo", "-") == 1
    assert "standard input, line 2: not UTF-8" in capsys.readouterr().err


def test_evaluate_prints_standard_errors(tiny_checkpoint, capsys):
    common = (tiny_checkpoint, "--link", "none")
    assert run("evaluate", *common, "--tasks", "minimal_pairs", "--limit", 8) == 0
    out = capsys.readouterr().out
    scores = json.loads(out[out.index("{") :])["minimal_pairs"]
    assert scores["acc_stderr"] == pytest.approx((scores["acc"] * (1 - scores["acc"]) / 7) ** 0.5)


def test_wrong_usage_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("conjure")
    assert stopped.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_the_installed_command_explains_itself():
    command = [sys.executable, "-m", "adapmoe_lab.cli", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("lab", "generate", "profile", "tune", "evaluate", "bench", "verify", "doctor"):
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
