"""The sentences of the RULER suite, in own words, and its keys, values and word lists."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain

from lowcontext.eval.words import filler_words, key_words, made_up_words

NEEDLES = (
    "Below lies a long text. A few hidden {kind}s were placed inside it. Read everything with "
    "care, because some must be given back later, exactly as they were written, with no other "
    "words around them."
)
NEEDLE = "Note that the magic {kind} of {key} is {value}."
ASK_ONE = "Question: what is the magic {kind} of {key}? Answer:"
ASK_ALL = "Question: what are all the magic {kind}s of {key}? Answer:"
ONE, ALL = "The magic {kind} of {key} is", "The magic {kind}s of {key} are"

TRACING = (
    "Below lies a long text with lines in it that set variables, some to a number, some to another "
    "variable. Follow them, and find every variable that ends up with the asked number. "
    "Example: VAR QXA = 70551. {noise} VAR JPW = VAR QXA. {noise} VAR HUE = VAR JPW. "
    "The variables that hold 70551 are QXA, JPW, HUE. Now the text."
)
ASSIGN, COPY = "VAR {name} = {value}.", "VAR {name} = VAR {source}."
ASK_TRACE = "Question: which {count} variables hold {value}? Answer:"
TRACE = "The variables that hold {value} are"

COMMON = (
    "Below lies a numbered list of words. Some words come back many times, others seldom. Find the "
    "{count} that come most often. Example: {example} The {count} most common words of this list "
    "are {answer}. Now the list."
)
ASK_COMMON = "Question: which {count} words are the most common in the list? Answer:"
COMMON_PREFIX = "The {count} most common words in the list are"

FREQUENT = (
    "Below lies a text in a code. Nobody knows what its words mean, and its dots mean nothing. "
    "Count the words, and find the three that come most often."
)
ASK_FREQUENT = "Question: which three words of the coded text come most often? Answer:"
FREQUENT_PREFIX = "The three most frequent words are"

DOCUMENTS = (
    "Below lie several documents. A question about them follows; answer it with a few words from "
    "the documents, and nothing else."
)
DOCUMENT = "Document {number}: {text}"
ASK_DOCUMENTS = "Question: {question}"
DOCUMENTS_PREFIX = "Answer:"

_HEX = "0123456789abcdef"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def join(names: list[str]) -> str:
    """Returns "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def keys(kind: str, rng: random.Random) -> Iterator[str]:
    """Yields keys without end, no two the same: pairs of made-up words, or random codes."""
    seen: set[str] = set()
    words = key_words()
    while True:
        key = code(rng) if kind == "code" else f"{rng.choice(words)}-{rng.choice(words)}"
        if key not in seen:
            seen.add(key)
            yield key


def value(kind: str, rng: random.Random) -> str:
    """Returns a value: a number of nine digits, or a code of 32 hexadecimal ones."""
    return code(rng) if kind == "code" else f"{rng.randrange(10**8, 10**9)}"


def code(rng: random.Random) -> str:
    """Returns 32 hexadecimal digits in the groups of a UUID."""
    return "-".join("".join(rng.choices(_HEX, k=size)) for size in (8, 4, 4, 4, 12))


def variables(count: int, rng: random.Random) -> list[str]:
    """Returns distinct names of five capital letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(_LETTERS, k=5))] = None
    return list(names)


def distinct_words(rng: random.Random) -> Iterator[str]:
    """Yields made-up words in random order, none twice: 1500 short ones, then 60000 longer ones."""
    short = filler_words()
    rng.shuffle(short)
    return chain(short, _long_words(rng, set(short)))


def _long_words(rng: random.Random, avoid: set[str]) -> Iterator[str]:
    words = made_up_words(60_000, syllables=3, seed=rng.getrandbits(32), avoid=avoid)
    yield from words
    raise ValueError("length: expected at most 61500 distinct words; ask for a shorter prompt")
