"""The words of the evaluation: prompt texts, and made-up words that can be pronounced."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

PREAMBLE = (
    "Below lies a long text. A few hidden codes were placed inside it. Read everything with care, "
    "because one code must be given back later, exactly as it was written, with no other words "
    "around it."
)
NEEDLE = "Note that the magic number of {key} is {value}."
QUESTION = "Question: what is the magic number of {key}? Answer:"
ANSWER_PREFIX = "The magic number of {key} is"
QUESTION_ALL = "Question: what are the magic numbers of {key}? Answer:"
ANSWER_PREFIX_ALL = "The magic numbers of {key} are"
LINK = "Note that the trail from {key} leads to {value}."
QUESTION_THREAD = "Question: where does the trail from {key} lead after {count} steps? Answer:"
ANSWER_PREFIX_THREAD = "The trail from {key} ends at"

NOISE = (
    "Rain falls on old roofs.",
    "Small boats rest near quiet water.",
    "Every morning a baker opens his wooden door.",
    "Two cats sleep under a green table.",
    "Snow covers far hills in early winter.",
)

_ONSETS = tuple("bdfghjklmnprstvz")
_VOWELS = tuple("aeiou")
_CODAS = ("", "", "l", "m", "n", "r", "s", "t")


def split_words(text: str) -> list[str]:
    """Returns the lower-case words of ``text``, without punctuation or braces."""
    cleaned = "".join(c.lower() if c.isalnum() else " " for c in text)
    return cleaned.split()


def template_words() -> list[str]:
    """Returns the distinct words of the needle and of the question, in order of appearance."""
    text = " ".join(part.format(key="", value="") for part in (NEEDLE, QUESTION, ANSWER_PREFIX))
    return list(dict.fromkeys(split_words(text)))


def plain_words() -> list[str]:
    """Returns the distinct words of the preamble and of the noise, in order of appearance."""
    return list(dict.fromkeys(split_words(" ".join((PREAMBLE, *NOISE)))))


def key_words() -> list[str]:
    """Returns the 256 made-up three-syllable words that name a needle."""
    return list(_key_words())


@cache
def _key_words() -> tuple[str, ...]:
    return tuple(made_up_words(256, syllables=3, seed=11, avoid=set()))


def filler_words() -> list[str]:
    """Returns the 1500 made-up two-syllable words that haystacks are drawn from."""
    return list(_filler_words())


@cache
def _filler_words() -> tuple[str, ...]:
    avoid = {*template_words(), *plain_words(), *key_words()}
    return tuple(made_up_words(1500, syllables=2, seed=12, avoid=avoid))


def made_up_words(count: int, *, syllables: int, seed: int, avoid: set[str]) -> list[str]:
    """Returns distinct words that can be pronounced; the same arguments give the same words."""
    words: dict[str, None] = {}
    for word in _candidates(syllables, seed):
        if word not in avoid:
            words[word] = None
        if len(words) == count:
            break
    return list(words)


def _candidates(syllables: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    while True:
        parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)]
        yield "".join(parts) + rng.choice(_CODAS)
