"""The commands `ruler` and `report`, and the rows and tables of `needle`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Column, Table

from lowcontext import _cli_parse as parse
from lowcontext._cli_console import (
    ChunkOpt,
    DeviceMapOpt,
    DeviceOpt,
    DtypeOpt,
    HaystackOpt,
    LimitOpt,
    MethodOpt,
    MethodsOpt,
    ModelArg,
    SeedOpt,
    SweepOpt,
    console,
    errors,
    sample_progress,
    writing,
)
from lowcontext.methods import Method


def ruler(
    model: ModelArg,
    methods: MethodsOpt = "",
    method: MethodOpt = None,
    sweep: SweepOpt = None,
    lengths: Annotated[str, typer.Option(help="Comma-separated, in tokens.")] = "4k,8k,16k",
    tasks: Annotated[str, typer.Option(help="Comma-separated; default: all there is.")] = "",
    samples: Annotated[int, typer.Option(help="Prompts per length and task.", min=1)] = 5,
    haystack: HaystackOpt = "words",
    squad: Annotated[str | None, typer.Option(help="JSON in SQuAD's format, for qa_1.")] = None,
    hotpot: Annotated[str | None, typer.Option(help="JSON in HotpotQA's, for qa_2.")] = None,
    seed: SeedOpt = 0,
    limit: LimitOpt = None,
    chunk: ChunkOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = "auto",
    device_map: DeviceMapOpt = None,
    out: Annotated[Path, typer.Option(help="Folder of ruler.jsonl and the PNGs.")] = Path("ruler"),
) -> None:
    """Runs RULER's tasks, offline, method by method, and compares each with dense.

    Prints per length and task: score, difference to dense with its 95% interval, density, TTFT,
    TPOT and peak memory; appends one JSONL row per prompt (a second run with the same --out
    continues where the first stopped) and draws three pictures.

    Example: `lowcontext ruler ./my-llama --methods dense,minference,hip --lengths 4k,32k`
    """
    from lowcontext.eval import ruler as suite
    from lowcontext.eval.records import RulerRow

    with errors():
        chosen = parse.methods(methods, method, sweep)
        run = suite.RulerRun(
            lengths=parse.lengths(lengths),
            tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
            samples=samples,
            sources=suite.Sources(haystack, squad, hotpot),
            seed=seed,
            chunk=chunk,
            limit=limit,
        )
        parse.check_file(out / "ruler.jsonl", RulerRow, chosen)
        lm, tokenizer = parse.load_model(model, dtype, device, device_map)
        rows: list[Any] = []
        with sample_progress() as bars:
            for one in chosen:
                bar = bars.add_task(str(one), total=len(run.cells()))
                for row in _ruler_rows(lm, tokenizer, run, one, out / "ruler.jsonl"):
                    rows.append(row)
                    bars.advance(bar)
        for table in ruler_tables(rows):
            console.print(table)
        with writing(out, "the rows are kept"):
            pictures = suite.plot_ruler(rows, out)
    console.print(f"wrote {out / 'ruler.jsonl'}, {', '.join(path.name for path in pictures)}")


def report(
    runs: Annotated[list[Path], typer.Argument(help="JSONL files of `needle` and of `ruler`.")],
    out: Annotated[Path, typer.Option(help="Folder of report.html and the PNGs.")] = Path("report"),
) -> None:
    """Compares finished runs: tables, pictures and one HTML page; nothing is run again.

    The page needs no other file. A run is named by its file, with its folder where two are alike.

    Example: `lowcontext report ruler-a/ruler.jsonl ruler-b/ruler.jsonl --out compared`
    """
    from lowcontext.eval import report as reports

    with errors():
        loaded = reports.load_runs(runs)
        for run in loaded:
            console.print(run.title, style="bold", markup=False)
            for table in [*ruler_tables(run.ruler), *needle_tables(run.needle)]:
                console.print(table)
        with writing(out, "the runs are as they were"):
            page = reports.write_report(loaded, out)
    console.print(f"wrote {page}")


def _ruler_rows(model: Any, tokenizer: Any, run: Any, chosen: Method, out: Path) -> Iterator[Any]:
    """Rows of one method, the model patched while they run."""
    from lowcontext.eval.ruler import run_ruler

    with parse.counted(model, chosen) as stats:
        yield from run_ruler(model, tokenizer, run, method=chosen, out=out, stats=stats)


def ruler_tables(rows: Sequence[Any]) -> list[Table]:
    """One table per length: task by task, each method beside dense on the same prompts."""
    from lowcontext.eval.ruler import summarize_ruler

    lines = summarize_ruler(rows)
    short = parse.short_names(list(dict.fromkeys(line.method for line in lines)))
    numbers = ("n", "score", "diff", "95%", "read", "decode", "TTFT", "TPOT", "MiB")
    tables = []
    for length in sorted({line.length for line in lines}):
        table = Table(
            Column("task, method", overflow="fold", min_width=16),
            *(Column(name, justify="right", no_wrap=True) for name in numbers),
            title=f"{length} tokens: score in %, its difference to dense, density, s, ms",
            box=SIMPLE,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        before = ""
        for line in (line for line in lines if line.length == length):
            if line.task != before:
                table.add_row(line.task, style="bold")
                before = line.task
            style = "red" if line.below else None
            table.add_row(f" {short[line.method]}", *_figures(line), style=style)
        tables.append(table)
    return tables


def needle_rows(model: Any, tokenizer: Any, grid: Any, chosen: Method, out: Path) -> Iterator[Any]:
    """Needle rows of one method, the model patched while they run."""
    from lowcontext.eval import run_needle

    with parse.counted(model, chosen) as stats:
        yield from run_needle(model, tokenizer, grid, method=chosen, out=out, stats=stats)


def needle_tables(rows: Sequence[Any]) -> list[Table]:
    """Two tables per task and haystack: by length with density and times, and by depth."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        groups.setdefault((row.task, row.haystack), []).append(row)
    return [table for part in groups.values() for table in _needle_tables(part)]


