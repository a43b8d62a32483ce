"""Command that writes the shipped minimal pairs of English grammar.

`python -m adapmoe_lab.demo.grammar --out data/evaluation/minimal_pairs.jsonl [--text FOLDER]`

A template holds slots and one contrast: in `The {animal.one} [is|are] hungry.` the slot takes a
word of `vocabulary.WORDS`, the same one wherever it is named, and the brackets hold what the good
sentence says and what the bad one says. Both have the same number of words.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from itertools import chain, product, zip_longest
from pathlib import Path
from string import Formatter
from types import MappingProxyType

from adapmoe_lab.demo.corpus import fraction_of, read_corpus
from adapmoe_lab.demo.pairs import MinimalPair
from adapmoe_lab.demo.publish import write_lines
from adapmoe_lab.demo.vocabulary import WORDS

PAIRS_PER_PARADIGM = 100
PARADIGMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "subject_verb_agreement": (
            "The {animal.one} [is|are] very {feeling} today.",
            "The {animal.many} [are|is] very {feeling} today.",
            "The {person.one} [{habit.third}|{habit.base}] {habit.ending} every day.",
            "The {person.many} [{habit.base}|{habit.third}] {habit.ending} every day.",
        ),
        "agreement_across_phrase": (
            "The {animal.many} near the {landmark.one} [are|is] {feeling}.",
            "The {animal.one} near the {landmark.many} [is|are] {feeling}.",
            "The {person.many} with the {animal.one} [were|was] {feeling}.",
            "The {person.one} with the {animal.many} [was|were] {feeling}.",
            "The {thing.many} on the {surface.one} [were|was] {look}.",
        ),
        "determiner_noun_agreement": (
            "The {person.one} took these [{thing.many}|{thing.one}] to the {goal}.",
            "The {person.one} likes this [{thing.one}|{thing.many}] very much.",
            "The {person.many} wanted [those|that] {thing.many} back.",
            "The {person.one} saw {number} [{animal.many}|{animal.one}] in the {outdoors}.",
            "Every [{animal.one}|{animal.many}] in the {outdoors} was {feeling}.",
        ),
        "reflexive_agreement": (
            "The {male.one} {self_act.past} [himself|herself] {self_act.ending}.",
            "The {female.one} {self_act.past} [herself|himself] {self_act.ending}.",
            "{boy_name} {self_act.past} [himself|herself] {self_act.ending}.",
            "{girl_name} {self_act.past} [herself|himself] {self_act.ending}.",
            "The {male.many} {self_act.past} [themselves|himself] {self_act.ending}.",
            "The {female.many} {self_act.past} [themselves|herself] {self_act.ending}.",
        ),
        "participle_after_have": (
            "The {person.one} has [{deed.participle}|{deed.past}] {deed.ending}.",
            "The {person.many} have [{deed.participle}|{deed.past}] {deed.ending}.",
            "{boy_name} had [{deed.participle}|{deed.past}] {deed.ending} {by_then}.",
            "{who} had never [{deed.participle}|{deed.past}] {deed.ending} before.",
        ),
        "irregular_past": (
            "The {person.one} [{deed.past}|{deed.participle}] {deed.ending} {day}.",
            "{who} [{deed.past}|{deed.participle}] {deed.ending} {day}.",
            "The {person.many} [{slip.past}|{slip.wrong}] {slip.ending} {day}.",
            "{opening} {girl_name} [{slip.past}|{slip.wrong}] {slip.ending}.",
        ),
        "negative_polarity": (
            "[No|Some] {person.one} had ever seen such a {size} {animal.one}.",
            "The {person.one} [never|always] had any {stuff}.",
            "There was [never|always] any {stuff} in the {container}.",
            "[Nobody|Somebody] saw any {animal.many} in the {outdoors}.",
            "{girl_name} has [never|always] seen any {animal.many}.",
        ),
        "existential_there": (
            "There [is|are] a {animal.one} in the {outdoors}.",
            "There [are|is] many {animal.many} in the {outdoors}.",
            "There was [a|every] {animal.one} near the {landmark.one}.",
            "There were [many|most] {thing.many} on the {surface.one}.",
        ),
        "modal_verb": (
            "The {person.one} {modal} [{habit.base}|{habit.third}] {habit.ending}.",
            "The {person.many} did not [{deed.base}|{deed.past}] {deed.ending}.",
            "The {person.one} will [{modal_adverb}|can] {habit.base} {habit.ending}.",
            "The {person.many} must [{modal_adverb}|will] {habit.base} {habit.ending}.",
        ),
        "pronoun_case": (
            "The {person.one} saw [{pronoun.object}|{pronoun.subject}] near the {landmark.one}.",
            "The {person.one} went with [{pronoun.object}|{pronoun.subject}] to the {goal}.",
            "{opening} [{pronoun.subject}|{pronoun.object}] {deed.past} {deed.ending}.",
            "The {person.one} found [{owner.possessive}|{owner.object}] {thing.one}.",
        ),
        "a_or_an": (
            "The {person.one} bought [an|a] {vowel_food} at the market.",
            "The {person.one} bought [a|an] {food} at the market.",
            "There was [an|a] {vowel_look} {thing.one} on the {surface.one}.",
            "There was [a|an] {color} {thing.one} on the {surface.one}.",
        ),
        "adjective_order": (
            "The {person.one} has a [{color} {thing.one}|{thing.one} {color}].",
            "The [{feeling} {person.one}|{person.one} {feeling}] went to the {goal}.",
            "There was a [{size} {animal.one}|{animal.one} {size}] in the {outdoors}.",
            "They saw the [{size} {building.one}|{building.one} {size}] near the {scenery}.",
        ),
        "relative_pronoun": (
            "The {person.one} [who|which] {deed.past} {deed.ending} was {feeling}.",
            "We know a {person.one} [who|which] {habit.third} {habit.ending} every day.",
            "The {thing.one} [which|who] lay on the {surface.one} was {look}.",
            "They saw the {building.one} [which|who] stood near the {scenery}.",
        ),
        "comparison": (
            "The {male.one} is [{degree.comparative}|{degree.base}] than the {female.one}.",
            "The {female.one} was [{degree.comparative}|{degree.superlative}] than {boy_name}.",
            "{boy_name} is as [{degree.base}|{degree.comparative}] as the {male.one}.",
            "The {person.one} was the [{degree.superlative}|{degree.comparative}] of them all.",
        ),
        "infinitive": (
            "The {person.one} {wish} to [{deed.base}|{deed.past}] {deed.ending}.",
            "The {person.many} {wish} [to {deed.base}|{deed.base} to] {deed.ending}.",
            "It was {ease} to [{deed.base}|{deed.past}] {deed.ending}.",
            "{who} {wish} [to {habit.base}|{habit.base} to] {habit.ending}.",
        ),
    }
)
"""Templates by paradigm; every paradigm gives equally many pairs."""

_CONTRAST = re.compile(r"\[([^|\]]+)\|([^|\]]+)\]")


def candidate_pairs(seed: int) -> list[MinimalPair]:
    """Return all pairs, by paradigm, in the order of the seed; the templates take turns.

    The order follows from hashes, so it is the same on every version of Python.
    """
    pairs = []
    for paradigm, templates in PARADIGMS.items():
        shuffled = [
            sorted(_fill(template), key=lambda marked: fraction_of(marked, f"seed {seed}"))
            for template in templates
        ]
        turns = chain.from_iterable(zip_longest(*shuffled))
        pairs += [_contrast(paradigm, marked) for marked in turns if marked is not None]
    return pairs


def choose_pairs(
    candidates: Iterable[MinimalPair], n_per_paradigm: int = PAIRS_PER_PARADIGM
) -> list[MinimalPair]:
    """Return the first pairs of every paradigm."""
    chosen: dict[str, list[MinimalPair]] = {name: [] for name in PARADIGMS}
    for pair in candidates:
        if len(chosen[pair.paradigm]) < n_per_paradigm:
            chosen[pair.paradigm].append(pair)
    scarce = {name: len(pairs) for name, pairs in chosen.items() if len(pairs) < n_per_paradigm}
    if scarce:
        raise ValueError(
            f"{n_per_paradigm} pairs per paradigm were asked for; there are only "
            + ", ".join(f"{n} of {name}" for name, n in scarce.items())
            + "; add words or templates."
        )
    return [pair for pairs in chosen.values() for pair in pairs]


def unseen_pairs(pairs: Sequence[MinimalPair], texts: Iterable[str]) -> list[MinimalPair]:
    """Return the pairs of which neither sentence stands verbatim in a text."""
    seen = _sentences_in(texts, {s for pair in pairs for s in (pair.good, pair.bad)})
    return [pair for pair in pairs if pair.good not in seen and pair.bad not in seen]


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate the pairs and write them; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m adapmoe_lab.demo.grammar", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help=".jsonl file to write")
    parser.add_argument("--seed", type=int, default=0, help="which of all pairs (default: 0)")
    parser.add_argument("--text", type=Path, help="training text whose sentences are left out")
    options = parser.parse_args(arguments)
    candidates = candidate_pairs(options.seed)
    if options.text is not None:
        try:
            domains = read_corpus(options.text)
        except (FileNotFoundError, ValueError) as error:
            parser.error(str(error))
        unseen = unseen_pairs(candidates, chain.from_iterable(d.training for d in domains))
        n_dropped = len(candidates) - len(unseen)
        print(f"Dropped {n_dropped} of {len(candidates):,} candidates: in the training text.")
        candidates = unseen
    pairs = choose_pairs(candidates)
    write_lines(options.out, (json.dumps(asdict(pair), ensure_ascii=False) for pair in pairs))
    print(f"Wrote {len(pairs):,} pairs of {len(PARADIGMS)} paradigms to {options.out}.")
    return 0


def _fill(template: str) -> Iterator[str]:
    """Yield the template with every combination of words in its slots, the contrast left in."""
    fields = (field for _, field, _, _ in Formatter().parse(template) if field)
    slots = list(dict.fromkeys(field.partition(".")[0] for field in fields))
    for words in product(*(WORDS[slot] for slot in slots)):
        yield template.format_map(dict(zip(slots, words, strict=True)))


def _contrast(paradigm: str, marked: str) -> MinimalPair:
    return MinimalPair(paradigm, _CONTRAST.sub(r"\1", marked), _CONTRAST.sub(r"\2", marked))


def _sentences_in(texts: Iterable[str], sentences: Set[str]) -> set[str]:
    """Return the sentences that a text holds; each must end with its only full stop.

    One pass over the text: at every full stop, what ends there is looked up at every length.
    """
    lengths = {len(sentence) for sentence in sentences}
    found: set[str] = set()
    for text in texts:
        for stop in re.finditer(r"\.", text):
            end = stop.end()
            found |= sentences & {text[max(0, end - length) : end] for length in lengths}
    return found


if __name__ == "__main__":
    sys.exit(main())
