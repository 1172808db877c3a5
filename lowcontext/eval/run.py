"""Runs the needle task on a model and records every answer with its times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowcontext.eval.haystack import HAYSTACKS
from lowcontext.eval.needle import NeedleSample, NeedleTask, make_sample
from lowcontext.eval.records import NeedleRow, RowFile
from lowcontext.eval.scoring import contains_all, exact_match

METRICS = ("contains", "exact")
WARMUP_TOKENS = 256

Stats = Callable[[], Mapping[str, float]]
Progress = Callable[[int, int, NeedleRow], None]


@dataclass(frozen=True)
class NeedleGrid:
    """Which prompts to run: ``samples`` for every length and depth.

    Attributes:
        lengths: Tokens of prompt and answer room.
        depths: Depths of the needle in percent, 0 (start) to 100 (end).
        samples: Prompts per length and depth; sample i uses seed ``seed + i``.
        task: ``"single"`` or ``"multikey"``.
        haystack: ``"words"``, ``"noise"`` or the path of a text file.
        seed: Seed of the first sample.
        answer_room: Most tokens to generate.
        chunk: Prefill in chunks of so many tokens; None for one pass.
        metric: ``"contains"`` (the answer stands in the output) or ``"exact"`` (it is the output).
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

    def __post_init__(self) -> None:
        for name in ("lengths", "depths"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one value, got none")
        for depth in self.depths:
            if not 0 <= depth <= 100:
                raise ValueError(f"depths: expected 0..100 (percent), got {depth}")
        for length in self.lengths:
            if length < 1:
                raise ValueError(f"lengths: expected 1 or more, got {length}")
        if self.samples < 1:
            raise ValueError(f"samples: expected 1 or more, got {self.samples}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk: expected 1 or more, or None, got {self.chunk}")
        if self.metric not in METRICS:
            raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {self.metric!r}")
        NeedleTask(self.task, self.haystack, self.answer_room)

    def cells(self) -> list[tuple[int, float, int]]:
        """Returns every (length, depth, sample) in the order they run."""
        return [
            (int(length), float(depth), sample)
            for length in self.lengths
            for depth in self.depths
            for sample in range(self.samples)
        ]


def run_needle(
    model: Any,
    tokenizer: Any,
    grid: NeedleGrid,
    *,
    method: str = "dense",
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
        method: Label of the rows.
        out: JSONL file to append to. Rows already in it are not run again.
        stats: Called after every sample (and after the warm-up); its ``"density"`` and
            anything else it returns is kept with the row.
        progress: Called with (rows done, rows in all, row) after every row.

    Returns:
        An iterator of all rows in the order of the grid, the ones found in ``out`` included.
        Nothing runs until it is read.

    Raises:
        ValueError: If a length exceeds the model's positions, if the tokenizer has no
            end-of-sequence token, or if ``out`` cannot be written.
    """
    _check(model, tokenizer, grid)
    book = RowFile(out) if out is not None else None
    return _rows(_Runner(model, tokenizer, grid, method, stats), book, progress)


def _rows(runner: _Runner, book: RowFile | None, progress: Progress | None) -> Iterator[NeedleRow]:
    cells = runner.grid.cells()
    known = book.rows if book else {}
    for done, cell in enumerate(cells, start=1):
        row = known.get(runner.key(*cell))
        if row is None:
            row = runner.run(*cell)
            if book:
                book.append(row)
        if progress:
            progress(done, len(cells), row)
        yield row


class TokenClock:
    """A logits processor that changes nothing and notes when each token's logits are there.

    A streamer would not do: transformers may hand tokens to it one step late.
    """

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[0, 0].item()  # waits for the device
        self.times.append(time.perf_counter())
        return scores


class _Runner:
    """One model on one grid."""

    def __init__(
        self, model: Any, tokenizer: Any, grid: NeedleGrid, method: str, stats: Stats | None
    ) -> None:
        self.model, self.tokenizer, self.grid = model, tokenizer, grid
        self.method, self.stats = method, stats
        self.name = str(getattr(model, "name_or_path", ""))
        self.warm = False

    def key(self, length: int, depth: float, sample: int) -> tuple[Any, ...]:
        grid = self.grid
        place = (length, depth, sample, grid.seed + sample)
        how = (grid.answer_room, grid.chunk, grid.metric)
        return (self.name, self.method, grid.task, grid.haystack, *place, *how)

    def run(self, length: int, depth: float, sample: int) -> NeedleRow:
        grid = self.grid
        seed = grid.seed + sample
        task = NeedleTask(grid.task, grid.haystack, grid.answer_room)
        prompt = make_sample(self.tokenizer, task, length=length, depth=depth, seed=seed)
        if not self.warm:
            self._generate(prompt.input_ids[:WARMUP_TOKENS], max_new_tokens=2)
            self._read_stats()
            self.warm = True
        tokens, times = self._generate(prompt.input_ids, max_new_tokens=grid.answer_room)
        stats = self._read_stats()
        output = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        steps = len(times) - 2
        return NeedleRow(
            model=self.name,
            method=self.method,
            task=grid.task,
            haystack=grid.haystack,
            length=length,
            depth=depth,
            sample=sample,
            seed=seed,
            answer_room=grid.answer_room,
            chunk=grid.chunk,
            metric=grid.metric,
            prompt_tokens=len(prompt.input_ids),
            expected=prompt.expected,
            output=output,
            correct=self._correct(output, prompt),
            ttft_s=times[1] - times[0],
            tpot_s=(times[-1] - times[1]) / steps if steps else None,
            new_tokens=len(tokens),
            density=stats.pop("density", None),
            stats=stats,
        )

    def _correct(self, output: str, prompt: NeedleSample) -> bool:
        if self.grid.metric == "exact":
            return exact_match(output, prompt.expected)
        return contains_all(output, [prompt.expected])

    def _generate(self, ids: list[int], *, max_new_tokens: int) -> tuple[list[int], list[float]]:
        """Returns the new tokens, and the times of the start and of each of them."""
        input_ids = torch.tensor([ids], device=self.model.device)
        eos = self.model.generation_config.eos_token_id
        options: dict[str, Any] = {
            "eos_token_id": self.tokenizer.eos_token_id if eos is None else eos
        }
        pad = self.tokenizer.pad_token_id
        options["pad_token_id"] = self.tokenizer.eos_token_id if pad is None else pad
        if self.grid.chunk is not None:
            options["prefill_chunk_size"] = self.grid.chunk
        clock = TokenClock()
        output = self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            logits_processor=[clock],
            **options,
        )
        return output[0, len(ids) :].tolist(), clock.times

    def _read_stats(self) -> dict[str, float]:
        return dict(self.stats()) if self.stats else {}


def _check(model: Any, tokenizer: Any, grid: NeedleGrid) -> None:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    limit = getattr(config or model.config, "max_position_embeddings", None)
    longest = max(grid.lengths)
    if limit is not None and longest > limit:
        raise ValueError(
            f"lengths: expected at most {limit} (the model's max_position_embeddings), "
            f"got {longest}; drop it, or load the model with RoPE scaling that reaches it"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer: expected one with an end-of-sequence token, got none; "
            "set tokenizer.eos_token to the token that ends an answer"
        )
