"""Rows of the RULER suite put together, each method beside dense on the same samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from lowcontext.eval.records import RulerRow
from lowcontext.eval.scoring import paired_interval, wilson_interval
from lowcontext.eval.summary import over_known

ALL_TASKS = "all"
BASELINE = "dense"


@dataclass(frozen=True)
class RulerSummary:
    """One line of the table.

    Attributes:
        method: Label of the rows.
        task: Task of the rows; ``"all"`` for all of them together.
        length: Asked length.
        samples: Number of prompts.
        score: Mean score.
        low: Lower end of its 95% Wilson interval.
        high: Upper end of its 95% Wilson interval.
        dense: Mean score of dense on the same prompts, None if no row of dense is there.
        difference: Score less that of dense, over the prompts that both answered.
        difference_low: Lower end of its 95% interval (``paired_interval``).
        difference_high: Upper end.
        density: Mean density of prefill, None if no row has one.
        density_decode: Mean density of decode.
        ttft_s: Median time to first token, in seconds.
        tpot_s: Median time per output token, in seconds.
        peak_mib: Largest peak memory.
    """

    method: str
    task: str
    length: int
    samples: int
    score: float
    low: float
    high: float
    dense: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    density: float | None
    density_decode: float | None
    ttft_s: float
    tpot_s: float | None
    peak_mib: float | None

    @property
    def below(self) -> bool:
        """Whether the whole interval of the difference lies below zero."""
        return self.difference_high is not None and self.difference_high < 0


def summarize_ruler(rows: Iterable[RulerRow]) -> list[RulerSummary]:
    """Groups rows into the lines of a table.

    Args:
        rows: Rows of any number of methods; dense is the method labelled ``"dense"``.

    Returns:
        By length, then task (all together last), then method, in order of first appearance.
    """
    found = list(rows)
    lengths = sorted({row.length for row in found})
    methods = list(dict.fromkeys(row.method for row in found))
    tasks = list(dict.fromkeys(row.task for row in found))
    groups: dict[tuple[int, str, str], list[RulerRow]] = {}
    for row in found:
        groups.setdefault((row.length, row.task, row.method), []).append(row)
        groups.setdefault((row.length, ALL_TASKS, row.method), []).append(row)
    baseline = {_sample(row): row.score for row in found if row.method == BASELINE}
    return [
        _line(groups[length, task, method], task, baseline)
        for length in lengths
        for task in [*tasks, ALL_TASKS]
        for method in methods
        if (length, task, method) in groups
    ]


def _sample(row: RulerRow) -> tuple[object, ...]:
    return (row.model, row.task, row.source, row.length, row.seed, row.chunk)


def _line(
    rows: Sequence[RulerRow], task: str, baseline: dict[tuple[object, ...], float]
) -> RulerSummary:
    total = sum(row.score for row in rows)
    low, high = wilson_interval(total, len(rows))
    pairs = [(row.score, baseline[_sample(row)]) for row in rows if _sample(row) in baseline]
    gaps = [score - dense for score, dense in pairs]
    ends = paired_interval(gaps) if gaps and rows[0].method != BASELINE else (None, None)
    return RulerSummary(
        method=rows[0].method,
        task=task,
        length=rows[0].length,
        samples=len(rows),
        score=total / len(rows),
        low=low,
        high=high,
        dense=fmean(dense for _, dense in pairs) if pairs else None,
        difference=fmean(gaps) if gaps and rows[0].method != BASELINE else None,
        difference_low=ends[0],
        difference_high=ends[1],
        density=over_known(fmean, [row.density for row in rows]),
        density_decode=over_known(fmean, [row.stats.get("density_decode") for row in rows]),
        ttft_s=median(row.ttft_s for row in rows),
        tpot_s=over_known(median, [row.tpot_s for row in rows]),
        peak_mib=over_known(max, [row.peak_mib for row in rows]),
    )
