"""The needle task: find one sentence in a long text, and give back the number in it.

Of the kind of Kamradt, "Needle In A Haystack", 2023 and the NIAH tasks of RULER (arXiv 2404.06654).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowcontext.eval.haystack import haystack_words, insertion_point
from lowcontext.eval.words import ANSWER_PREFIX, NEEDLE, PREAMBLE, QUESTION, key_words

TASKS = {"single": 1, "multikey": 4}  # name -> number of needles
MAX_SHORTFALL = 0.01  # of the asked length


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
    budget = length - task.answer_room
    hay_seed = rng.getrandbits(64)

    def render(count: int) -> tuple[str, list[int]]:
        hay = haystack_words(task.haystack, count, random.Random(hay_seed))
        prompt, special = _wrap(tokenizer, _body(hay, needles), needles[0].key)
        return prompt, list(tokenizer(prompt, add_special_tokens=special)["input_ids"])

    prompt, ids = _fill(render, budget, task, length)
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


def _wrap(tokenizer: Any, body: str, key: str) -> tuple[str, bool]:
    """Returns the whole prompt, and whether the tokenizer has yet to add its special tokens."""
    text = f"{PREAMBLE} {body} {QUESTION.format(key=key)}"
    prefix = ANSWER_PREFIX.format(key=key)
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return f"{chat}{prefix}", False
    return f"{text} {prefix}", True


def _fill(
    render: Callable[[int], tuple[str, list[int]]], budget: int, task: NeedleTask, length: int
) -> tuple[str, list[int]]:
    """Finds the largest haystack whose prompt fits the budget."""
    prompt, ids = render(0)
    frame = len(ids)
    if frame > budget:
        raise ValueError(
            f"length: expected at least {frame + task.answer_room} tokens for task {task.name!r} "
            f"with this tokenizer, got {length}"
        )
    fits, best = 0, (prompt, ids)
    too_many = budget - frame + 1  # a word is at least one token
    guess = too_many - 1
    while too_many - fits > 1:
        candidate = render(guess)
        used = len(candidate[1])
        if used > budget:
            too_many = guess
        else:
            fits, best = guess, candidate
        if used == budget:
            break
        per_word = max(1.0, (used - frame) / guess)
        step = fits + int((budget - len(best[1])) / per_word)
        guess = min(max(step, fits + 1), too_many - 1)
    if len(best[1]) < budget - MAX_SHORTFALL * length:
        raise ValueError(
            f"length: expected a haystack of words under {MAX_SHORTFALL * length:.0f} tokens, "
            f"got one longer in {task.haystack!r}; ask for a longer prompt or another text"
        )
    return best
