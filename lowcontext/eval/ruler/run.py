"""Runs the RULER suite on a model and records every answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowcontext._fingerprint import model_label
from lowcontext.eval.generation import Answerer, Stats, check_counts, check_model
from lowcontext.eval.identity import Described, describe
from lowcontext.eval.records import RowFile, RowKey, RulerRow, recorded
from lowcontext.eval.ruler.tasks import (
    TASKS,
    Sources,
    available_tasks,
    check_length,
    make_ruler_sample,
    source_label,
    source_of,
)

Cell = tuple[int, str, int]  # length, task, sample


@dataclass(frozen=True)
class RulerRun:
    """Which prompts to run: ``samples`` for every length and task.

    Attributes:
        lengths: Tokens of prompt and answer room.
        tasks: Names out of ``TASKS``; empty for all that ``sources`` allow.
        samples: Prompts per length and task; sample i uses seed ``seed + i``.
        sources: Haystack and files.
        seed: Seed of the first sample.
        chunk: Prefill in chunks of so many tokens; None for one pass.
        limit: Most prompts, the first of the run; None for all.
    """

    lengths: tuple[int, ...] = (4096,)
    tasks: tuple[str, ...] = ()
    samples: int = 5
    sources: Sources = field(default_factory=Sources)
    seed: int = 0
    chunk: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        check_counts(self.lengths, self.samples, chunk=self.chunk, limit=self.limit)
        for task in self.tasks:
            if source_of(task, self.sources) is None:
                needed = TASKS[task].source
                raise ValueError(f"tasks: expected --{needed} FILE with task {task!r}, got none")

    def cells(self) -> list[Cell]:
        """Returns every (length, task, sample) in the order they run."""
        tasks = self.tasks or available_tasks(self.sources)
        cells = [
            (length, task, sample)
            for length in self.lengths
            for task in tasks
            for sample in range(self.samples)
        ]
        return cells[: self.limit]


def run_ruler(
    model: Any,
    tokenizer: Any,
    run: RulerRun,
    *,
    method: str | Described = "dense",
    out: str | Path | None = None,
    stats: Stats | None = None,
) -> Iterator[RulerRow]:
    """Runs the prompts through ``model.generate``, greedily; times are taken as in ``run_needle``.

    Args:
        model: A Hugging Face causal LM, patched or not.
        tokenizer: Its tokenizer.
        run: The prompts.
        method: What the model was patched with, a Method or anything with a label and settings; a
            text is a label that stands for itself.
        out: JSONL file to append to. Rows already in it are not run again.
        stats: Called after every sample (and after the warm-up); its ``"density"`` and
            anything else it returns is kept with the row.

    Returns:
        An iterator of all rows in the order of ``run.cells()``, the ones found in ``out`` included.
        Nothing runs until it is read.

    Raises:
        ValueError: If a length exceeds the model's positions or has no room for a sample, if the
            tokenizer has no end-of-sequence token, or if ``out`` cannot be written or has rows of
            that label with other settings.
    """
    check_model(model, tokenizer, max(run.lengths))
    for length, task, sample in run.cells():
        seed = run.seed + sample
        check_length(tokenizer, task, length=length, seed=seed, sources=run.sources)
    runner = _Runner(model, tokenizer, run, method, stats)
    book = RowFile(out, RulerRow, method) if out is not None else None
    return recorded(run.cells(), runner.key, runner.run_cell, book)


class _Runner:
    """One model on one suite."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        run: RulerRun,
        method: str | Described,
        stats: Stats | None,
    ) -> None:
        self.tokenizer, self.run = tokenizer, run
        self.method, self.settings = describe(method)
        self.name = model_label(model)
        tasks = dict.fromkeys(task for _, task, _ in run.cells())
        self.labels = {task: source_label(task, run.sources) for task in tasks}
        self.answerer = Answerer(model, tokenizer, run.chunk, stats)

    def key(self, cell: Cell) -> RowKey:
        length, task, sample = cell
        place = (self.labels[task], length, sample, self.run.seed + sample)
        return (self.name, self.method, task, *place, self.run.chunk)

    def run_cell(self, cell: Cell) -> RulerRow:
        length, task, sample = cell
        seed, sources = self.run.seed + sample, self.run.sources
        prompt = make_ruler_sample(self.tokenizer, task, length=length, seed=seed, sources=sources)
        answer = self.answerer.answer(prompt.input_ids, TASKS[task].answer_room)
        return RulerRow(
            model=self.name,
            method=self.method,
            settings=self.settings,
            task=task,
            source=self.labels[task],
            length=length,
            sample=sample,
            seed=seed,
            chunk=self.run.chunk,
            prompt_tokens=len(prompt.input_ids),
            answers=prompt.answers,
            output=answer.text,
            score=TASKS[task].score(answer.text, prompt.answers),
            ttft_s=answer.ttft_s,
            tpot_s=answer.tpot_s,
            new_tokens=answer.new_tokens,
            peak_mib=answer.peak_mib,
            density=answer.stats.pop("density", None),
            stats=answer.stats,
        )
