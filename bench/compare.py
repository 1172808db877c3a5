"""Turns JSONL rows into the Markdown tables of docs/benchmarks.md, or compares two runs.

python -m bench.compare bench/results/cpu-prefill-*.jsonl
python -m bench.compare new.jsonl --against old.jsonl
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bench.run import rows_of

app = typer.Typer(add_completion=False)

COLUMNS = {
    "case": "case",
    "candidate": "what",
    "density": "density",
    "p20_ms": "p20 ms",
    "p50_ms": "p50 ms",
    "p80_ms": "p80 ms",
    "first_ms": "first ms",
    "speedup_over_sdpa": "x SDPA",
    "efficiency": "efficiency",
    "speedup_over_flex": "x Flex",
    "tflops": "TFLOP/s",
    "gb_per_s": "GB/s",
    "matmul_share": "of matmul rate",
    "bandwidth_share": "of bandwidth",
}


@app.command()
def main(
    paths: Annotated[list[Path], typer.Argument(help="JSONL files, or folders of them.")],
    against: Annotated[list[Path] | None, typer.Option(help="An older run of the cases.")] = None,
) -> None:
    """Prints a Markdown table; with --against, the ratio of the medians of two runs."""
    rows = rows_of(_files(paths))
    if not rows:
        raise typer.BadParameter(f"paths: expected JSONL rows, got none in {list(map(str, paths))}")
    print(compare(rows, rows_of(_files(against))) if against else table(rows))


def _files(paths: list[Path]) -> list[Path]:
    return [f for p in paths for f in (sorted(p.glob("*.jsonl")) if p.is_dir() else [p])]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the rows, without the columns that none of them has."""
    shown = {key: title for key, title in COLUMNS.items() if any(r.get(key) for r in rows)}
    lines = [_join(shown.values()), _join("---" for _ in shown)]
    lines += [_join(_cell(row.get(key)) for key in shown) for row in rows]
    places = {(r["device"], r["threads"], r["torch"], r["commit"], r["dirty"]) for r in rows}
    for device, threads, torch, commit, dirty in sorted(places, key=str):
        state = " with local changes" if dirty else ""
        lines.append(f"\n{device}, {threads} threads, torch {torch}, commit {commit}{state}.")
    return "\n".join(lines)


def compare(new: list[dict[str, Any]], old: list[dict[str, Any]]) -> str:
    """Markdown table of new over old medians for the cases that both have."""
    before = {(r["case"], r["candidate"]): r["p50_ms"] for r in old}
    lines = [_join(["case", "what", "old ms", "new ms", "old / new"]), _join(["---"] * 5)]
    for row in new:
        ms = before.get((row["case"], row["candidate"]))
        if ms is not None:
            cells = [row["case"], row["candidate"], ms, row["p50_ms"], ms / row["p50_ms"]]
            lines.append(_join(map(_cell, cells)))
    return "\n".join(lines)


def _join(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    app()
