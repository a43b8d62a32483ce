"""Text files a user brings, and the texts that ship."""

import gzip

import pytest

from adapmoe_lab.evaluation.texts import calibration_labels, calibration_texts, read_texts


def test_shipped_texts_take_turns_by_kind():
    texts, labels = calibration_texts(), calibration_labels()
    assert len(texts) == len(labels) >= 48
    assert len(set(texts)) == len(texts)
    kinds = set(labels)
    assert all(set(labels[i : i + len(kinds)]) == kinds for i in range(0, 12, len(kinds)))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "one\\ntwo"}\n{"prompt": "three"}\n'),
        ("a.txt", "one\ntwo\n\n\nthree\n"),
    ],
)
def test_both_formats_plain_or_compressed(tmp_path, name, content, compressed):
    path = tmp_path / (name + ".gz" if compressed else name)
    path.write_bytes(gzip.compress(content.encode()) if compressed else content.encode())
    assert read_texts(path) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"body": "x"}\n', "line 1: expected a JSON object with one of text, prompt"),
        ("a.jsonl", "not json\n", "line 1: expected a JSON object"),
        ("a.txt", "\n\n", "holds no text"),
    ],
)
def test_wrong_content_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="No text file at"):
        read_texts(tmp_path / "none.txt")
