"""Text files a user brings, and the texts that ship."""

import gzip
import json

import numpy as np
import pytest

from adapmoe_lab.evaluation.texts import (
    as_labels,
    as_texts,
    calibration_labels,
    calibration_split,
    calibration_texts,
    read_texts,
)


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
        ("a.jsonl", '{"body": "x"}\n', r"line 1: expected a JSON object with one of text, prompt, "
         r"instruction, got one with 'body'"),
        ("a.jsonl", "not json\n", "line 1: expected .* but it is no JSON: Expecting value"),
        ("a.jsonl", '{"text": "x"}\n\n["y"]\n', r"line 3: expected .* got \['y'\] \(list\)"),
        ("a.jsonl", "[" * 100_000, "line 1: expected .* but it is no JSON"),
        ("a.jsonl", '{"text": 5}\n', r"line 1: its text must be one string, got 5 \(int\)"),
        ("a.jsonl", '{"text": 0}\n', r"line 1: its text must be one string, got 0 \(int\)"),
        ("a.jsonl", '{"text": ["x"]}\n', r"line 1: its text must be one string, got \['x'\]"),
        ("a.jsonl", '{"text": "x"}\n{"text": ""}\n', "line 2: its text is empty"),
        ("a.jsonl", '{"text": null}\n', "line 1: its text is empty"),
        ("a.jsonl", '{"text": "x\\ud800"}\n', "line 1: its text holds .* half of a surrogate pair"),
        ("a.json", '[{"text": "x"}]', "is JSON, which is no text as it stands"),
        ("a.txt", "\n\n", "holds no text"),
        ("a.txt", "one\r\ntwo\0", "line 2: a zero byte"),
        ("a.txt.gz", "not compressed", "is no complete gzip file .* name it without .gz"),
    ],
)  # fmt: skip
def test_wrong_content_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "mac"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", "grün\ntwo\n\nthree\n", ["grün\ntwo", "three"]),
        ("a.JSONL", '{"text": "grün"}\n\n{"text": "a\\r\\nb"}\n', ["grün", "a\r\nb"]),
    ],
)
def test_every_line_end_and_mark_reads_as_the_plain_file(
    tmp_path, name, content, texts, encoding, end
):
    """What a JSON escape says is kept: it is in the text, not in the file."""
    path = tmp_path / name
    path.write_bytes(content.replace("\n", end).encode(encoding))
    assert read_texts(path) == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("good\ngrün".encode("latin-1"), "line 2: not UTF-8"),
        ("good\r\nmore\r\nx".encode("utf-16")[:-1], "line 3: not UTF-16-LE"),
        ("one\ntwo".encode("utf-16-le"), "line 1: a zero byte.* UTF-16 without a byte order mark"),
    ],
)
def test_other_encodings_are_refused_with_the_line(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(path)


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_gzip_file_cut_short_is_refused(tmp_path, kept):
    path = tmp_path / "a.txt.gz"
    content = gzip.compress(b"some text " * 1000)
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"a\.txt\.gz is no complete gzip file"):
        read_texts(path)


def test_the_first_field_that_is_not_empty_counts(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"instruction": "c", "text": "a"}, {"text": "", "prompt": "b", "instruction": "c"}]
    path.write_text("\n".join(map(json.dumps, records)))
    assert read_texts(path) == ["a", "b"]


def test_a_mapping_holds_texts_by_label():
    assert as_texts(text for text in ("a", "b")) == ["a", "b"]
    assert as_texts(np.array(["a", "b"])) == ["a", "b"]
    by_label = {"story": "a", "code": "b"}
    assert as_texts(by_label) == ["a", "b"]
    assert as_labels(None, by_label, 2) == ["story", "code"]
    assert as_labels(["x", "y"], by_label, 2) == ["x", "y"]
    assert as_labels(None, ["a", "b"], 2) == []
    assert as_labels("story", ["a"], 1) == ["story"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            "Once",
            r"texts must be several texts, got one string, 'Once' \(str\)\. Put .* texts=\[text\]",
        ),
        (b"abc", r"texts must be a string or several, got b'abc' \(bytes\)"),
        (None, r"texts must be a string or several, got None"),
        (["a", None], r"texts\[1\] must be one string, got None"),
        ({"story": ["a", "b"]}, r"texts\['story'\] must be one string, got \['a', 'b'\] \(list\)"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(texts, message):
    with pytest.raises(ValueError, match=message):
        as_texts(texts)


@pytest.mark.parametrize("labels", ["abc", ["a", "b"], []])
def test_labels_must_be_as_many_as_the_texts(labels):
    with pytest.raises(ValueError, match="3 texts need as many labels, got"):
        as_labels(labels, ["x", "y", "z"], 3)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="No text file at"):
        read_texts(tmp_path / "none.txt")


def test_a_path_is_told_how_its_texts_are_read(tmp_path):
    path = tmp_path / "texts.txt"
    with pytest.raises(
        ValueError, match=r"must be several texts, got a path, .*lab\.read_texts\('/"
    ):
        as_texts(path)


@pytest.mark.parametrize(("n_texts", "n_first"), [(1, 1), (2, 1), (5, 2), (8, 4)])
def test_texts_to_calibrate_with_are_none_of_those_to_measure_on(n_texts, n_first):
    texts = [f"text {number}" for number in range(n_texts)]
    first, second = calibration_split(texts)
    assert len(first) == n_first
    assert second == (texts if n_texts == 1 else texts[n_first:])
    assert n_texts == 1 or first + second == texts
