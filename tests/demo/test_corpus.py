"""The training text: what is read, how it is cut, and what is kept away from training."""

import gzip
import hashlib
import json
import re

import pytest

from adapmoe_lab.demo.corpus import (
    DEMO_DOMAINS,
    PIECE_CHARACTERS,
    SourceFile,
    fraction_of,
    read_corpus,
)
from adapmoe_lab.models.demo_architecture import END_OF_TEXT

STORIES = [f"Story number {n} is about a bear." for n in range(2_000)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.write(content)


def write_records(path, records):
    write(path, "".join(f"{json.dumps(record)}\n" for record in records))


def write_texts(path, texts):
    write_records(path, ({"title": "a title", "text": text} for text in texts))


def splits_of(domain):
    return [set(domain.training), set(domain.development), set(domain.held_out)]


def test_splits_are_disjoint_and_lose_nothing(tmp_path):
    write_texts(tmp_path / "stories" / "train.jsonl.gz", [*STORIES, *STORIES[:10]])
    (domain,) = read_corpus(tmp_path)
    training, development, held_out = splits_of(domain)
    assert len(training) + len(development) + len(held_out) == len(STORIES)
    assert training | development | held_out == set(STORIES)
    assert len(domain.training) == len(training)


def test_a_twentieth_is_held_out_by_the_hash_of_its_text(tmp_path):
    def fraction(text):
        digest = hashlib.sha256(f"held out\n{text}".encode()).hexdigest()
        return int(digest[:16], 16) / 16**16

    write_texts(tmp_path / "stories" / "train.jsonl.gz", STORIES)
    (domain,) = read_corpus(tmp_path)
    assert set(domain.held_out) == {text for text in STORIES if fraction(text) < 0.05}
    assert 0.035 < len(domain.held_out) / len(STORIES) < 0.065
    assert 0.004 < len(domain.development) / len(STORIES) < 0.02


def test_a_document_keeps_its_split_when_others_come(tmp_path):
    write_texts(tmp_path / "few" / "stories" / "train.jsonl.gz", STORIES[:1_000])
    write_texts(tmp_path / "many" / "stories" / "train.jsonl.gz", STORIES)
    (few,), (many,) = read_corpus(tmp_path / "few"), read_corpus(tmp_path / "many")
    for small, large in zip(splits_of(few), splits_of(many), strict=True):
        assert small < large


def test_the_fraction_depends_on_key_and_purpose():
    assert fraction_of("a", "held out") == fraction_of("a", "held out")
    assert fraction_of("a", "held out") != fraction_of("a", "development")
    assert fraction_of("a", "held out") != fraction_of("b", "held out")


def test_of_two_documents_one_is_held_out_and_of_one_none(tmp_path):
    write_texts(tmp_path / "one" / "train.jsonl.gz", ["only"])
    write_texts(tmp_path / "two" / "train.jsonl.gz", ["first", "second"])
    one, two = read_corpus(tmp_path)
    assert [len(split) for split in splits_of(one)] == [1, 0, 0]
    assert [len(split) for split in splits_of(two)] == [1, 0, 1]


def test_valid_files_are_the_held_out_text_and_leave_training(tmp_path):
    write_texts(tmp_path / "stories" / "train.jsonl.gz", STORIES)
    write_texts(tmp_path / "stories" / "valid.jsonl.gz", ["a story of its own", STORIES[7]])
    (domain,) = read_corpus(tmp_path)
    assert domain.held_out == ("a story of its own", STORIES[7])
    assert set(domain.training) | set(domain.development) == set(STORIES) - {STORIES[7]}


def test_files_named_test_are_never_opened(tmp_path):
    folder = tmp_path / "stories"
    write_texts(folder / "train.jsonl.gz", STORIES[:5])
    for name in ("test.jsonl.gz", "test_two.txt.gz"):
        (folder / name).write_bytes(b"opening this as gzip fails")
    (tmp_path / "only_tests").mkdir()
    (tmp_path / "only_tests" / "test.txt.gz").write_bytes(b"and this")
    (domain,) = read_corpus(tmp_path)
    assert [file.path for file in domain.files] == ["stories/train.jsonl.gz"]


def test_files_are_described_as_stored(tmp_path):
    path = tmp_path / "stories" / "train.jsonl.gz"
    write_texts(path, STORIES[:5])
    (domain,) = read_corpus(tmp_path)
    stored = path.read_bytes()
    described = SourceFile(
        "stories/train.jsonl.gz", len(stored), hashlib.sha256(stored).hexdigest()
    )
    assert domain.files == (described,)


def test_questions_are_split_by_the_question_alone(tmp_path):
    problems = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}."} for n in range(400)]
    again = [{**problem, "answer": "I do not know."} for problem in problems]
    write_records(tmp_path / "first" / "train.jsonl.gz", problems)
    write_records(tmp_path / "second" / "train.jsonl.gz", again)
    first, second = read_corpus(tmp_path)
    assert "What is 3 + 1?\nIt is 4." in first.training + first.development + first.held_out

    def questions(texts):
        return [text.split("\n")[0] for text in texts]

    assert questions(first.held_out) == questions(second.held_out)
    assert questions(first.development) == questions(second.development)
    assert first.held_out


