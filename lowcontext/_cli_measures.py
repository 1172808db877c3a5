"""The commands `perplexity` and `fidelity`: the measures that need no task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
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
    MethodOpt,
    MethodsOpt,
    ModelArg,
    SweepOpt,
    console,
    errors,
    sample_progress,
    writing,
)
from lowcontext.methods import Method

_WINDOWS_SHOWN = 8
_MASSES = ("mass", "least", "error", "largest", "read")
_FIGURES = ("tokens", "n", "ppl", "diff", "95%", "read", "decode")


def perplexity(
    model: ModelArg,
    text: Annotated[Path, typer.Option(help="A UTF-8 text file.")],
    methods: MethodsOpt = "",
    method: MethodOpt = None,
    sweep: SweepOpt = None,
    lengths: Annotated[str, typer.Option(help="Tokens of a window, comma-separated.")] = "4k",
    stride: Annotated[
        int | None, typer.Option(help="From one window to the next; default: the length.", min=1)
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Most windows per length.", min=1)] = None,
    decode: Annotated[
        int,
        typer.Option(
            help="Score the last so many tokens of a window, fed one by one: what methods that are "
            "sparse in decode only need.",
            min=0,
        ),
    ] = 0,
    chunk: ChunkOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = "auto",
    device_map: DeviceMapOpt = None,
    out: Annotated[Path, typer.Option(help="Folder of perplexity.jsonl.")] = Path("perplexity"),
) -> None:
    """Measures perplexity on a text, method by method, and by position in the window.

    Prints perplexity, the difference to dense in nats per token with its 95% interval over windows,
    and perplexity by position; with at most 8 windows the difference in each of them too. Appends
    one JSONL row per window (a second run with the same --out continues where the first stopped).

    Example: `lowcontext perplexity ./my-llama --text book.txt --methods dense,hip --lengths 8k,32k`
    """
    from lowcontext.eval import perplexity as measure

    with errors():
        chosen = parse.methods(methods, method, sweep)
        runs = [
            measure.PerplexityRun(str(text), length, stride, windows, decode, chunk)
            for length in parse.lengths(lengths)
        ]
        parse.check_file(out / "perplexity.jsonl", measure.PerplexityRow, chosen)
        lm, tokenizer = parse.load_model(model, dtype, device, device_map)
        total = sum(measure.window_count(tokenizer, run) for run in runs)
        rows: list[Any] = []
        with sample_progress() as bars:
            for one in chosen:
                bar = bars.add_task(str(one), total=total)
                for row in _perplexity_rows(lm, tokenizer, runs, one, out / "perplexity.jsonl"):
                    rows.append(row)
                    bars.advance(bar)
        for table in perplexity_tables(rows):
            console.print(table)
    console.print(f"wrote {out / 'perplexity.jsonl'}")


def _perplexity_rows(
    model: Any, tokenizer: Any, runs: Sequence[Any], chosen: Method, out: Path
) -> Iterator[Any]:
    """Rows of one method, the model patched while they run."""
    from lowcontext.eval.perplexity import run_perplexity

    for run in runs:
        with parse.counted(model, chosen) as stats:
            yield from run_perplexity(model, tokenizer, run, method=chosen, out=out, stats=stats)


def perplexity_tables(rows: Sequence[Any]) -> list[Table]:
    """A table over all windows, one by position in them and, where they are few, one by window."""
    from lowcontext.eval.perplexity import summarize_perplexity

    lines = summarize_perplexity(rows)
    short = parse.short_names(list(dict.fromkeys(line.method for line in lines)))
    tables = [_perplexity_table(lines, short)]
    if any(len(line.buckets) > 1 for line in lines):
        tables.append(_position_table(lines, short))
    if all(line.windows <= _WINDOWS_SHOWN for line in lines):
        tables.append(_window_table(lines, short))
    return tables


def _perplexity_table(lines: Sequence[Any], short: dict[str, str]) -> Table:
    """A line per length and method."""
    table = _table("Perplexity; difference to dense in nats per token", *_FIGURES)
    for line in lines:
        ends = ""
        if line.difference_low is not None:
            ends = f"{line.difference_low:+.4f}..{line.difference_high:+.4f}"
        table.add_row(
            short[line.method],
            str(line.length),
            str(line.windows),
            f"{line.perplexity:.4g}",
            "" if line.difference is None else f"{line.difference:+.4f}",
            ends,
            parse.share(line.density),
            parse.share(line.density_decode),
        )
    return table


def _position_table(lines: Sequence[Any], short: dict[str, str]) -> Table:
    """A column per bucket of positions."""
    starts = sorted({start for line in lines for start in line.buckets})
    table = _table("Perplexity by position", "tokens", *(f"from {start}" for start in starts))
    for line in lines:
        cells = [f"{line.buckets[s]:.4g}" if s in line.buckets else "" for s in starts]
        table.add_row(short[line.method], str(line.length), *cells)
    return table


def _window_table(lines: Sequence[Any], short: dict[str, str]) -> Table:
    """Nats per token in each window: above dense where dense was run there, else in brackets."""
    numbers = sorted({number for line in lines for number in line.nats})
    title = "Nats per token above dense by window; in brackets its own"
    table = _table(title, "tokens", *(f"window {n}" for n in numbers))
    for line in lines:
        cells = [
            f"{line.gaps[n]:+.4f}"
            if n in line.gaps
            else f"({line.nats[n]:.4f})"
            if n in line.nats
            else ""
            for n in numbers
        ]
        table.add_row(short[line.method], str(line.length), *cells)
    return table


def fidelity(
    model: ModelArg,
    prompt: Annotated[Path, typer.Option(help="A UTF-8 text file.")],
    methods: MethodsOpt = "",
    method: MethodOpt = None,
    sweep: SweepOpt = None,
    max_length: Annotated[int, typer.Option(help="Cut the prompt to so many tokens.")] = 8192,
    steps: Annotated[
        int, typer.Option(help="Measure decode too, on so many of the last tokens.", min=0)
    ] = 0,
    layers: Annotated[
        str, typer.Option(help="Show the mass of groups of layers too, such as 0-10,11-29.")
    ] = "",
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = "auto",
    device_map: DeviceMapOpt = None,
    out: Annotated[Path, typer.Option(help="Folder of fidelity.jsonl and .png.")] = Path(
        "fidelity"
    ),
) -> None:
    """Measures per layer and head what a method keeps of dense attention on the same inputs.

    The softmax mass of the keys it reads, the error of the output, and the share of pairs read: a
    line per method, a table of the layers, one JSONL row per head, and a picture. A second run with
    the same --out measures only the methods that the first did not finish.

    Example: `lowcontext fidelity ./my-llama --prompt book.txt --methods hip,quest --steps 64`
    """
    from lowcontext.integrations import fidelity as measure

    with errors():
        chosen = parse.methods(methods, method, sweep)
        path = out / "fidelity.jsonl"
        kept = parse.check_file(path, measure.FidelityRow, chosen)
        lm, tokenizer = parse.load_model(model, dtype, device, device_map)
        groups = parse.layer_groups(layers, lm.config.get_text_config().num_hidden_layers)
        ids = parse.prompt_ids(tokenizer, prompt, max_length).to(lm.device)
        found: list[Any] = []
        with sample_progress() as bars:
            bar = bars.add_task("methods", total=len(chosen))
            for one in chosen:
                run = measure.run_key(lm, ids, one, steps)
                heads = [row for row in kept if row.run == run]
                if not heads:
                    heads = measure.measure_fidelity(lm, ids, one, steps=steps)
                    # Another run may have added rows since.
                    others = parse.check_file(path, measure.FidelityRow, [one])
                    with writing(path, "the methods before this one are kept"):
                        measure.write_rows([*others, *heads], path)
                found += heads
                bars.advance(bar)
        for table in fidelity_tables(found, groups):
            console.print(table)
        with writing(out, "the rows are kept"):
            picture = measure.plot_fidelity(found, out / "fidelity.png")
    console.print(f"wrote {path} and {picture}")


def fidelity_tables(found: Sequence[Any], groups: dict[str, range]) -> list[Table]:
    """Means and worst heads by method: a table per phase over all layers, and one of the layers.

    Args:
        found: rows of `measure_fidelity`.
        groups: layers whose mass the tables over all layers show too, by what to call them.
    """
    short = parse.short_names(list(dict.fromkeys(head.method for head in found)))
    phases: dict[str, dict[str, list[Any]]] = {}
    for head in found:
        phases.setdefault(head.phase, {}).setdefault(head.method, []).append(head)
    tables = []
    for phase, methods in phases.items():
        title = f"{phase}: softmax mass read and relative error of the output, over heads"
        table = _table(title, *(f"mass {name}" for name in groups), *_MASSES)
        for method, heads in methods.items():
            parts = [[h for h in heads if h.layer in group] for group in groups.values()]
            masses = [f"{_mean(part, 'mass'):.2%}" if part else "" for part in parts]
            table.add_row(short[method], *masses, *_mass_figures(heads))
        tables.append(table)
    by_layer = _table("The same by layer", "layer", *_MASSES, first="method, phase")
    for method, (phase, methods) in product(short, phases.items()):
        heads = methods.get(method, [])
        for layer in dict.fromkeys(head.layer for head in heads):
            part = [head for head in heads if head.layer == layer]
            by_layer.add_row(f"{short[method]}, {phase}", str(layer), *_mass_figures(part))
    return [*tables, by_layer]


def _table(title: str, *numbers: str, first: str = "method") -> Table:
    return Table(
        Column(first, overflow="fold", min_width=13),
        *(Column(name, justify="right", no_wrap=True) for name in numbers),
        title=title,
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def _mass_figures(heads: Sequence[Any]) -> list[str]:
    return [
        f"{_mean(heads, 'mass'):.2%}",
        f"{min(h.mass for h in heads):.2%}",
        f"{_mean(heads, 'error'):.4f}",
        f"{max(h.error for h in heads):.4f}",
        parse.share(_mean(heads, "density")),
    ]


def _mean(heads: Sequence[Any], name: str) -> float:
    return fmean(getattr(head, name) for head in heads)
