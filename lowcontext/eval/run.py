"""Runs the needle task on a model and records every answer with its times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowcontext._fingerprint import model_label
from lowcontext.eval.generation import Answerer, Stats, check_counts, check_model
from lowcontext.eval.haystack import HAYSTACKS, haystack_label
from lowcontext.eval.identity import Described, describe
from lowcontext.eval.needle import NeedleSample, NeedleTask, check_length, make_sample
from lowcontext.eval.records import NeedleRow, RowFile, RowKey, recorded
from lowcontext.eval.scoring import contains_all, exact_match

METRICS = ("contains", "exact")

Progress = Callable[[int, int, NeedleRow], None]
Cell = tuple[int, float, int]  # length, depth, sample


@dataclass(frozen=True)
class NeedleGrid:
    """Which prompts to run: ``samples`` for every length and depth.

    Attributes:
        lengths: Tokens of prompt and answer room.
        depths: Depths of the needle in percent, 0 (start) to 100 (end).
        samples: Prompts per length and depth; sample i uses seed ``seed + i``.
        task: ``"single"``, ``"multikey"``, ``"several:COUNT"`` or ``"thread:COUNT"``.
        haystack: ``"words"``, ``"noise"``, ``"wonderwords"`` or the path of a text file.
        seed: Seed of the first sample.
        answer_room: Most tokens to generate.
        chunk: Prefill in chunks of so many tokens; None for one pass.
        metric: ``"contains"`` (the answer stands in the output) or ``"exact"`` (it is the output).
        limit: Most prompts, the first of the grid; None for all.
    """

    lengths: tuple[int, ...] = (1024, 4096, 16384)
    depths: tuple[float, ...] = (0.0, 25.0, 50.0, 75.0, 100.0)
    samples: int = 1
    task: str = "single"
    haystack: str = HAYSTACKS[0]
    seed: int = 0
    answer_room: int = 16
    chunk: int | None = None
    metric: str = METRICS[0]
    limit: int | None = None

    def __post_init__(self) -> None:
        check_counts(self.lengths, self.samples, chunk=self.chunk, limit=self.limit)
        if not self.depths:
            raise ValueError("depths: expected at least one value, got none")
        for depth in self.depths:
            if not 0 <= depth <= 100:
                raise ValueError(f"depths: expected 0..100 (percent), got {depth}")
        if self.metric not in METRICS:
            raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {self.metric!r}")
        _ = self.kind  # refuses a wrong one

    @property
    def kind(self) -> NeedleTask:
        """What is asked of every sample."""
        return NeedleTask(self.task, self.haystack, self.answer_room)

    def cells(self) -> list[Cell]:
        """Returns every (length, depth, sample) in the order they run."""
        cells = [
            (int(length), float(depth), sample)
            for length in self.lengths
            for depth in self.depths
            for sample in range(self.samples)
        ]
        return cells[: self.limit]


def run_needle(
    model: Any,
    tokenizer: Any,
    grid: NeedleGrid,
    *,
    method: str | Described = "dense",
    out: str | Path | None = None,
    stats: Stats | None = None,
    progress: Progress | None = None,
) -> Iterator[NeedleRow]:
    """Runs a grid of needle prompts through ``model.generate``, greedily.

    TTFT is the time from the call of ``generate`` until the logits of the first token are there;
    TPOT is the mean time from one token's logits to the next one's. A GPU is waited for at each
    of them. A short untimed generation comes first.

    Args:
        model: A Hugging Face causal LM, patched or not.
        tokenizer: Its tokenizer.
        grid: The prompts.
        method: What the model was patched with, a Method or anything with a label and settings; a
            text is a label that stands for itself.
        out: JSONL file to append to. Rows already in it are not run again.
        stats: Called after every sample (and after the warm-up); its ``"density"`` and
            anything else it returns is kept with the row.
        progress: Called with (rows done, rows in all, row) after every row.

    Returns:
        An iterator of all rows in the order of the grid, the ones found in ``out`` included.
        Nothing runs until it is read.

    Raises:
        ValueError: If a length exceeds the model's positions or has no room for a prompt, if the
            tokenizer has no end-of-sequence token, or if ``out`` cannot be written or has
            rows of that label with other settings.
    """
    check_model(model, tokenizer, max(grid.lengths))
    for length, depth, sample in grid.cells():
        check_length(tokenizer, grid.kind, length=length, depth=depth, seed=grid.seed + sample)
    runner = _Runner(model, tokenizer, grid, method, stats)
    book = RowFile(out, NeedleRow, method) if out is not None else None
    return _report(
        recorded(grid.cells(), runner.key, runner.run, book), len(grid.cells()), progress
    )


def _report(
    rows: Iterator[NeedleRow], total: int, progress: Progress | None
) -> Iterator[NeedleRow]:
    for done, row in enumerate(rows, start=1):
        if progress:
            progress(done, total, row)
        yield row


class _Runner:
    """One model on one grid."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        grid: NeedleGrid,
        method: str | Described,
        stats: Stats | None,
    ) -> None:
        self.tokenizer, self.grid = tokenizer, grid
        self.method, self.settings = describe(method)
        self.name, self.haystack = model_label(model), haystack_label(grid.haystack)
        self.answerer = Answerer(model, tokenizer, grid.chunk, stats)

    def key(self, cell: Cell) -> RowKey:
        length, depth, sample = cell
        grid = self.grid
        place = (length, depth, sample, grid.seed + sample)
        how = (grid.answer_room, grid.chunk, grid.metric)
        return (self.name, self.method, grid.task, self.haystack, *place, *how)

    def run(self, cell: Cell) -> NeedleRow:
        length, depth, sample = cell
        grid = self.grid
        seed = grid.seed + sample
        prompt = make_sample(self.tokenizer, grid.kind, length=length, depth=depth, seed=seed)
        answer = self.answerer.answer(prompt.input_ids, grid.answer_room)
        return NeedleRow(
            model=self.name,
            method=self.method,
            settings=self.settings,
            task=grid.task,
            haystack=self.haystack,
            length=length,
            depth=depth,
            sample=sample,
            seed=seed,
            answer_room=grid.answer_room,
            chunk=grid.chunk,
            metric=grid.metric,
            prompt_tokens=len(prompt.input_ids),
            expected=prompt.expected,
            output=answer.text,
            correct=self._correct(answer.text, prompt),
            ttft_s=answer.ttft_s,
            tpot_s=answer.tpot_s,
            new_tokens=answer.new_tokens,
            density=answer.stats.pop("density", None),
            stats=answer.stats,
        )

    def _correct(self, output: str, prompt: NeedleSample) -> bool:
        if self.grid.metric == "exact":
            return exact_match(output, prompt.expected)
        return contains_all(output, prompt.answers)