def test_plain_text_is_cut_at_the_end_of_text_marker(tmp_path):
    text = f"One.\nOne more.\n{END_OF_TEXT}\n\nTwo.\n{END_OF_TEXT}\n"
    write(tmp_path / "stories" / "train.txt.gz", text)
    (domain,) = read_corpus(tmp_path)
    assert set.union(*splits_of(domain)) == {"One.\nOne more.", "Two."}


def test_plain_text_without_marker_is_cut_between_lines_but_not_in_paragraph_breaks(tmp_path):
    stories = [f"{n}: {'word ' * 150}end.\n\nSecond paragraph {n}." for n in range(9)]
    write(tmp_path / "stories" / "train.txt.gz", "\n".join(stories) + "\n")
    (domain,) = read_corpus(tmp_path)
    pieces = sorted(set.union(*splits_of(domain)))
    assert "\n".join(pieces) == "\n".join(stories)
    assert all(len(piece) >= PIECE_CHARACTERS for piece in pieces[:-1])
    assert len(pieces) == 5


def test_a_folder_of_files_is_one_domain(tmp_path):
    write_texts(tmp_path / "train.jsonl.gz", STORIES[:20])
    (domain,) = read_corpus(tmp_path)
    assert domain.name == tmp_path.name
    assert domain.n_training_bytes == sum(len(text) for text in domain.training) > 0


def test_bytes_are_those_of_utf_8(tmp_path):
    write_texts(tmp_path / "train.jsonl.gz", ["äöü"])
    (domain,) = read_corpus(tmp_path)
    assert domain.n_training_bytes == 6


def test_the_demo_domains_are_chosen_where_all_are_there(tmp_path):
    for name in (*DEMO_DOMAINS, "another"):
        write_texts(tmp_path / name / "train.jsonl.gz", STORIES[:3])
    assert tuple(domain.name for domain in read_corpus(tmp_path)) == DEMO_DOMAINS
    assert [domain.name for domain in read_corpus(tmp_path, ["another"])] == ["another"]
    (tmp_path / DEMO_DOMAINS[0] / "train.jsonl.gz").unlink()
    names = [domain.name for domain in read_corpus(tmp_path)]
    assert names == sorted([*DEMO_DOMAINS[1:], "another"])


def test_errors_say_what_is_missing(tmp_path):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match=re.escape(f"no text folder at {nowhere}; name")):
        read_corpus(nowhere)
    with pytest.raises(ValueError, match=r"no training text .* for any domain; .* found: none"):
        read_corpus(tmp_path)
    write_texts(tmp_path / "stories" / "train.jsonl.gz", STORIES[:3])
    with pytest.raises(ValueError, match=r"for poems, songs; domains found: stories\."):
        read_corpus(tmp_path, ["poems", "stories", "songs"])


def test_a_record_without_text_is_refused(tmp_path):
    write_records(tmp_path / "stories" / "train.jsonl.gz", [{"title": "a", "body": "b"}])
    with pytest.raises(
        ValueError, match=r"neither text nor question and answer: \['body', 'title'"
    ):
        read_corpus(tmp_path)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"text": 5}, r"line 2: its text must be one string, got 5 \(int\)"),
        ({"text": None}, "line 2: its text must be one string, got None"),
        ({"question": "1 + 1?", "answer": 2}, "line 2: its answer must be one string, got 2"),
        (["a"], r"line 2: expected a JSON object, got \['a'\]"),
    ],
)
def test_a_value_that_is_no_text_is_refused_with_its_line(tmp_path, record, told):
    write_records(tmp_path / "stories" / "train.jsonl.gz", [{"text": "a"}, record])
    with pytest.raises(ValueError, match=told):
        read_corpus(tmp_path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "mac"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_documents_are_those_of_the_plain_file(tmp_path, end, encoding):
    lines = "".join(f"{json.dumps({'text': text})}\n" for text in STORIES[:40])
    paragraphs = "\n".join(STORIES[40:90])
    for name, content in (("records/a.jsonl.gz", lines), ("plain/a.txt.gz", paragraphs)):
        for folder, changed in (
            ("unix", content.encode()),
            ("other", content.replace("\n", end).encode(encoding)),
        ):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(changed))
    read = [
        [(d.name, d.training, d.development, d.held_out) for d in read_corpus(tmp_path / folder)]
        for folder in ("unix", "other")
    ]
    assert read[0] == read[1]


def test_one_name_is_one_domain(tmp_path):
    write_texts(tmp_path / "stories" / "train.jsonl.gz", STORIES[:3])
    (domain,) = read_corpus(tmp_path, "stories")
    assert domain.name == "stories"
