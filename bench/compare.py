"""Turns JSONL rows into the Markdown tables of docs/benchmarks.md, or compares two runs.

python -m bench.compare bench/results/cpu-prefill-*.jsonl
python -m bench.compare new.jsonl --against old.jsonl
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.run import rows_of

app = typer.Typer(add_completion=False)
Row = dict[str, Any]

COLUMNS = {
    "case": "case",
    "candidate": "what",
    "density": "density",
    "p20_ms": "p20 ms",
    "p50_ms": "p50 ms",
    "p80_ms": "p80 ms",
    "first_ms": "first ms",
    "eager_ms": "eager ms",
    "select_ms": "select ms",
    "attend_ms": "attend ms",
    "select_share": "select share",
    "speedup_over_sdpa": "x SDPA",
    "speedup_over_dense": "x dense",
    "speedup_over_table": "x table",
    "efficiency": "efficiency",
    "speedup_over_flex": "x Flex",
    "tflops": "TFLOP/s",
    "gb_per_s": "GB/s",
    "matmul_share": "of matmul rate",
    "bandwidth_share": "of bandwidth",
    "registers": "registers",
    "spilled": "spilled",
    "shared": "shared",
    "blocks": "blocks",
    "ahead": "ahead",
    "products": "products",
    "tests": "tests",
    "skipped": "not measured",
}


@app.command()
def main(
    paths: Annotated[list[Path], typer.Argument(help="JSONL files, or folders of them.")],
    against: Annotated[list[Path] | None, typer.Option(help="An older run of the cases.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the tables there.")] = None,
) -> None:
    """Prints Markdown tables; with --against, the ratio of the medians of two runs."""
    rows = figures(paths)
    if not rows:
        raise typer.BadParameter(f"paths: expected JSONL rows, got none in {_names(paths)}")
    text = compare(rows, figures(against)) if against else "\n\n".join(tables(rows))
    if out is None:
        print(text)
    else:
        out.write_text(text + "\n")


def figures(paths: list[Path]) -> list[Row]:
    """The rows of benchmarks in files and folders; other JSONL files in a folder are left out."""
    found = []
    for path in paths:
        if not path.exists():
            raise typer.BadParameter(f"paths: expected a JSONL file or a folder, got {path}")
        for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            try:
                rows = rows_of([file])
            except ValueError as error:
                raise typer.BadParameter(f"paths: {file}: expected JSON lines: {error}") from None
            found += [row for row in rows if "suite" in row or "case" in row]
    return found


def tables(rows: list[Row]) -> Iterator[str]:
    """A table for each section of each suite, headed where there are several."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("candidate") or row.get("skipped"):
            groups.setdefault(row.get("section", ""), []).append(row)
    for name, group in groups.items():
        yield (f"### {name}\n\n" if name else "") + table(group)
    for row in rows:
        if row.get("section") == "device":
            facts = {k: v for k, v in row.items() if k not in ("suite", "section", "case")}
            yield ", ".join(f"{k} {v}" for k, v in facts.items() if v is not None)


def table(rows: list[Row]) -> str:
    """Markdown table of the rows, without the columns that none of them has."""
    shown = {key: title for key, title in COLUMNS.items() if any(r.get(key) for r in rows)}
    lines = [_join(shown.values()), _join("---" for _ in shown)]
    lines += [_join(_cell(row.get(key)) for key in shown) for row in rows]
    keys = ("device", "threads", "torch", "commit", "dirty")
    places = {tuple(row.get(key) for key in keys) for row in rows}
    for device, threads, torch, commit, dirty in sorted(places, key=str):
        state = " with local changes" if dirty else ""
        lines.append(f"\n{device}, {threads} threads, torch {torch}, commit {commit}{state}.")
    return "\n".join(lines)


def compare(new: list[Row], old: list[Row]) -> str:
    """Markdown table of new over old medians for the cases that both have."""
    before = {_key(row): row["p50_ms"] for row in old if "p50_ms" in row}
    lines = [_join(["case", "what", "old ms", "new ms", "old / new"]), _join(["---"] * 5)]
    for row in new:
        ms = before.get(_key(row))
        if ms is not None and "p50_ms" in row:
            cells = [*_key(row), ms, row["p50_ms"], ms / row["p50_ms"]]
            lines.append(_join(map(_cell, cells)))
    return "\n".join(lines)


def _key(row: Row) -> tuple[Any, Any]:
    return row.get("case"), row.get("candidate")


def _names(paths: list[Path]) -> str:
    return ", ".join(map(str, paths))


def _join(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    app()
