"""Finished runs side by side, as one HTML page with its pictures inside."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from lowcontext.eval.plots import plot_needle
from lowcontext.eval.records import NeedleRow, RulerRow, read_rows, read_ruler_rows
from lowcontext.eval.ruler.plots import plot_ruler
from lowcontext.eval.ruler.summary import ALL_TASKS, RulerSummary, summarize_ruler
from lowcontext.eval.summary import SummaryRow, summarize

RowT = TypeVar("RowT", NeedleRow, RulerRow)
LineT = TypeVar("LineT", NeedleRow, RulerRow, RulerSummary)

# What rows are made with and no table shows. Averages over two values of it mean nothing.
_UNSHOWN = ("model", "chunk", "answer_room", "metric")

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#1f2933}
body{max-width:76rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}h3{font-size:1rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #e6e8eb;white-space:nowrap}
th{color:#66727f;font-weight:600}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}
td:nth-child(2){white-space:normal;overflow-wrap:anywhere;min-width:9rem;max-width:20rem}
tr.below td{color:#b3541e;font-weight:600}
tr.first td{border-top:2px solid #9aa5b1}
figure{margin:1rem 0}
img{max-width:100%;height:auto}
p{color:#66727f;max-width:46rem}
"""


@dataclass(frozen=True)
class Run:
    """Rows of one file that were made alike.

    Attributes:
        name: Short name that no other run of the report has.
        needle: Its needle rows.
        ruler: Its rows of the RULER suite.
        made: How its rows were made, where a file has rows made otherwise too.
    """

    name: str
    needle: tuple[NeedleRow, ...]
    ruler: tuple[RulerRow, ...]
    made: str = ""

    @property
    def title(self) -> str:
        """The name, and how the rows were made where that is not the same in the whole file."""
        return f"{self.name} ({self.made})" if self.made else self.name


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Reads finished or unfinished runs.

    Args:
        paths: JSONL files, each of needle rows or of RULER rows.

    Returns:
        A run per file; of a file with rows of several models, prefill chunks, answer rooms or
        metrics, a run for each, as NAME#1, NAME#2.

    Raises:
        ValueError: If there is no file, or one is missing, empty or of something else.
    """
    if not paths:
        raise ValueError("runs: expected at least one JSONL file, got none")
    files = [Path(path) for path in paths]
    names = [path.stem for path in files]
    if len(set(names)) < len(names):
        names = [f"{path.resolve().parent.name}/{path.stem}" for path in files]
    if len(set(names)) < len(names):
        names = [str(path) for path in files]
    return [run for path, name in zip(files, names, strict=True) for run in _load(path, name)]


def write_report(runs: Sequence[Run], folder: str | Path) -> Path:
    """Writes the pictures of all runs together, and a page with them and the tables.

    Args:
        runs: The runs; with several of a kind, its methods are named ``run: method``.
        folder: Where to write ``report.html`` and the PNGs; made if missing.

    Returns:
        The path of the page, which needs no other file.

    Raises:
        ValueError: If there are no runs.
    """
    if not runs:
        raise ValueError("runs: expected at least one run, got none")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    several_needle = sum(bool(run.needle) for run in runs) > 1
    several_ruler = sum(bool(run.ruler) for run in runs) > 1
    needle = [_named(row, run, several_needle) for run in runs for row in run.needle]
    ruler = [_named(row, run, several_ruler) for run in runs for row in run.ruler]
    parts = [f"<h1>Evaluation of {html.escape(', '.join(run.title for run in runs))}</h1>"]
    if ruler:
        parts.append("<h2>RULER suite</h2>")
        parts += [_picture(path) for path in plot_ruler(ruler, target)]
        # Each run is compared with its own dense rows.
        lines = [
            _named(line, run, several_ruler) for run in runs for line in summarize_ruler(run.ruler)
        ]
        parts.append(_ruler_tables(lines))
    if needle:
        parts.append("<h2>Needle in a haystack</h2>")
        parts.append(_picture(plot_needle(needle, target / "needle.png")))
        parts.append(_needle_table(summarize(needle)))
    page = target / "report.html"
    page.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Evaluation</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n",
        encoding="utf-8",
    )
    return page


def _named(line: LineT, run: Run, several: bool) -> LineT:
    """The line with the name of its run before that of its method, where there are several."""
    return replace(line, method=f"{run.name}: {line.method}") if several else line


def _load(path: Path, name: str) -> list[Run]:
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
    except OSError as error:
        raise ValueError(f"runs: expected a JSONL file, got {str(path)!r} ({error})") from error
    if not first.endswith("\n"):
        raise ValueError(f"runs: expected at least one row, got none in {str(path)!r}")
    try:
        content = json.loads(first)
    except ValueError as error:
        raise ValueError(f"runs: expected JSON lines in {str(path)!r} ({error})") from error
    if isinstance(content, dict) and {"nll", "mass"} & set(content):
        raise ValueError(
            f"runs: expected rows of needle or ruler in {str(path)!r}, got those of perplexity or "
            "fidelity, which print their tables again when the same command runs again"
        )
    if isinstance(content, dict) and "depth" in content:
        return [Run(part, rows, (), made) for part, rows, made in _alike(name, read_rows(path))]
    return [Run(part, (), rows, made) for part, rows, made in _alike(name, read_ruler_rows(path))]


def _alike(name: str, rows: Sequence[RowT]) -> list[tuple[str, tuple[RowT, ...], str]]:
    """Rows with the same values of what no table shows: their name, they, and those values."""
    groups: dict[tuple[object, ...], list[RowT]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, key, None) for key in _UNSHOWN), []).append(row)
    if len(groups) == 1:
        return [(name, tuple(rows), "")]
    differing = [i for i, values in enumerate(zip(*groups, strict=True)) if len(set(values)) > 1]
    return [
        (f"{name}#{i}", tuple(part), ", ".join(f"{_UNSHOWN[j]}={key[j]}" for j in differing))
        for i, (key, part) in enumerate(groups.items(), start=1)
    ]


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}</figure>"


def _table(head: Sequence[str], body: Sequence[tuple[Sequence[str], str]]) -> str:
    """A table from its head and from (cells, CSS classes) of its rows."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)

    rows = "".join(f'<tr class="{classes}">{cells("td", values)}</tr>' for values, classes in body)
    head_row = f"<tr>{cells('th', head)}</tr>"
    return f'<div class="wide"><table>{head_row}{rows}</table></div>'


