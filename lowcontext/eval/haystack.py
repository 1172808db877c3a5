"""Haystacks: an endless list of words for a needle to hide in."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from functools import cache
from itertools import cycle, islice
from pathlib import Path

from lowcontext.eval.words import NOISE, filler_words

HAYSTACKS = ("words", "noise", "wonderwords")
_SENTENCE_END = (".", "!", "?")


def haystack_words(haystack: str, count: int, rng: random.Random) -> list[str]:
    """Returns the first ``count`` words of a haystack.

    Args:
        haystack: ``"words"`` (made-up words in random order), ``"noise"`` (five sentences
            repeated), ``"wonderwords"`` (English words of that package in random order) or the path
            of a UTF-8 text file (read from a random word on, repeated if too short).
        count: Number of words.
        rng: Source of the random choices.

    Returns:
        Words, with their punctuation.

    Raises:
        ValueError: If ``haystack`` is neither a known name nor a text file with words in it.
        RuntimeError: If it is ``"wonderwords"`` and that package is not installed.
    """
    return list(islice(_source(haystack, rng), count))


def haystack_label(haystack: str) -> str:
    """Returns what names a haystack in the rows of a run: see ``file_label`` for a text file.

    Raises:
        ValueError: If it is neither a known name nor a text file with words in it.
    """
    if haystack in HAYSTACKS:
        return haystack
    _file_words(haystack)
    return file_label(haystack)


def file_label(path: str) -> str:
    """Returns a file's path and a digest of its bytes, so that a changed file is another one."""
    return f"{path} ({hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]})"


def insertion_point(words: list[str], depth: float) -> int:
    """Returns the index of the word before which a needle at this depth belongs.

    Args:
        words: The haystack.
        depth: 0 (start) to 100 (end), in percent.

    Returns:
        The index at that depth, moved to the next end of a sentence if one is within 30 words.
    """
    point = round(len(words) * depth / 100)
    if point in (0, len(words)):
        return point
    for candidate in range(point, min(point + 30, len(words)) + 1):
        if words[candidate - 1].endswith(_SENTENCE_END):
            return candidate
    return point


def _source(haystack: str, rng: random.Random) -> Iterator[str]:
    if haystack == "words":
        vocabulary = filler_words()
        return iter(lambda: rng.choice(vocabulary), None)
    if haystack == "noise":
        return cycle([word for sentence in NOISE for word in sentence.split()])
    if haystack == "wonderwords":
        english = _english_words()
        return iter(lambda: rng.choice(english), None)
    words = _file_words(haystack)
    start = rng.randrange(len(words))
    return cycle(words[start:] + words[:start])


@cache
def _english_words() -> tuple[str, ...]:
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise RuntimeError(
            "haystack: expected the package wonderwords to be installed; pip install wonderwords"
        ) from error
    words = (word for phrase in RandomWord().filter() for word in phrase.split())
    return tuple(sorted(set(words)))


def _file_words(haystack: str) -> list[str]:
    path = Path(haystack)
    if not path.is_file():
        raise ValueError(
            f"haystack: expected one of {', '.join(HAYSTACKS)} or a text file, got {haystack!r}"
        )
    try:
        words = path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"haystack: expected UTF-8 text, got {haystack!r} ({error})") from error
    if not words:
        raise ValueError(f"haystack: expected a text file with words in it, got {haystack!r}")
    return words