def _needle_tables(rows: Sequence[Any]) -> list[Table]:
    from lowcontext.eval import summarize

    what = f"{rows[0].task}, {rows[0].haystack}"
    titles = ("length", "right", "95%", "prefill", "decode", "TTFT s", "TPOT ms")
    by_length = Table(
        Column("method", overflow="fold", min_width=13),
        *(Column(name, justify="right", no_wrap=True) for name in titles),
        title=f"{what}: accuracy, density of prefill and decode, median times",
        box=SIMPLE,
    )
    cells: dict[tuple[str, float], list[bool]] = {}
    for row in rows:
        cells.setdefault((row.method, row.depth), []).append(row.correct)
    short = parse.short_names(list(dict.fromkeys(row.method for row in rows)))
    for line in summarize(rows):
        by_length.add_row(
            short[line.method],
            str(line.length),
            f"{line.accuracy:.0%}",
            f"{100 * line.low:.0f}-{100 * line.high:.0f}",
            parse.share(line.density),
            parse.share(line.density_decode),
            f"{line.ttft_s:.2f}",
            "" if line.tpot_s is None else f"{line.tpot_s * 1e3:.1f}",
        )
    depths = sorted({row.depth for row in rows})
    by_depth = Table(
        Column("method", overflow="fold", min_width=13),
        *(Column(f"{depth:.3g}%", justify="right", no_wrap=True) for depth in depths),
        title=f"{what}: accuracy by depth of the needle",
        box=SIMPLE,
    )
    for name, shown in short.items():
        found = [cells.get((name, depth), []) for depth in depths]
        by_depth.add_row(shown, *(f"{sum(c) / len(c):.0%}" if c else "" for c in found))
    return [by_length, by_depth]


def _figures(line: Any) -> list[str]:
    difference = ends = ""
    if line.difference is not None:
        difference = f"{100 * line.difference:+.0f}"
        ends = f"{100 * line.difference_low:+.0f}..{100 * line.difference_high:+.0f}"
    return [
        str(line.samples),
        f"{100 * line.score:.0f}",
        difference,
        ends,
        parse.share(line.density),
        parse.share(line.density_decode),
        f"{line.ttft_s:.2f}",
        "" if line.tpot_s is None else f"{1e3 * line.tpot_s:.1f}",
        "" if line.peak_mib is None else f"{line.peak_mib:.0f}",
    ]
