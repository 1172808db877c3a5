"""The commands `perplexity` and `fidelity`: the measures that need no task."""

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
        int, typer.Option(help="Score the last so many tokens of a window, fed one by one.", min=0)
    ] = 0,
    chunk: ChunkOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = "auto",
    device_map: DeviceMapOpt = None,
    out: Annotated[Path, typer.Option(help="Folder of perplexity.jsonl.")] = Path("perplexity"),
) -> None:
    """Measures perplexity on a text, method by method, and by position in the window.

    Prints perplexity, the difference to dense in nats per token with its 95% interval over windows,
    and perplexity by position; appends one JSONL row per window (a second run with the same --out
    continues where the first stopped).

    Example: `lowcontext perplexity ./my-llama --text book.txt --methods dense,hip --lengths 8k,32k`
    """
    from lowcontext.eval import perplexity as measure

    with errors():
        chosen = parse.methods(methods, method, sweep)
        runs = [
            measure.PerplexityRun(str(text), length, stride, windows, decode, chunk)
            for length in parse.lengths(lengths)
        ]
        lm, tokenizer = parse.load_model(model, dtype, device, device_map)
        total = sum(measure.window_count(tokenizer, run) for run in runs)
        rows: list[Any] = []
        with sample_progress() as bars:
            for one in chosen:
                bar = bars.add_task(str(one), total=total)
                for row in _perplexity_rows(lm, tokenizer, runs, one, out / "perplexity.jsonl"):
                    rows.append(row)
                    bars.advance(bar)
        console.print(perplexity_table(rows))
    console.print(f"wrote {out / 'perplexity.jsonl'}")


def _perplexity_rows(
    model: Any, tokenizer: Any, runs: Sequence[Any], chosen: Method, out: Path
) -> Iterator[Any]:
    """Rows of one method, the model patched while they run."""
    from lowcontext.eval.perplexity import run_perplexity

    for run in runs:
        with parse.counted(model, chosen) as stats:
            yield from run_perplexity(
                model, tokenizer, run, method=str(chosen), out=out, stats=stats
            )


def perplexity_table(rows: Sequence[Any]) -> Table:
    """A line per length and method, with a column per bucket of positions."""
    from lowcontext.eval.perplexity import summarize_perplexity

    lines = summarize_perplexity(rows)
    short = parse.short_names(list(dict.fromkeys(line.method for line in lines)))
    starts = sorted({start for line in lines for start in line.buckets})
    names = ("tokens", "n", "ppl", "diff", "95%", "read", *(f"from {start}" for start in starts))
    table = Table(
        Column("method", overflow="fold", min_width=13),
        *(Column(name, justify="right", no_wrap=True) for name in names),
        title="Perplexity; difference to dense in nats per token; perplexity by position",
        box=SIMPLE,
    )
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
            *(f"{line.buckets[s]:.4g}" if s in line.buckets else "" for s in starts),
        )
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
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = "auto",
    device_map: DeviceMapOpt = None,
    out: Annotated[Path, typer.Option(help="Folder of fidelity.jsonl and .png.")] = Path(
        "fidelity"
    ),
) -> None:
    """Measures per layer and head what a method keeps of dense attention on the same inputs.

    The softmax mass of the keys it reads, the error of the output, and the share of pairs read:
    a table of the layers, one JSONL row per head, and a picture.

    Example: `lowcontext fidelity ./my-llama --prompt book.txt --methods hip,quest --steps 64`
    """
    from lowcontext.integrations import fidelity as measure

    with errors():
        chosen = parse.methods(methods, method, sweep)
        lm, tokenizer = parse.load_model(model, dtype, device, device_map)
        ids = parse.prompt_ids(tokenizer, prompt, max_length).to(lm.device)
        found = []
        with sample_progress() as bars:
            bar = bars.add_task("methods", total=len(chosen))
            for one in chosen:
                found += measure.measure_fidelity(lm, ids, one, steps=steps)
                bars.advance(bar)
        console.print(fidelity_table(found))
        with writing(out, "the table above is all that is left"):
            rows = measure.write_rows(found, out / "fidelity.jsonl")
            picture = measure.plot_fidelity(found, out / "fidelity.png")
    console.print(f"wrote {rows} and {picture}")


def fidelity_table(found: Sequence[Any]) -> Table:
    """Means and worst heads by method and phase, of all layers first and then of each."""
    names = ("layer", "mass", "least", "error", "largest", "read")
    table = Table(
        Column("method, phase", overflow="fold", min_width=16),
        *(Column(name, justify="right", no_wrap=True) for name in names),
        title="Softmax mass read and relative error of the output, over heads",
        box=SIMPLE,
    )
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for head in found:
        groups.setdefault((head.method, head.phase, "all"), []).append(head)
    for head in found:
        groups.setdefault((head.method, head.phase, str(head.layer)), []).append(head)
    short = parse.short_names(list(dict.fromkeys(head.method for head in found)))
    for (method, phase, layer), heads in groups.items():
        table.add_row(
            f"{short[method]}, {phase}",
            layer,
            f"{sum(h.mass for h in heads) / len(heads):.2%}",
            f"{min(h.mass for h in heads):.2%}",
            f"{sum(h.error for h in heads) / len(heads):.4f}",
            f"{max(h.error for h in heads):.4f}",
            parse.share(sum(h.density for h in heads) / len(heads)),
        )
    return table
