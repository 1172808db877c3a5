"""The vocabulary of the checkpoint of kind ``ruler``, and what part each token plays.

As that of the first kind, with the words of RULER's sentences as tokens, and with pairs of letters
and digits instead of single ones: a variable of five letters is three tokens.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass

from lowcontext.eval.retrieval_tokenizer import BOS, EOS, PAD, UNK
from lowcontext.eval.ruler import texts
from lowcontext.eval.words import (
    filler_words,
    key_words,
    plain_words,
    split_words,
    template_words,
)

VOCAB_SIZE = 8192
_SINGLE = string.ascii_lowercase + string.digits
_PAIRS = [first + second for first in _SINGLE for second in _SINGLE]
_NUMBERS = [f"{n:03d}" for n in range(1000)]
_KINDS = ["number", "numbers", "code", "codes"]
_NEEDLES = (texts.NEEDLE, texts.ASK_ONE, texts.ASK_ALL, texts.ONE, texts.ALL)
_CHAINS = (texts.ASSIGN, texts.COPY, texts.TRACE, texts.ASK_TRACE)
_LISTS = (texts.ASK_COMMON, texts.COMMON_PREFIX, texts.ASK_FREQUENT, texts.FREQUENT_PREFIX)
_PREAMBLES = (texts.NEEDLES, texts.TRACING, texts.COMMON, texts.FREQUENT)


@dataclass(frozen=True)
class Words:
    """Ids by their part in the tasks.

    Attributes:
        size: Number of tokens.
        bos: The first token.
        eos: The last token.
        stops: Tokens behind which no part goes on.
        topic: What needles and assignments are made of.
        parts: What a part of an answer begins with.
        words: What is counted.
        pieces: What continues a word.
        marks: Ids of "answer", "are", "is", "-", "=", ".", by that text.
        counted: Token before "are" -> number of words asked for.
        equal: Those of them that ask for words with equal counts.
    """

    size: int
    bos: int
    eos: int
    stops: list[int]
    topic: list[int]
    parts: list[int]
    words: list[int]
    pieces: list[int]
    marks: dict[str, int]
    counted: dict[int, int]
    equal: list[int]


def build_vocabulary() -> dict[str, int]:
    """Returns the 8192 tokens with their ids; the unused tail is named ``<unused...>``."""
    tokens = [PAD, BOS, EOS, UNK, *string.punctuation]
    starts = [*_SINGLE, *_PAIRS, *_NUMBERS]
    tokens += starts + [f"##{start}" for start in starts]
    tokens += template_words() + _words(*_NEEDLES, *_CHAINS, *_LISTS, *_PREAMBLES)
    tokens += _KINDS + plain_words() + key_words() + filler_words()
    tokens = list(dict.fromkeys(tokens))
    tokens += [f"<unused{i}>" for i in range(VOCAB_SIZE - len(tokens))]
    return {token: i for i, token in enumerate(tokens)}


def words_of(ids: dict[str, int]) -> Words:
    """Returns the part that each token plays, given the vocabulary."""
    pieces = [token for token in ids if token.startswith("##")]
    needle = [*_words(*_NEEDLES, *_CHAINS), *_KINDS, *key_words(), *_NUMBERS, *_PAIRS, *pieces]
    parts = [*_NUMBERS, *_PAIRS, *key_words(), *filler_words()]

    def find(tokens: list[str]) -> list[int]:
        return [ids[token] for token in dict.fromkeys(tokens)]

    return Words(
        size=len(ids),
        bos=ids[BOS],
        eos=ids[EOS],
        stops=find([".", "="]),
        topic=find([*needle, "-", "=", ",", "?", ":"]),
        parts=find(parts),
        words=find(filler_words()),
        pieces=find(pieces),
        marks={text: ids[text] for text in ("answer", "are", "is", "-", "=", ".")},
        counted={ids["list"]: 10, ids["words"]: 3},
        equal=[ids["list"]],
    )


def _words(*templates: str) -> list[str]:
    """Returns the words of sentences, without what is put into them and examples of it."""
    cleaned = re.sub(r"\{\w+\}|\b(?!VAR)[A-Z]{3}\b|\d+", " ", " ".join(templates))
    return list(dict.fromkeys(split_words(cleaned)))
