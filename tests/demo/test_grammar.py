"""Minimal pairs: what is generated, what a training text takes away, and the shipped file."""

import gzip
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapmoe_lab.assets import data_folder
from adapmoe_lab.demo.grammar import (
    PAIRS_PER_PARADIGM,
    PARADIGMS,
    candidate_pairs,
    choose_pairs,
    main,
    unseen_pairs,
)
from adapmoe_lab.demo.pairs import MinimalPair, read_pairs
from adapmoe_lab.demo.vocabulary import HABITS, WORDS

CANDIDATES = candidate_pairs(seed=0)
PAIRS = choose_pairs(CANDIDATES)


def words_of(sentence):
    return sentence.removesuffix(".").split()


def write_text(folder, text):
    folder.mkdir(parents=True)
    with gzip.open(folder / "train.txt.gz", "wt", encoding="utf-8") as stream:
        stream.write(text)


def test_many_distinct_pairs_spread_evenly():
    assert len(PAIRS) >= 1_200
    assert len({(pair.good, pair.bad) for pair in PAIRS}) == len(PAIRS)
    assert Counter(pair.paradigm for pair in PAIRS) == dict.fromkeys(PARADIGMS, PAIRS_PER_PARADIGM)
    assert PAIRS_PER_PARADIGM >= 50


def test_no_sentence_is_good_in_one_pair_and_bad_in_another():
    assert {pair.good for pair in CANDIDATES}.isdisjoint(pair.bad for pair in CANDIDATES)
    assert len({pair.good for pair in CANDIDATES}) == len(CANDIDATES)


def test_both_are_plain_sentences_of_as_many_words():
    plain = re.compile(r"[A-Z][a-zA-Z ]*\.")
    for pair in CANDIDATES:
        assert 4 <= len(words_of(pair.good)) == len(words_of(pair.bad)) <= 12, pair
        assert plain.fullmatch(pair.good), pair
        assert plain.fullmatch(pair.bad), pair


def test_good_and_bad_differ_in_one_word_or_in_the_order_of_two():
    for pair in CANDIDATES:
        good, bad = words_of(pair.good), words_of(pair.bad)
        places = [n for n, (g, b) in enumerate(zip(good, bad, strict=True)) if g != b]
        assert places, pair
        assert places[-1] - places[0] <= 1, pair
        if places[-1] > places[0]:
            assert sorted(good) == sorted(bad), pair


def test_articles_of_the_good_sentences_fit_the_next_word():
    for pair in CANDIDATES:
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", pair.good), pair


def test_no_habit_has_a_past_that_its_present_could_be_taken_for():
    assert not [verb for verb in HABITS if verb.past in (verb.base, verb.third)]


def test_every_word_list_is_used_and_has_no_word_twice():
    named = set(re.findall(r"\{(\w+)", " ".join(t for group in PARADIGMS.values() for t in group)))
    assert named == set(WORDS)
    assert all(len(set(words)) == len(words) for words in WORDS.values())


def test_the_seed_decides():
    assert candidate_pairs(seed=0) == CANDIDATES
    other = candidate_pairs(seed=1)
    assert other != CANDIDATES
    assert set(other) == set(CANDIDATES)
    assert set(choose_pairs(other)) != set(PAIRS)


def test_every_template_contributes():
    chosen = choose_pairs(CANDIDATES, n_per_paradigm=max(map(len, PARADIGMS.values())))
    first_words = {pair.good.split()[0] for pair in chosen if pair.paradigm == "a_or_an"}
    assert first_words == {"The", "There"}
    first_words = {pair.good.split()[0] for pair in chosen if pair.paradigm == "negative_polarity"}
    assert {"No", "The", "There", "Nobody"} < first_words


def test_too_few_candidates_are_named():
    short = [pair for pair in PAIRS if pair.paradigm != "a_or_an"] + PAIRS[:1]
    with pytest.raises(ValueError, match=r"100 pairs per paradigm .* only 0 of a_or_an; add words"):
        choose_pairs(short)


@given(
    st.lists(st.text("ab ", max_size=4), min_size=2, max_size=6),
    st.lists(st.text("ab .", max_size=24), max_size=3),
)
def test_unseen_as_by_looking_for_every_sentence(stems, texts):
    pairs = [
        MinimalPair("p", f"{g}.", f"{b}.") for g, b in zip(stems[::2], stems[1::2], strict=False)
    ]
    unseen = [p for p in pairs if not any(p.good in text or p.bad in text for text in texts)]
    assert unseen_pairs(pairs, texts) == unseen


def test_pairs_of_the_training_text_are_replaced(tmp_path, capsys):
    n_bad = Counter(pair.bad for pair in CANDIDATES)
    by_good = PAIRS[3]
    by_bad = next(pair for pair in PAIRS[PAIRS_PER_PARADIGM:] if n_bad[pair.bad] == 1)
    write_text(tmp_path / "text" / "stories", f'He said: "{by_good.good}" No! {by_bad.bad} Yes.')
    out = tmp_path / "out" / "pairs.jsonl"
    assert main(["--out", str(out), "--text", str(tmp_path / "text")]) == 0
    pairs = read_pairs(out)
    assert set(PAIRS) - set(pairs) == {by_good, by_bad}
    assert len(pairs) == len(PAIRS)
    assert Counter(pair.paradigm for pair in pairs) == Counter(pair.paradigm for pair in PAIRS)
    printed = capsys.readouterr().out
    assert f"Dropped 2 of {len(CANDIDATES):,} candidates" in printed
    assert f"Wrote {len(PAIRS):,} pairs of {len(PARADIGMS)} paradigms" in printed


def test_same_seed_same_bytes(tmp_path):
    for name in ("one", "two"):
        assert main(["--out", str(tmp_path / name), "--seed", "5"]) == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert read_pairs(tmp_path / "one") == choose_pairs(candidate_pairs(seed=5))


def test_a_missing_text_folder_is_named(tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(out), "--text", str(tmp_path / "nowhere")])
    assert stopped.value.code == 2
    assert f"no text folder at {tmp_path / 'nowhere'}; name one with" in capsys.readouterr().err
    assert not out.exists()


def test_pairs_are_read_as_from_the_plain_file_or_refused_with_the_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pair = '{"UID": "a", "good": "He runs.", "bad": "He run."}'
    path.write_bytes(f"\ufeff{pair}\r\n\r\n{pair}\r\n".encode())
    assert [(p.paradigm, p.good, p.bad) for p in read_pairs(path)] == [
        ("a", "He runs.", "He run.")
    ] * 2
    for line, told in (
        ('{"good": "He runs."}', "line 2: lacks UID, bad"),
        ('{"UID": "a", "good": "He runs.", "bad": 5}', "line 2: its bad must be one string, got 5"),
    ):
        path.write_text(f"{pair}\n{line}\n")
        with pytest.raises(ValueError, match=told):
            read_pairs(path)


def test_the_shipped_file_is_seed_0_less_what_the_training_text_holds():
    shipped = read_pairs(data_folder() / "evaluation" / "minimal_pairs.jsonl")
    missing = set(PAIRS) - set(shipped)
    assert len(missing) <= len(PAIRS) // 100
    assert choose_pairs(pair for pair in CANDIDATES if pair not in missing) == shipped
