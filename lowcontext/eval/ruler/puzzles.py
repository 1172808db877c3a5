"""What is hidden, asked and answered in each family of tasks of RULER (arXiv 2404.06654, 3)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice, pairwise

from lowcontext.eval.haystack import haystack_words, insertion_point
from lowcontext.eval.ruler import texts
from lowcontext.eval.ruler.documents import Question
from lowcontext.eval.words import NOISE

SHORT = 4096  # below it, the word lists repeat their words less often
ZETA_2 = math.pi**2 / 6


@dataclass(frozen=True)
class Puzzle:
    """One sample before its length is known.

    Attributes:
        preamble: What stands before the body.
        body: The text for a number of words, in which the answers are.
        question: What stands after it.
        prefix: How the answer begins.
        answers: The references.
        coarse: Whether the body grows by whole sentences, so that noise has to fill what is left.
    """

    preamble: str
    body: Callable[[int], str]
    question: str
    prefix: str
    answers: list[str]
    coarse: bool = False


@dataclass(frozen=True)
class NeedleKind:
    """How many needles of which kind.

    Attributes:
        hay: ``"noise"``, ``"text"`` (the source of the run) or ``"needles"`` (other needles).
        key: ``"words"`` or ``"code"``.
        value: ``"number"`` or ``"code"``.
        keys: Number of keys in the text.
        values: Values of each key.
        asked: Number of keys asked for.
    """

    hay: str = "text"
    key: str = "words"
    value: str = "number"
    keys: int = 1
    values: int = 1
    asked: int = 1


def needles(kind: NeedleKind, source: str, rng: random.Random) -> Puzzle:
    """Sentences that give a key its value, at random depths."""
    names = list(islice(texts.keys(kind.key, rng), kind.keys))
    values = {name: _distinct_values(kind, rng) for name in names}
    placed = [
        (rng.random() * 100, _needle(kind, name, value)) for name in names for value in values[name]
    ]
    seed = rng.getrandbits(64)

    def body(words: int) -> str:
        hay_rng = random.Random(seed)
        if kind.hay == "needles":
            parts = _hay_of_needles(kind, set(names), words, hay_rng)
            points = [(round(len(parts) * depth / 100), text) for depth, text in placed]
        else:
            parts = haystack_words(source if kind.hay == "text" else kind.hay, words, hay_rng)
            points = [(insertion_point(parts, depth), text) for depth, text in placed]
        return _insert(parts, points)

    asked = names[: kind.asked]
    one = kind.values * kind.asked == 1
    form = {"kind": kind.value, "key": texts.join(asked)}
    return Puzzle(
        preamble=texts.NEEDLES.format(kind=kind.value),
        body=body,
        question=(texts.ASK_ONE if one else texts.ASK_ALL).format(**form),
        prefix=(texts.ONE if one else texts.ALL).format(**form),
        answers=[value for name in asked for value in values[name]],
        coarse=kind.hay == "needles",
    )


def tracing(hops: int, rng: random.Random) -> Puzzle:
    """A variable set to a number, and others set to one another, in order of their places."""
    names = texts.variables(hops + 1, rng)
    number = f"{rng.randrange(10_000, 100_000)}"
    lines = [texts.ASSIGN.format(name=names[0], value=number)]
    for earlier, name in pairwise(names):
        lines.append(texts.COPY.format(name=name, source=earlier))
    depths = sorted(rng.random() * 100 for _ in lines)

    def body(words: int) -> str:
        parts = haystack_words("noise", words, rng)
        points = [insertion_point(parts, depth) for depth in depths]
        return _insert(parts, list(zip(points, lines, strict=True)))

    return Puzzle(
        preamble=texts.TRACING.format(noise=" ".join(NOISE[:2])),
        body=body,
        question=texts.ASK_TRACE.format(count=len(names), value=number),
        prefix=texts.TRACE.format(value=number),
        answers=names,
    )


def common_words(length: int, rng: random.Random, *, common: int = 10) -> Puzzle:
    """A numbered list: ten words 30 times each, all others three times (6 and 1 below 4K)."""
    often, seldom = (6, 1) if length < SHORT else (30, 3)
    seed = rng.getrandbits(64)
    words = texts.distinct_words(random.Random(seed))
    example = list(islice(words, 12))
    chosen = list(islice(words, common))
    few = example[:common] * 2 + example[common:]
    rng.shuffle(few)

    def body(entries: int) -> str:
        stream = texts.distinct_words(random.Random(seed))
        others = islice(stream, len(example) + common, None)
        items = chosen * often
        items += [w for w in islice(others, entries // seldom) for _ in range(seldom)]
        items += list(islice(others, entries % seldom))
        random.Random(seed).shuffle(items)
        return _numbered(items)

    return Puzzle(
        preamble=texts.COMMON.format(
            count=common, example=_numbered(few), answer=", ".join(example[:common])
        ),
        body=body,
        question=texts.ASK_COMMON.format(count=common),
        prefix=texts.COMMON_PREFIX.format(count=common),
        answers=chosen,
    )


def frequent_words(rng: random.Random, *, least: int = 100) -> Puzzle:
    """Coded words whose counts fall with the square of their rank; dots have the first rank."""
    seed = rng.getrandbits(64)
    answers = list(islice(texts.distinct_words(random.Random(seed)), 3))

    def body(words: int) -> str:
        total = words + least  # with 73 words or more, the third word leads the fourth
        stream = texts.distinct_words(random.Random(seed))
        items = ["..."] * int(total / ZETA_2)
        for rank in count(2):
            times = int(total / ZETA_2 / rank**2)
            if times == 0:
                break
            items += [next(stream)] * times
        items += islice(stream, total - len(items))
        random.Random(seed).shuffle(items)
        return " ".join(items)

    return Puzzle(
        preamble=texts.FREQUENT,
        body=body,
        question=texts.ASK_FREQUENT,
        prefix=texts.FREQUENT_PREFIX,
        answers=answers,
    )


def questions(asked: Question, others: list[str], rng: random.Random) -> Puzzle:
    """The documents that answer a question, among documents that do not."""
    seed = rng.getrandbits(64)

    def body(words: int) -> str:
        shuffler = random.Random(seed)
        documents = list(asked.documents)
        left = words
        for document in _endless(others, shuffler):
            cut = document.split()[:left]
            left -= len(cut)
            if not cut:
                break
            documents.append(" ".join(cut))
        random.Random(seed).shuffle(documents)
        return " ".join(
            texts.DOCUMENT.format(number=number, text=text)
            for number, text in enumerate(documents, start=1)
        )

    return Puzzle(
        preamble=texts.DOCUMENTS,
        body=body,
        question=texts.ASK_DOCUMENTS.format(question=asked.question),
        prefix=texts.DOCUMENTS_PREFIX,
        answers=list(asked.answers),
    )


def _needle(kind: NeedleKind, key: str, value: str) -> str:
    return texts.NEEDLE.format(kind=kind.value, key=key, value=value)


def _distinct_values(kind: NeedleKind, rng: random.Random) -> list[str]:
    values: dict[str, None] = {}
    while len(values) < kind.values:
        values[texts.value(kind.value, rng)] = None
    return list(values)


def _hay_of_needles(kind: NeedleKind, taken: set[str], words: int, rng: random.Random) -> list[str]:
    """Needles with other keys, as many as so many words give."""
    others = (key for key in texts.keys(kind.key, rng) if key not in taken)
    size = len(_needle(kind, "key", "value").split())
    return [_needle(kind, next(others), texts.value(kind.value, rng)) for _ in range(words // size)]


def _insert(parts: list[str], points: list[tuple[int, str]]) -> str:
    """Joins words with sentences before those at the given places, equal places in order."""
    order = sorted(range(len(points)), key=lambda i: points[i][0])
    words = list(parts)
    for i in reversed(order):
        words.insert(points[i][0], points[i][1])
    return " ".join(words)


def _numbered(items: list[str]) -> str:
    return " ".join(f"{number}. {item}" for number, item in enumerate(items, start=1))


def _endless(documents: list[str], rng: random.Random) -> Iterator[str]:
    """Yields documents in random order, again from the first when they run out."""
    order = rng.sample(documents, len(documents))
    while order:
        yield from order