def _ruler_tables(lines: Sequence[RulerSummary]) -> str:
    """A table per length: all tasks together, then task by task."""
    note = (
        "<p>diff: score less that of dense on the same prompts of the same run, with its 95% "
        "interval; coloured where all of it lies below zero. read: share of causal pairs in "
        "prefill. decode: share of cached keys, empty where no answer had a second token. Times "
        "are medians.</p>"
    )
    tasks = list(dict.fromkeys(line.task for line in lines if line.task != ALL_TASKS))
    tables = []
    for length in sorted({line.length for line in lines}):
        here = [line for line in lines if line.length == length]
        ordered = [line for task in (ALL_TASKS, *tasks) for line in here if line.task == task]
        tables.append(f"<h3>{length} tokens</h3>{_ruler_table(ordered)}")
    return note + "".join(tables)


def _ruler_table(lines: Sequence[RulerSummary]) -> str:
    head = ("task", "method", "n", "score %", "95%", "diff", "95%")
    costs = ("read", "decode", "TTFT s", "TPOT ms", "peak MiB")
    body = []
    before = ""
    for line in lines:
        classes = ["below"] * line.below + ["first"] * (line.task != before)
        before = line.task
        gap = _number(line.difference, 100, "+.0f")
        low, high = (
            _number(end, 100, "+.0f") for end in (line.difference_low, line.difference_high)
        )
        values = (
            line.task,
            line.method,
            str(line.samples),
            _number(line.score, 100, ".0f"),
            f"{_number(line.low, 100, '.0f')} to {_number(line.high, 100, '.0f')}",
            gap,
            f"{low} to {high}" if gap else "",
            _number(line.density, 100, ".1f", "%"),
            _number(line.density_decode, 100, ".1f", "%"),
            _number(line.ttft_s, 1, ".2f"),
            _number(line.tpot_s, 1e3, ".1f"),
            _number(line.peak_mib, 1, ".0f"),
        )
        body.append((values, " ".join(classes)))
    return _table((*head, *costs), body)


def _needle_table(lines: Sequence[SummaryRow]) -> str:
    head = ("task", "method", "haystack", "tokens", "n", "right %", "95%", "read", "decode")
    body = [
        (
            (
                line.task,
                line.method,
                line.haystack,
                str(line.length),
                str(line.samples),
                _number(line.accuracy, 100, ".0f"),
                f"{_number(line.low, 100, '.0f')} to {_number(line.high, 100, '.0f')}",
                _number(line.density, 100, ".1f", "%"),
                _number(line.density_decode, 100, ".1f", "%"),
                _number(line.ttft_s, 1, ".2f"),
                _number(line.tpot_s, 1e3, ".1f"),
            ),
            "",
        )
        for line in lines
    ]
    return _table((*head, "TTFT s", "TPOT ms"), body)


def _number(value: float | None, factor: float, form: str, unit: str = "") -> str:
    return "" if value is None else f"{factor * value:{form}}{unit}"
