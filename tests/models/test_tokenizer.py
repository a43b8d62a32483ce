"""A tokenizer is found, read and tried before anything long, and no code of it is run."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest

from adapmoe_lab.engine.loading import load
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.models.checkpoint.tokenizer import read_tokenizer


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


@pytest.mark.parametrize("content", [None, "{broken", "{}", "[]"])
def test_a_tokenizer_that_does_not_work_is_told_before_experts_are_read(folder, tmp_path, content):
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="okenizer") as caught:
        load(folder, store=tmp_path / "store", link="none")
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_a_tokenizer_without_words_is_told(folder):
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"], document["added_tokens"] = {}, []
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="makes no token of 'Once upon a time'"):
        read_tokenizer(folder)


@pytest.mark.parametrize(
    "mapped",
    [
        {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
        ["tokenization_own.OwnTokenizer", None],
        {"AutoTokenizer": ["someone/else--tokenization_own.OwnTokenizer", None]},
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_of_a_tokenizer_is_never_run_and_nobody_is_asked(
    folder, tmp_path, monkeypatch, mapped, file
):
    mark = tmp_path / "was_run"
    (folder / "tokenization_own.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast): pass\n"
    )
    path = folder / file
    settings = {**json.loads(path.read_text()), "auto_map": mapped}
    if file == "tokenizer_config.json":
        settings["tokenizer_class"] = "OwnTokenizer"
    path.write_text(json.dumps(settings))
    typed = io.StringIO("y\n" * 5)
    monkeypatch.setattr(sys, "stdin", typed)
    with pytest.raises(CheckpointError, match=r"code of its own .* which is never run here"):
        read_tokenizer(folder)
    assert typed.tell() == 0
    assert not mark.exists()
