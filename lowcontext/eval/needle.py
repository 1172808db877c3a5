"""The needle task: find one sentence in a long text, and give back the number in it.

Of the kind of Kamradt, "Needle In A Haystack", 2023 and the NIAH tasks of RULER (arXiv 2404.06654).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from lowcontext.eval.haystack import haystack_words, insertion_point
from lowcontext.eval.prompt import Rendered, Room, fill, tokenize
from lowcontext.eval.words import ANSWER_PREFIX, NEEDLE, PREAMBLE, QUESTION, key_words

TASKS = {"single": 1, "multikey": 4}  # name -> number of needles


@dataclass(frozen=True)
class NeedleTask:
    """What is asked of every sample.

    Attributes:
        name: ``"single"`` (one needle) or ``"multikey"`` (four, three of them distractors).
        haystack: ``"words"``, ``"noise"`` or the path of a text file.
        answer_room: Tokens of the asked length left free for the answer.
    """

    name: str = "single"
    haystack: str = "words"
    answer_room: int = 16

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {self.name!r}")
        if self.answer_room < 1:
            raise ValueError(f"answer_room: expected 1 or more, got {self.answer_room}")


@dataclass(frozen=True)
class NeedleSample:
    """One prompt with its answer.

    Attributes:
        prompt: The text, chat template included.
        input_ids: The prompt's tokens; with the answer room at most the asked length.
        expected: The answer.
        key: The name asked for.
    """

    prompt: str
    input_ids: list[int]
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
    if not 0 <= depth <= 100:
        raise ValueError(f"depth: expected 0..100 (percent), got {depth}")
    rng = random.Random(f"{task.name}|{length}|{depth:g}|{seed}")
    needles = _draw_needles(TASKS[task.name], float(depth), rng)
    hay_seed = rng.getrandbits(64)

    def render(count: int) -> Rendered:
        hay = haystack_words(task.haystack, count, random.Random(hay_seed))
        key = needles[0].key
        text = f"{PREAMBLE} {_body(hay, needles)} {QUESTION.format(key=key)}"
        return tokenize(tokenizer, text, ANSWER_PREFIX.format(key=key))

    _, prompt, ids = fill(render, Room(length, task.answer_room, task.name, task.haystack))
    return NeedleSample(prompt, ids, expected=needles[0].value, key=needles[0].key)


def _draw_needles(count: int, depth: float, rng: random.Random) -> list[_Needle]:
    """Draws the needles, the asked one first; no two share a key or a group of three digits."""
    keys = rng.sample(key_words(), count)
    groups = [f"{n}" for n in rng.sample(range(100, 1000), 3 * count)]
    values = ["".join(groups[3 * i : 3 * i + 3]) for i in range(count)]
    depths = [depth] + [float(rng.randrange(101)) for _ in range(count - 1)]
    return [_Needle(*needle) for needle in zip(depths, keys, values, strict=True)]


def _body(hay: list[str], needles: list[_Needle]) -> str:
    parts = list(hay)
    points = [(insertion_point(hay, needle.depth), needle.text) for needle in needles]
    for point, text in sorted(points, reverse=True):
        parts.insert(point, text)
    return " ".join(parts)
