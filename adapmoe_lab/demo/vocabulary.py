"""The words of the minimal pairs: simple ones, such as stories for children are told in.

Words are grouped by what a template may say of them, so that every combination makes sense:
any PERSON can have done any DEED, any THING can lie on any SURFACE.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Noun(NamedTuple):
    """Singular and plural."""

    one: str
    many: str


class Verb(NamedTuple):
    """The forms of a verb, and an ending that completes a sentence with it."""

    base: str
    third: str
    past: str
    participle: str
    ending: str


class Slip(NamedTuple):
    """An irregular past, the regular one that English does not have, and an ending."""

    past: str
    wrong: str
    ending: str


class Act(NamedTuple):
    """A past tense and what follows the reflexive pronoun after it."""

    past: str
    ending: str


class Adjective(NamedTuple):
    """The three degrees."""

    base: str
    comparative: str
    superlative: str


class Pronoun(NamedTuple):
    """A personal pronoun by case."""

    subject: str
    object: str
    possessive: str


Word = str | Noun | Verb | Slip | Act | Adjective | Pronoun

ANIMALS = (
    Noun("dog", "dogs"),
    Noun("cat", "cats"),
    Noun("horse", "horses"),
    Noun("bird", "birds"),
    Noun("cow", "cows"),
    Noun("goat", "goats"),
    Noun("pig", "pigs"),
    Noun("duck", "ducks"),
    Noun("rabbit", "rabbits"),
    Noun("fox", "foxes"),
    Noun("bear", "bears"),
    Noun("wolf", "wolves"),
    Noun("mouse", "mice"),
    Noun("monkey", "monkeys"),
)
BOYS_AND_MEN = (
    Noun("boy", "boys"),
    Noun("man", "men"),
    Noun("king", "kings"),
    Noun("prince", "princes"),
    Noun("father", "fathers"),
    Noun("brother", "brothers"),
    Noun("son", "sons"),
    Noun("uncle", "uncles"),
)
GIRLS_AND_WOMEN = (
    Noun("girl", "girls"),
    Noun("woman", "women"),
    Noun("queen", "queens"),
    Noun("princess", "princesses"),
    Noun("mother", "mothers"),
    Noun("sister", "sisters"),
    Noun("daughter", "daughters"),
    Noun("aunt", "aunts"),
)
PEOPLE = (
    *BOYS_AND_MEN[:4],
    *GIRLS_AND_WOMEN[:4],
    Noun("child", "children"),
    Noun("farmer", "farmers"),
    Noun("sailor", "sailors"),
    Noun("soldier", "soldiers"),
    Noun("teacher", "teachers"),
    Noun("friend", "friends"),
)
THINGS = (
    Noun("book", "books"),
    Noun("box", "boxes"),
    Noun("ball", "balls"),
    Noun("cup", "cups"),
    Noun("hat", "hats"),
    Noun("bag", "bags"),
    Noun("bottle", "bottles"),
    Noun("basket", "baskets"),
    Noun("toy", "toys"),
    Noun("knife", "knives"),
    Noun("shoe", "shoes"),
    Noun("lamp", "lamps"),
)
SURFACES = (
    Noun("table", "tables"),
    Noun("chair", "chairs"),
    Noun("bed", "beds"),
    Noun("shelf", "shelves"),
    Noun("bench", "benches"),
)
LANDMARKS = (
    Noun("house", "houses"),
    Noun("tree", "trees"),
    Noun("door", "doors"),
    Noun("gate", "gates"),
    Noun("wall", "walls"),
    Noun("bridge", "bridges"),
    Noun("river", "rivers"),
    Noun("barn", "barns"),
)
BUILDINGS = (
    Noun("house", "houses"),
    Noun("castle", "castles"),
    Noun("tower", "towers"),
    Noun("church", "churches"),
    Noun("hut", "huts"),
    Noun("barn", "barns"),
    Noun("mill", "mills"),
)
DEEDS = (
    Verb("eat", "eats", "ate", "eaten", "the bread"),
    Verb("eat", "eats", "ate", "eaten", "the cake"),
    Verb("see", "sees", "saw", "seen", "the wolf"),
    Verb("see", "sees", "saw", "seen", "the castle"),
    Verb("write", "writes", "wrote", "written", "a letter"),
    Verb("break", "breaks", "broke", "broken", "the window"),
    Verb("take", "takes", "took", "taken", "the money"),
    Verb("give", "gives", "gave", "given", "the dog a bone"),
    Verb("ride", "rides", "rode", "ridden", "the white horse"),
    Verb("drive", "drives", "drove", "driven", "to the town"),
    Verb("draw", "draws", "drew", "drawn", "a picture"),
    Verb("hide", "hides", "hid", "hidden", "the key"),
    Verb("steal", "steals", "stole", "stolen", "the gold"),
    Verb("choose", "chooses", "chose", "chosen", "the red hat"),
    Verb("throw", "throws", "threw", "thrown", "the ball"),
    Verb("sing", "sings", "sang", "sung", "a song"),
    Verb("drink", "drinks", "drank", "drunk", "the milk"),
    Verb("swim", "swims", "swam", "swum", "in the lake"),
    Verb("go", "goes", "went", "gone", "to the forest"),
    Verb("fall", "falls", "fell", "fallen", "into the river"),
    Verb("forget", "forgets", "forgot", "forgotten", "the story"),
    Verb("wear", "wears", "wore", "worn", "new shoes"),
    Verb("ring", "rings", "rang", "rung", "the bell"),
    Verb("speak", "speaks", "spoke", "spoken", "to a stranger"),
    Verb("grow", "grows", "grew", "grown", "some flowers"),
)
"""Verbs whose past tense and participle differ."""

HABITS = (
    Verb("walk", "walks", "walked", "walked", "to the river"),
    Verb("play", "plays", "played", "played", "in the garden"),
    Verb("make", "makes", "made", "made", "a cake"),
    Verb("work", "works", "worked", "worked", "in the field"),
    Verb("sing", "sings", "sang", "sung", "a song"),
    Verb("run", "runs", "ran", "run", "to the house"),
    Verb("eat", "eats", "ate", "eaten", "some bread"),
    Verb("drink", "drinks", "drank", "drunk", "some milk"),
    Verb("swim", "swims", "swam", "swum", "in the lake"),
    Verb("sit", "sits", "sat", "sat", "by the fire"),
    Verb("help", "helps", "helped", "helped", "the old man"),
    Verb("feed", "feeds", "fed", "fed", "the horses"),
)
SLIPS = (
    Slip("found", "finded", "the key"),
    Slip("brought", "bringed", "some water"),
    Slip("bought", "buyed", "some bread"),
    Slip("told", "telled", "a story"),
    Slip("kept", "keeped", "the secret"),
    Slip("slept", "sleeped", "in the barn"),
    Slip("fought", "fighted", "the wolf"),
    Slip("held", "holded", "the rope"),
    Slip("left", "leaved", "the house"),
    Slip("lost", "losed", "the ring"),
    Slip("made", "maked", "a cake"),
    Slip("met", "meeted", "a stranger"),
    Slip("sold", "selled", "the cow"),
    Slip("sent", "sended", "a letter"),
    Slip("stood", "standed", "by the window"),
    Slip("won", "winned", "the race"),
    Slip("ran", "runned", "to the village"),
    Slip("came", "comed", "to the castle"),
    Slip("sat", "sitted", "by the fire"),
)
SELF_ACTS = (
    Act("hurt", "in the garden"),
    Act("washed", "in the river"),
    Act("warmed", "by the fire"),
    Act("hid", "behind the tree"),
    Act("saw", "in the mirror"),
    Act("threw", "on the bed"),
    Act("covered", "with a blanket"),
    Act("found", "in a dark room"),
    Act("made", "a cup of tea"),
    Act("bought", "a new hat"),
)
DEGREES = (
    Adjective("tall", "taller", "tallest"),
    Adjective("old", "older", "oldest"),
    Adjective("young", "younger", "youngest"),
    Adjective("strong", "stronger", "strongest"),
    Adjective("kind", "kinder", "kindest"),
    Adjective("wise", "wiser", "wisest"),
    Adjective("rich", "richer", "richest"),
    Adjective("poor", "poorer", "poorest"),
    Adjective("happy", "happier", "happiest"),
    Adjective("brave", "braver", "bravest"),
)
PERSONS = (
    Pronoun("he", "him", "his"),
    Pronoun("she", "her", "her"),
    Pronoun("we", "us", "our"),
    Pronoun("they", "them", "their"),
    Pronoun("I", "me", "my"),
)
OWNERS = tuple(pronoun for pronoun in PERSONS if pronoun.object != pronoun.possessive)

WORDS: Mapping[str, tuple[Word, ...]] = MappingProxyType(
    {
        "animal": ANIMALS,
        "male": BOYS_AND_MEN,
        "female": GIRLS_AND_WOMEN,
        "person": PEOPLE,
        "thing": THINGS,
        "surface": SURFACES,
        "landmark": LANDMARKS,
        "building": BUILDINGS,
        "deed": DEEDS,
        "habit": HABITS,
        "slip": SLIPS,
        "self_act": SELF_ACTS,
        "degree": DEGREES,
        "pronoun": PERSONS,
        "owner": OWNERS,
        "boy_name": ("Tom", "Jack", "Ben", "Tim", "Peter", "John", "Henry"),
        "girl_name": ("Lily", "Anna", "Mary", "Lucy", "Mia", "Jane", "Alice"),
        "who": ("I", "We", "You", "They", "He", "She"),
        "feeling": ("hungry", "tired", "happy", "sad", "cold", "angry", "quiet", "thirsty"),
        "look": ("new", "big", "small", "dirty", "clean", "broken", "red", "heavy"),
        "size": ("big", "small", "large", "tiny", "great", "little"),
        "color": ("red", "blue", "green", "yellow", "white", "black", "brown"),
        "vowel_look": ("old", "ugly", "orange", "odd", "enormous"),
        "vowel_food": ("apple", "egg", "orange", "onion", "apple pie"),
        "food": ("pear", "cake", "potato", "carrot", "banana", "fish"),
        "stuff": ("money", "bread", "water", "milk", "butter", "sugar", "salt", "tea"),
        "container": ("house", "kitchen", "box", "room", "basket", "cupboard", "bag"),
        "outdoors": ("garden", "field", "forest", "yard", "park", "valley"),
        "goal": ("market", "school", "kitchen", "village", "castle", "farm"),
        "scenery": ("river", "lake", "sea", "forest", "road", "village"),
        "number": ("two", "three", "four", "five", "six", "seven", "many", "several"),
        "day": ("yesterday", "last night", "this morning", "last week", "last summer"),
        "opening": ("Yesterday", "Last night", "This morning", "One day", "That evening"),
        "by_then": ("that day", "that morning", "by then", "before noon", "before dinner"),
        "modal": ("can", "will", "must", "may", "could", "should", "would"),
        "modal_adverb": ("now", "soon", "never", "often", "also", "always"),
        "wish": ("wanted", "tried", "began", "hoped", "liked", "learned", "decided", "promised"),
        "ease": ("hard", "easy", "nice", "good", "fun", "dangerous"),
    }
)
"""What each slot of a template can hold; a slot `{person.many}` takes that form of the word."""
