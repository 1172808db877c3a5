"""Rows put together: accuracy, density and times per method, task, haystack and length."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean, median

from lowcontext.eval.records import NeedleRow
from lowcontext.eval.scoring import wilson_interval


@dataclass(frozen=True)
class SummaryRow:
    """One line of the table of results.

    Attributes:
        method: Label of the rows.
        task: Task of the rows.
        haystack: Haystack of the rows.
        length: Asked length, or None for all lengths together.
        samples: Number of prompts.
        correct: Number of right answers.
        accuracy: Their share.
        low: Lower end of its 95% Wilson interval.
        high: Upper end of its 95% Wilson interval.
        density: Mean density of prefill, None if no row has one.
        density_decode: Mean density of decode.
        ttft_s: Median time to first token, in seconds.
        tpot_s: Median time per output token, in seconds, None if no row has one.
    """

    method: str
    task: str
    haystack: str
    length: int | None
    samples: int
    correct: int
    accuracy: float
    low: float
    high: float
    density: float | None
    density_decode: float | None
    ttft_s: float
    tpot_s: float | None


def summarize(rows: Iterable[NeedleRow], *, by_length: bool = True) -> list[SummaryRow]:
    """Groups rows into the lines of a table.

    Args:
        rows: Rows of any number of runs.
        by_length: One line per length, or one for all of them.

    Returns:
        Lines by task and haystack, then by length, then by method in order of first appearance.
    """
    groups: dict[tuple[str, str, int | None, str], list[NeedleRow]] = {}
    for row in rows:
        length = row.length if by_length else None
        groups.setdefault((row.task, row.haystack, length, row.method), []).append(row)
    order = {key: place for place, key in enumerate(groups)}
    keys = sorted(groups, key=lambda key: (key[0], key[1], key[2] or 0, order[key]))
    return [_line(groups[key], key[2]) for key in keys]


def _line(rows: list[NeedleRow], length: int | None) -> SummaryRow:
    correct = sum(row.correct for row in rows)
    low, high = wilson_interval(correct, len(rows))
    return SummaryRow(
        method=rows[0].method,
        task=rows[0].task,
        haystack=rows[0].haystack,
        length=length,
        samples=len(rows),
        correct=correct,
        accuracy=correct / len(rows),
        low=low,
        high=high,
        density=over_known(fmean, [row.density for row in rows]),
        density_decode=over_known(fmean, [row.stats.get("density_decode") for row in rows]),
        ttft_s=median(row.ttft_s for row in rows),
        tpot_s=over_known(median, [row.tpot_s for row in rows]),
    )


def over_known(
    average: Callable[[list[float]], float], values: Iterable[float | None]
) -> float | None:
    """The average of the values that are known, None where none is."""
    known = [value for value in values if value is not None]
    return average(known) if known else None
