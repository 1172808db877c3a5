"""Perplexity of a model on a local text, window by window and by position in the window."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lowcontext._fingerprint import model_label
from lowcontext.eval.generation import Stats, check_counts, check_model
from lowcontext.eval.identity import Described, Settings, describe
from lowcontext.eval.records import RowFile, RowKey, read_any, recorded
from lowcontext.eval.scoring import mean_interval
from lowcontext.eval.summary import over_known

FIRST_BUCKET = 1024
BASELINE = "dense"


@dataclass(frozen=True)
class PerplexityRun:
    """Which windows of a text to score.

    Window w starts at token ``w * stride`` and has ``length`` tokens. The first window scores every
    token but its first, a later one its last ``stride`` tokens: so every token of the text is
    scored once, with the context that the window holds.

    Attributes:
        text: A UTF-8 file.
        length: Tokens of a window.
        stride: Tokens from one window to the next; None for windows that do not overlap.
        windows: Most windows to score; None for all that fit.
        decode: The last so many tokens of a window are fed one by one, as generation would, and
            only they are scored; 0 scores the window as a prompt.
        chunk: Prefill in chunks of so many tokens, behind a cache; None for one pass.
    """

    text: str
    length: int = 4096
    stride: int | None = None
    windows: int | None = None
    decode: int = 0
    chunk: int | None = None

    def __post_init__(self) -> None:
        windows = 1 if self.windows is None else self.windows
        check_counts((self.length,), windows, chunk=self.chunk)
        if not 1 <= self.step <= self.length:
            raise ValueError(f"stride: expected 1..{self.length} (the length), got {self.stride}")
        if not 0 <= self.decode < self.length:
            raise ValueError(f"decode: expected 0..{self.length - 1}, got {self.decode}")

    @property
    def step(self) -> int:
        """Tokens from one window to the next."""
        return self.length if self.stride is None else self.stride


@dataclass(frozen=True)
class PerplexityRow:
    """One window under one method.

    Attributes:
        model: Folder that the model was loaded from, its dtype and a digest of its weights.
        method: Label of what the model ran under.
        settings: All settings of it; see ``NeedleRow``.
        text: The file.
        digest: First digits of the SHA-256 of its text.
        length: Tokens of the window.
        stride: Tokens from one window to the next.
        decode: Tokens that were fed one by one.
        chunk: Tokens of a prefill chunk; None for one pass.
        window: Number of the window.
        tokens: Tokens scored.
        nll: Their mean negative log-likelihood, in nats.
        buckets: Position in the window at which a bucket starts -> [tokens, sum of nats].
        seconds: Time of the forward passes.
        density: Share of the causal pairs that was computed, if the caller told.
        stats: Whatever else the caller's ``stats`` returned.
    """

    model: str
    method: str
    settings: Settings | None
    text: str
    digest: str
    length: int
    stride: int
    decode: int
    chunk: int | None
    window: int
    tokens: int
    nll: float
    buckets: dict[str, list[float]]
    seconds: float
    density: float | None
    stats: dict[str, float]

    @property
    def key(self) -> RowKey:
        """What names the row: two rows with one key are one measurement made twice."""
        settings = (self.length, self.stride, self.decode, self.chunk, self.window)
        return (self.model, self.method, self.text, self.digest, *settings)


@dataclass(frozen=True)
class PerplexitySummary:
    """One line of the table.

    Attributes:
        method: Label of the rows.
        length: Tokens of a window.
        windows: Their number.
        tokens: Tokens scored.
        perplexity: exp of the mean negative log-likelihood of all tokens.
        difference: Mean over windows of the nats per token, less those of dense on the same ones.
        difference_low: Lower end of its 95% interval; None with one window.
        difference_high: Upper end.
        density: Mean density of prefill.
        density_decode: Mean density of decode, None if no row has one.
        buckets: Position at which a bucket starts -> perplexity there.
        nats: Number of a window -> its nats per token.
        gaps: Number of a window -> its nats per token less those of dense; without the windows that
            dense was not run on, empty for dense itself.
    """

    method: str
    length: int
    windows: int
    tokens: int
    perplexity: float
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    density: float | None
    density_decode: float | None
    buckets: dict[int, float]
    nats: dict[int, float]
    gaps: dict[int, float]


def run_perplexity(
    model: Any,
    tokenizer: Any,
    run: PerplexityRun,
    *,
    method: str | Described = BASELINE,
    out: str | Path | None = None,
    stats: Stats | None = None,
) -> Iterator[PerplexityRow]:
    """Scores the windows of a text.

    Args:
        model: A Hugging Face causal LM, patched or not.
        tokenizer: Its tokenizer.
        run: The windows.
        method: What the model was patched with, a Method or anything with a label and settings; a
            text is a label that stands for itself.
        out: JSONL file to append to. Rows already in it are not run again.
        stats: Called after every window; its ``"density"`` and anything else it returns is kept.

    Returns:
        An iterator of all rows, the ones found in ``out`` included. Nothing runs until it is read.

    Raises:
        ValueError: If the text is missing or too short, if the length exceeds the model's
            positions, or if ``out`` cannot be written or has rows of that label with other
            settings.
    """
    check_model(model, tokenizer, run.length)
    scorer = _Scorer(model, tokenizer, run, method, stats)
    book = RowFile(out, PerplexityRow, method) if out is not None else None
    return recorded(range(scorer.count), scorer.key, scorer.score, book)


def window_count(tokenizer: Any, run: PerplexityRun) -> int:
    """Returns how many windows a run has.

    Raises:
        ValueError: If the text is missing or shorter than a window.
    """
    return _windows(len(_tokens(tokenizer, run)[0]), run)


def read_perplexity_rows(paths: str | Path | Iterable[str | Path]) -> list[PerplexityRow]:
    """Reads the rows of one or several JSONL files, as ``read_rows`` does."""
    return read_any(paths, PerplexityRow)


def summarize_perplexity(rows: Iterable[PerplexityRow]) -> list[PerplexitySummary]:
    """Groups rows into the lines of a table: all windows that differ in nothing but their number.

    Args:
        rows: Rows of any number of methods; dense is the method labelled ``"dense"``.

    Returns:
        Lines by length, then in order of first appearance.
    """
    groups: dict[RowKey, list[PerplexityRow]] = {}
    for row in rows:
        groups.setdefault(row.key[:-1], []).append(row)
    baseline = {
        _window(row): row.nll for part in groups.values() for row in part if row.method == BASELINE
    }
    order = sorted(groups.values(), key=lambda part: part[0].length)
    return [_line(part, baseline) for part in order]


def _window(row: PerplexityRow) -> RowKey:
    """What is scored, by whatever method."""
    return (row.model, *row.key[2:])


def _line(rows: list[PerplexityRow], baseline: dict[RowKey, float]) -> PerplexitySummary:
    tokens = sum(row.tokens for row in rows)
    gaps = {
        row.window: row.nll - baseline[_window(row)]
        for row in rows
        if row.method != BASELINE and _window(row) in baseline
    }
    values = list(gaps.values())
    low, high = mean_interval(values) if len(values) > 1 else (None, None)
    sums: dict[int, list[float]] = {}
    for row in rows:
        for start, (count, nats) in row.buckets.items():
            total = sums.setdefault(int(start), [0.0, 0.0])
            total[0] += count
            total[1] += nats
    return PerplexitySummary(
        method=rows[0].method,
        length=rows[0].length,
        windows=len(rows),
        tokens=tokens,
        perplexity=_exp(sum(row.nll * row.tokens for row in rows) / tokens),
        difference=fmean(values) if gaps else None,
        difference_low=low,
        difference_high=high,
        density=over_known(fmean, [row.density for row in rows]),
        density_decode=over_known(fmean, [row.stats.get("density_decode") for row in rows]),
        buckets={start: _exp(sums[start][1] / sums[start][0]) for start in sorted(sums)},
        nats={row.window: row.nll for row in rows},
        gaps=gaps,
    )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _tokens(tokenizer: Any, run: PerplexityRun) -> tuple[list[int], str]:
    try:
        text = Path(run.text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text: expected a UTF-8 file, got {run.text!r} ({error})") from error
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) < run.length:
        raise ValueError(
            f"text: expected at least {run.length} tokens (a window), got {len(ids)} in "
            f"{run.text!r}; ask for a shorter length or give a longer text"
        )
    return ids, hashlib.sha256(text.encode()).hexdigest()[:12]


def _windows(tokens: int, run: PerplexityRun) -> int:
    fit = (tokens - run.length) // run.step + 1
    return fit if run.windows is None else min(fit, run.windows)


class _Scorer:
    """One model on one text."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        run: PerplexityRun,
        method: str | Described,
        stats: Stats | None,
    ) -> None:
        self.model, self.run, self.stats = model, run, stats
        self.method, self.settings = describe(method)
        self.name = model_label(model)
        self.ids, self.digest = _tokens(tokenizer, run)
        self.count = _windows(len(self.ids), run)

    def key(self, window: int) -> RowKey:
        run = self.run
        settings = (run.length, run.step, run.decode, run.chunk, window)
        return (self.name, self.method, run.text, self.digest, *settings)

    def score(self, window: int) -> PerplexityRow:
        run = self.run
        start = window * run.step
        ids = torch.tensor([self.ids[start : start + run.length]], device=self.model.device)
        begin = time.perf_counter()
        with torch.no_grad():
            nats = self._decoded(ids) if run.decode else self._prompted(ids, window)
        values = nats.tolist()  # waits for the device
        seconds = time.perf_counter() - begin
        buckets: dict[str, list[float]] = {}
        for position, value in enumerate(values, start=run.length - len(values)):
            bucket = buckets.setdefault(str(_bucket(position)), [0, 0.0])
            bucket[0] += 1
            bucket[1] += value
        found = dict(self.stats()) if self.stats else {}
        return PerplexityRow(
            model=self.name,
            method=self.method,
            settings=self.settings,
            text=run.text,
            digest=self.digest,
            length=run.length,
            stride=run.step,
            decode=run.decode,
            chunk=run.chunk,
            window=window,
            tokens=len(values),
            nll=fmean(values),
            buckets=buckets,
            seconds=seconds,
            density=found.pop("density", None),
            stats=found,
        )

    def _prompted(self, ids: torch.Tensor, window: int) -> torch.Tensor:
        """Nats of the window's new tokens, fed as a prompt."""
        last = self.run.length - 1
        first = 0 if window == 0 else max(0, last - self.run.step)
        parts = []
        for end, out in self._prefill(ids, first):
            if end > first:
                logits = out.logits[0]
                targets = ids[0, end - len(logits) + 1 : end + 1]
                parts.append(_nats(logits[: len(targets)], targets))
        return torch.cat(parts)

    def _decoded(self, ids: torch.Tensor) -> torch.Tensor:
        """Nats of the last tokens, each fed alone behind the cache of those before it."""
        split = self.run.length - self.run.decode
        *_, (_, out) = self._prefill(ids[:, :split], split - 1)
        parts = []
        for place in range(split, self.run.length):
            parts.append(_nats(out.logits[0, -1:], ids[0, place : place + 1]))
            if place + 1 < self.run.length:
                step = ids[:, place : place + 1]
                out = self.model(step, past_key_values=out.past_key_values, use_cache=True)
        return torch.cat(parts)

    def _prefill(self, ids: torch.Tensor, first: int) -> Iterator[tuple[int, Any]]:
        """Feeds tokens, all or by chunks; yields each pass's end and output.

        Logits are kept from position `first` on; a pass that ends before it keeps one.
        """
        length = ids.shape[1]
        chunk = self.run.chunk or length
        cached = self.run.chunk is not None or self.run.decode > 0
        cache = None
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            kept = max(1, end - max(start, first))
            part = ids[:, start:end]
            out = self.model(part, past_key_values=cache, use_cache=cached, logits_to_keep=kept)
            cache = out.past_key_values
            yield end, out


def _nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods, float32, a few rows at a time: logits of one row may be 1 MB."""
    rows = 512
    return torch.cat(
        [
            torch.nn.functional.cross_entropy(part.float(), goal, reduction="none")
            for part, goal in zip(logits.split(rows), targets.split(rows), strict=True)
        ]
    )


def _bucket(position: int) -> int:
    """Returns the start of the bucket: 0, 1024, 2048, 4096, ... by doubling."""
    return 0 if position < FIRST_BUCKET else 1 << (position.bit_length() - 1)
