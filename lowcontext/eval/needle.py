"""The needle task: find one sentence in a long text, and give back the number in it.

Of the kind of Kamradt, "Needle In A Haystack", 2023 and the NIAH tasks of RULER (arXiv 2404.06654).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lowcontext.eval.haystack import haystack_words, insertion_point
from lowcontext.eval.prompt import Rendered, Room, fill, fit_frame, tokenize
from lowcontext.eval.words import (
    ANSWER_PREFIX,
    ANSWER_PREFIX_ALL,
    ANSWER_PREFIX_THREAD,
    LINK,
    NEEDLE,
    PREAMBLE,
    QUESTION,
    QUESTION_ALL,
    QUESTION_THREAD,
    key_words,
)

TASKS = {"single": 1, "multikey": 4}  # name -> number of needles
COUNTED = ("several", "thread")  # written NAME:COUNT
MAX_COUNT = 100
KINDS = (*TASKS, *(f"{name}:COUNT" for name in COUNTED))


@dataclass(frozen=True)
class NeedleTask:
    """What is asked of every sample.

    Attributes:
        name: ``"single"`` (one needle), ``"multikey"`` (four, three of them distractors),
            ``"several:COUNT"`` (so many needles, all asked for, spread from the asked depth to the
            end) or ``"thread:COUNT"`` (a chain of so many links to follow from name to name, the
            first at the asked depth, beside a chain as long that is not asked for).
        haystack: ``"words"``, ``"noise"``, ``"wonderwords"`` or the path of a text file.
        answer_room: Tokens of the asked length left free for the answer.
    """

    name: str = "single"
    haystack: str = "words"
    answer_room: int = 16

    def __post_init__(self) -> None:
        kind, colon, number = self.name.partition(":")
        counted = kind in COUNTED and number.isdecimal() and 1 <= int(number) <= MAX_COUNT
        if not (counted if colon else kind in TASKS):
            raise ValueError(f"task: expected one of {', '.join(KINDS)}, got {self.name!r}")
        if self.answer_room < 1:
            raise ValueError(f"answer_room: expected 1 or more, got {self.answer_room}")

    @property
    def kind(self) -> str:
        """The name without the count."""
        return self.name.partition(":")[0]

    @property
    def count(self) -> int:
        """Number of needles, or of links in a thread."""
        return TASKS.get(self.name) or int(self.name.partition(":")[2])


@dataclass(frozen=True)
class NeedleSample:
    """One prompt with its answer.

    Attributes:
        prompt: The text, chat template included.
        input_ids: The prompt's tokens; with the answer room at most the asked length.
        expected: The answer; several are joined with ", ".
        key: The name asked for; several are joined in the same way.
    """

    prompt: str
    input_ids: list[int]
    expected: str
    key: str

    @property
    def answers(self) -> list[str]:
        """The answers, one by one."""
        return self.expected.split(", ")


@dataclass(frozen=True)
class _Puzzle:
    """Sentences with their depths, and what is asked."""

    sentences: list[tuple[float, str]]
    question: str
    prefix: str
    expected: str
    key: str


@dataclass(frozen=True)
class _Needle:
    depth: float
    key: str
    value: str

    @property
    def text(self) -> str:
        return NEEDLE.format(key=self.key, value=self.value)


def make_sample(
    tokenizer: Any, task: NeedleTask, *, length: int, depth: float, seed: int
) -> NeedleSample:
    """Builds the sample that is named by these arguments: the same arguments, the same sample.

    Args:
        tokenizer: A Hugging Face tokenizer; its chat template is used where it has one.
        task: Kind of needle and haystack.
        length: Tokens of prompt and answer room together.
        depth: Where the asked needle stands in the haystack, 0 (start) to 100 (end), in percent.
        seed: Seed of words, keys, values and distractors.

    Returns:
        A sample whose prompt fills ``length - task.answer_room`` to within 1%, never over it.

    Raises:
        ValueError: If ``depth`` is out of range, or ``length`` has no room for the prompt's frame.
    """
    puzzle, render = _drawn(tokenizer, task, length, depth, seed)
    _, prompt, ids = fill(render, _room(task, length))
    return NeedleSample(prompt, ids, expected=puzzle.expected, key=puzzle.key)


def check_length(tokenizer: Any, task: NeedleTask, *, length: int, depth: float, seed: int) -> None:
    """Refuses a length that a sample's frame does not fit, before anything is run.

    Raises:
        ValueError: As ``make_sample``.
    """
    fit_frame(_drawn(tokenizer, task, length, depth, seed)[1], _room(task, length))


def _room(task: NeedleTask, length: int) -> Room:
    return Room(length, task.answer_room, task.name, task.haystack)


def _drawn(
    tokenizer: Any, task: NeedleTask, length: int, depth: float, seed: int
) -> tuple[_Puzzle, Callable[[int], Rendered]]:
    """What a sample hides and asks, and its prompt around so many words."""
    if not 0 <= depth <= 100:
        raise ValueError(f"depth: expected 0..100 (percent), got {depth}")
    rng = random.Random(f"{task.name}|{length}|{depth:g}|{seed}")
    puzzle = _PUZZLES[task.kind](task.count, float(depth), rng)
    hay_seed = rng.getrandbits(64)

    def render(count: int) -> Rendered:
        hay = haystack_words(task.haystack, count, random.Random(hay_seed))
        text = f"{PREAMBLE} {_body(hay, puzzle.sentences)} {puzzle.question}"
        return tokenize(tokenizer, text, puzzle.prefix)

    return puzzle, render


def _one_asked(count: int, depth: float, rng: random.Random) -> _Puzzle:
    """One needle is asked for, the others distract."""
    needles = _draw_needles(count, depth, rng)
    return _asked(needles, needles[:1])


def _all_asked(count: int, depth: float, rng: random.Random) -> _Puzzle:
    """Every needle is asked for."""
    step = (100 - depth) / count
    needles = [
        _Needle(depth + step * place, needle.key, needle.value)
        for place, needle in enumerate(_draw_needles(count, depth, rng))
    ]
    return _asked(needles, needles)


def _asked(needles: list[_Needle], asked: list[_Needle]) -> _Puzzle:
    keys, values = ([getattr(x, name) for x in asked] for name in ("key", "value"))
    one = len(asked) == 1
    form = keys[0] if one else f"{', '.join(keys[:-1])} and {keys[-1]}"
    return _Puzzle(
        sentences=[(needle.depth, needle.text) for needle in needles],
        question=(QUESTION if one else QUESTION_ALL).format(key=form),
        prefix=(ANSWER_PREFIX if one else ANSWER_PREFIX_ALL).format(key=form),
        expected=", ".join(values),
        key=", ".join(keys),
    )


def _thread(count: int, depth: float, rng: random.Random) -> _Puzzle:
    """A chain of names to follow, and one beside it that leads elsewhere."""
    names = rng.sample(key_words(), 2 * (count + 1))
    asked, other = names[: count + 1], names[count + 1 :]
    sentences = [
        (rng.random() * 100, LINK.format(key=key, value=value))
        for chain in (asked, other)
        for key, value in pairwise(chain)
    ]
    sentences[0] = (depth, sentences[0][1])
    return _Puzzle(
        sentences=sentences,
        question=QUESTION_THREAD.format(key=asked[0], count=count),
        prefix=ANSWER_PREFIX_THREAD.format(key=asked[0]),
        expected=asked[-1],
        key=asked[0],
    )


_PUZZLES = {"single": _one_asked, "multikey": _one_asked, "several": _all_asked, "thread": _thread}


def _draw_needles(count: int, depth: float, rng: random.Random) -> list[_Needle]:
    """Draws the needles, the asked one first; no two share a key or a group of three digits."""
    keys = rng.sample(key_words(), count)
    groups = [f"{n}" for n in rng.sample(range(100, 1000), 3 * count)]
    values = ["".join(groups[3 * i : 3 * i + 3]) for i in range(count)]
    depths = [depth] + [float(rng.randrange(101)) for _ in range(count - 1)]
    return [_Needle(*needle) for needle in zip(depths, keys, values, strict=True)]


def _body(hay: list[str], sentences: list[tuple[float, str]]) -> str:
    parts = list(hay)
    points = [(insertion_point(hay, depth), text) for depth, text in sentences]
    for point, text in sorted(points, reverse=True):
        parts.insert(point, text)
    return " ".join(parts)
