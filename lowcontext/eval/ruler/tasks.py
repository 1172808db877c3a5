"""The 13 tasks of RULER (arXiv 2404.06654, table 5), and their samples."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lowcontext.eval.haystack import HAYSTACKS, file_label, haystack_label, haystack_words
from lowcontext.eval.prompt import Rendered, Room, fill, fit_frame, tokenize
from lowcontext.eval.ruler import puzzles
from lowcontext.eval.ruler.documents import read_collection
from lowcontext.eval.ruler.puzzles import NeedleKind, Puzzle
from lowcontext.eval.scoring import any_found, share_found


@dataclass(frozen=True)
class Sources:
    """Where the text of the tasks comes from.

    Attributes:
        haystack: Haystack of the tasks that RULER hides in essays: ``"words"``, ``"noise"``,
            ``"wonderwords"`` or a text file.
        squad: JSON file for ``qa_1``, in the format of SQuAD.
        hotpot: JSON file for ``qa_2``, in the format of HotpotQA.
    """

    haystack: str = HAYSTACKS[0]
    squad: str | None = None
    hotpot: str | None = None


@dataclass(frozen=True)
class RulerTask:
    """One task.

    Attributes:
        answer_room: Most tokens to generate, as in RULER.
        source: ``"noise"``, ``"needles"``, ``"made up"``, or the field of ``Sources`` it reads.
        build: Makes a puzzle from (length, seed, random numbers, source).
        score: The metric.
    """

    answer_room: int
    source: str
    build: Callable[[int, int, random.Random, str], Puzzle]
    score: Callable[[str, Sequence[str]], float] = share_found


@dataclass(frozen=True)
class RulerSample:
    """One prompt with its references.

    Attributes:
        prompt: The text, chat template included.
        input_ids: The prompt's tokens; with the answer room at most the asked length.
        answers: The references.
    """

    prompt: str
    input_ids: list[int]
    answers: list[str]


def _needles(**options: Any) -> RulerTask:
    kind = NeedleKind(**options)
    source = "haystack" if kind.hay == "text" else kind.hay
    return RulerTask(128, source, lambda _l, _s, rng, text: puzzles.needles(kind, text, rng))


def _questions(form: str) -> RulerTask:
    def build(length: int, seed: int, rng: random.Random, source: str) -> Puzzle:
        found = read_collection(source, form)
        asked = random.Random(0).sample(found.questions, len(found.questions))
        question = asked[seed % len(asked)]
        return puzzles.questions(question, found.others(question), rng)

    return RulerTask(32, form, build, any_found)


TASKS = MappingProxyType(
    {
        "niah_single_1": _needles(hay="noise"),
        "niah_single_2": _needles(),
        "niah_single_3": _needles(value="code"),
        "niah_multikey_1": _needles(keys=4),
        "niah_multikey_2": _needles(hay="needles"),
        "niah_multikey_3": _needles(hay="needles", key="code", value="code"),
        "niah_multivalue": _needles(values=4),
        "niah_multiquery": _needles(keys=4, asked=4),
        "vt": RulerTask(30, "noise", lambda _l, _s, rng, _t: puzzles.tracing(4, rng)),
        "cwe": RulerTask(120, "made up", lambda n, _s, rng, _t: puzzles.common_words(n, rng)),
        "fwe": RulerTask(50, "made up", lambda _l, _s, rng, _t: puzzles.frequent_words(rng)),
        "qa_1": _questions("squad"),
        "qa_2": _questions("hotpot"),
    }
)


def available_tasks(sources: Sources) -> tuple[str, ...]:
    """Returns the tasks that these sources allow: all but the questions whose file is missing."""
    return tuple(name for name in TASKS if source_of(name, sources) is not None)


def source_of(task: str, sources: Sources) -> str | None:
    """Returns where a task's text comes from, None if the file it needs was not given."""
    if task not in TASKS:
        raise ValueError(f"tasks: expected one of {', '.join(TASKS)}, got {task!r}")
    name = TASKS[task].source
    found: str | None = getattr(sources, name) if hasattr(sources, name) else name
    return found


def source_label(task: str, sources: Sources) -> str:
    """Returns what names a task's source in the rows of a run: of a file its path and digest."""
    source = str(source_of(task, sources))
    if TASKS[task].source == "haystack":
        return haystack_label(source)
    return file_label(source) if hasattr(sources, TASKS[task].source) else source


def make_ruler_sample(
    tokenizer: Any, task: str, *, length: int, seed: int, sources: Sources | None = None
) -> RulerSample:
    """Builds the sample that is named by these arguments: the same arguments, the same sample.

    Args:
        tokenizer: A Hugging Face tokenizer; its chat template is used where it has one.
        task: One of ``TASKS``.
        length: Tokens of prompt and answer room together.
        seed: Seed of everything drawn.
        sources: Files and haystack; default: made-up words.

    Returns:
        A sample whose prompt and answer room fill ``length`` to within 1%, never over it.

    Raises:
        ValueError: If the task is unknown, lacks its file, or does not fit into ``length``.
    """
    puzzle, room, render = _drawn(tokenizer, task, length, seed, sources or Sources())
    words, prompt, ids = fill(render, room, coarse=puzzle.coarse)
    if puzzle.coarse:
        _, prompt, ids = fill(lambda noise: render(words, noise), room)
    return RulerSample(prompt, ids, puzzle.answers)


def check_length(
    tokenizer: Any, task: str, *, length: int, seed: int, sources: Sources | None = None
) -> None:
    """Refuses a length that a sample's frame does not fit, before anything is run.

    Raises:
        ValueError: As ``make_ruler_sample``.
    """
    _, room, render = _drawn(tokenizer, task, length, seed, sources or Sources())
    fit_frame(render, room)


def _drawn(
    tokenizer: Any, task: str, length: int, seed: int, sources: Sources
) -> tuple[Puzzle, Room, Callable[..., Rendered]]:
    """What a sample hides and asks, its room, and its prompt around so many words (and noise)."""
    source = source_of(task, sources)
    kind = TASKS[task]
    if source is None:
        raise ValueError(f"tasks: expected --{kind.source} FILE with task {task!r}, got none")
    rng = random.Random(f"{task}|{source}|{length}|{seed}")
    puzzle = kind.build(length, seed, rng, source)

    def render(words: int, noise: int = 0) -> Rendered:
        padding = [" ".join(haystack_words("noise", noise, rng))] if noise else []
        parts = [puzzle.preamble, puzzle.body(words), *padding, puzzle.question]
        return tokenize(tokenizer, " ".join(parts), puzzle.prefix)

    return puzzle, Room(length, kind.answer_room, task, source), render
