"""The command line; the commands of the evaluation beside `needle` are in `_cli_eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

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
from lowcontext._cli_eval import needle_rows, needle_tables, report, ruler
from lowcontext._cli_lm_eval import lm_eval
from lowcontext._cli_measures import fidelity, perplexity

app = typer.Typer(
    help="Long-context sparse attention for Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(ruler)
app.command()(report)
app.command()(perplexity)
app.command()(fidelity)
app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(lm_eval)


@app.command()
def info() -> None:
    """Shows versions, devices, which backends can run here, and which one each op takes.

    Example: `lowcontext info`
    """
    import torch

    from lowcontext._version import __version__
    from lowcontext.ops import _dispatch, native

    table = Table(show_header=False, box=None)
    table.add_row("lowcontext", __version__)
    table.add_row("python", sys.version.split()[0])
    for package in ("torch", "transformers", "triton", "flash-attn"):
        table.add_row(package, parse.installed_version(package))
    isa = native.cpu_isa() if native.status() is None else "unknown: no native backend"
    table.add_row("cpu", f"{torch.get_num_threads()} threads, kernels for {isa}")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("gpu", ", ".join(names) or "none")
    console.print(table)
    backends = Table("backend", "usable", "why not")
    for name, reason in _dispatch.table():
        backends.add_row(name, "no" if reason else "yes", reason or "")
    console.print(backends)
    devices = ["cpu", "cuda"] if names else ["cpu"]
    console.print(parse.op_table(devices))


@app.command()
def methods() -> None:
    """Lists the methods with their hyper-parameters and defaults.

    Example: `lowcontext methods`
    """
    from dataclasses import fields

    from lowcontext.methods import available_methods, method_class

    table = Table("method", "what it does", "hyper-parameters", show_lines=True)
    for name in available_methods():
        cls = method_class(name)
        summary = (cls.__doc__ or "").split("\n")[0]
        options = ", ".join(f"{f.name}={f.default}" for f in fields(cls))
        table.add_row(name, summary, options)
    console.print(table)


@app.command()
def checkpoint(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    seed: Annotated[int, typer.Option(help="Seed of its random codes.")] = 0,
    kind: Annotated[str, typer.Option(help="needle; or ruler: several values, chains, counts.")] = (
        "needle"
    ),
) -> None:
    """Writes the retrieval checkpoint: a small LLaMA that finds needles at any length to 128K.

    It is built, not trained: a yardstick for machines without real weights. See
    docs/retrieval-checkpoint.md for what it does not show.

    Examples:

    `lowcontext checkpoint demo/retrieval`

    `lowcontext checkpoint demo/tasks --kind ruler`
    """
    from lowcontext.eval import write_retrieval_checkpoint

    with errors():
        console.print(f"wrote {write_retrieval_checkpoint(folder, seed=seed, kind=kind)}")


@app.command()
def generate(
    model: ModelArg,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 file with it.")] = None,
    method: Annotated[
        str, typer.Option("--method", "-m", help="NAME or NAME:key=value,key=value.")
    ] = "dense",
    prefill: Annotated[str | None, typer.Option(help="Method of the prompt only.")] = None,
    decode: Annotated[str | None, typer.Option(help="Method of the new tokens only.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    chat: Annotated[bool, typer.Option(help="Apply the tokenizer's chat template.")] = False,
    chunk: ChunkOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = "auto",
    device_map: DeviceMapOpt = None,
) -> None:
    """Generates from a prompt, greedily, with a patched model; prints density and times.

    Examples:

    `lowcontext generate ./my-llama --prompt-file book.txt -m block_topk:budget=4096`

    `lowcontext generate ./my-llama --prompt-file book.txt --decode quest:budget=1024`
    """
    from lowcontext.methods import combine

    with errors():
        text = parse.prompt_text(prompt, prompt_file)
        if prefill or decode:
            if method != "dense":
                raise ValueError("--method: expected alone, or --prefill and --decode without it")
            chosen = combine(
                prefill=parse.method(prefill) if prefill else None,
                decode=parse.method(decode) if decode else None,
            )
        else:
            chosen = parse.method(method)
        lm, tokenizer = parse.load_model(model, dtype, device, device_map)
        result = parse.generate(lm, tokenizer, text, chosen, max_new_tokens, chat, chunk)
    console.print(result.text, markup=False, highlight=False)
    console.print(f"\n{result.summary}", style="dim", markup=False, highlight=False)


@app.command()
def needle(
    model: ModelArg,
    methods: MethodsOpt = "",
    method: MethodOpt = None,
    sweep: SweepOpt = None,
    lengths: Annotated[str, typer.Option(help="Comma-separated, in tokens.")] = "1k,4k,16k",
    depths: Annotated[int, typer.Option(help="Depths from 0 to 100%.", min=1)] = 5,
    samples: Annotated[int, typer.Option(help="Prompts per length and depth.", min=1)] = 1,
    task: Annotated[str, typer.Option(help="single, multikey, several:N or thread:N.")] = "single",
    haystack: HaystackOpt = "words",
    seed: SeedOpt = 0,
    answer_room: Annotated[int, typer.Option(help="Most tokens to generate.", min=1)] = 16,
    limit: LimitOpt = None,
    chunk: ChunkOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = "auto",
    device_map: DeviceMapOpt = None,
    out: Annotated[Path, typer.Option(help="Folder of needle.jsonl and needle.png.")] = Path(
        "needle"
    ),
) -> None:
    """Hides a sentence at several depths and lengths and asks for it, method by method.

    Prints accuracy by length and by depth with density, TTFT and TPOT; appends one JSONL row per
    prompt (a second run with the same --out continues where the first stopped) and draws a heatmap.

    Examples:

    `lowcontext needle ./my-llama --methods dense,block_topk --lengths 4k,32k --samples 5`

    `lowcontext needle demo/retrieval -m dense -m quest:budget=512,dense_layers=0`
    """
    from lowcontext import eval as evaluation

    with errors():
        chosen = parse.methods(methods, method, sweep)
        grid = evaluation.NeedleGrid(
            lengths=parse.lengths(lengths),
            depths=parse.depth_grid(depths),
            samples=samples,
            task=task,
            haystack=haystack,
            seed=seed,
            answer_room=answer_room,
            chunk=chunk,
            limit=limit,
        )
        parse.check_file(out / "needle.jsonl", evaluation.NeedleRow, chosen)
        lm, tokenizer = parse.load_model(model, dtype, device, device_map)
        rows: list[Any] = []
        with sample_progress() as bars:
            for one in chosen:
                bar = bars.add_task(str(one), total=len(grid.cells()))
                for row in needle_rows(lm, tokenizer, grid, one, out / "needle.jsonl"):
                    rows.append(row)
                    bars.advance(bar)
        for table in needle_tables(rows):
            console.print(table)
        with writing(out / "needle.png", "the rows are kept"):
            picture = evaluation.plot_needle(rows, out / "needle.png")
    console.print(f"wrote {out / 'needle.jsonl'} and {picture}")


@app.command()
def calibrate(
    model: ModelArg,
    prompt: Annotated[list[Path], typer.Option(help="A UTF-8 text file; repeatable.")],
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("patterns.json"),
    density: Annotated[
        float | None,
        typer.Option(help="Mean share of the causal pairs; default: what minference reads now."),
    ] = None,
    objective: Annotated[str, typer.Option(help="output or recall.")] = "output",
    published: Annotated[
        bool, typer.Option(help="Only patterns that other readers of the schema know.")
    ] = False,
    max_length: Annotated[int, typer.Option(help="Cut prompts to so many tokens.")] = 32768,
    blocks: Annotated[int, typer.Option(help="Blocks of 64 queries to measure.", min=1)] = 8,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = "auto",
) -> None:
    """Finds a pattern for each head of a checkpoint, for `minference` with `patterns=`.

    Measures every candidate on every head: error of the attention output, recall, and the share of
    pairs it reads. Measurements go to OUT.measured.jsonl; a second run continues there, and one
    with another density or objective measures nothing again.

    Example: `lowcontext calibrate ./my-llama --prompt book.txt --out patterns.json`
    """
    from lowcontext.methods._patterns import write_patterns

    with errors():
        run = parse.calibration(out, published, blocks)
        lm, tokenizer = parse.load_model(model, dtype, device)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=console) as bars:
            for file in prompt:
                ids = parse.prompt_ids(tokenizer, file, max_length).to(lm.device)
                bar = bars.add_task(f"{file.name}: {ids.shape[1]} tokens, layers", total=None)
                run.measure(lm, ids, lambda n, of, b=bar: bars.update(b, completed=n, total=of))
        choice = run.choose(density, objective)
        write_patterns(choice.patterns, out)
        console.print(parse.choice_table(choice))
    console.print(
        f"wrote {out}: mean density {choice.density:.1%}; use it as -m minference:patterns={out}"
    )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder of a causal LM, or a pattern file.")],
    prompt: Annotated[Path | None, typer.Option(help="A UTF-8 text file.")] = None,
    layer: Annotated[int, typer.Option(min=0)] = 0,
    head: Annotated[int, typer.Option(help="Query head.", min=0)] = 0,
    method: Annotated[
        str, typer.Option("--method", "-m", help="NAME or NAME:key=value,key=value.")
    ] = "minference:min_length=0",
    max_length: Annotated[int, typer.Option(help="Cut the prompt to so many tokens.")] = 8192,
    out: Annotated[Path, typer.Option(help="The image to write.")] = Path("inspect.png"),
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = "auto",
) -> None:
    """Draws a head's attention and what a method reads of it, or the patterns of a file.

    Examples:

    `lowcontext inspect ./my-llama --prompt book.txt --layer 3 --head 5 --out head.png`

    `lowcontext inspect patterns.json --out patterns.png`
    """
    from lowcontext.integrations import inspection
    from lowcontext.methods._patterns import read_patterns

    with errors():
        if model.endswith(".json"):
            picture = inspection.plot_patterns(read_patterns(model), out)
        else:
            if prompt is None:
                raise ValueError("--prompt: expected a text file, got none")
            chosen = parse.method(method)
            lm, tokenizer = parse.load_model(model, dtype, device)
            ids = parse.prompt_ids(tokenizer, prompt, max_length).to(lm.device)
            found = inspection.head_map(lm, ids, chosen, layer, head)
            console.print(
                f"{found.label}: {found.length} tokens, density {found.density:.1%}, "
                f"recall {found.recall:.2%}"
            )
            picture = inspection.plot_head(found, out)
    console.print(f"wrote {picture}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Runs the kernel benchmarks of a source checkout; arguments go to `python -m bench.run`.

    Example: `lowcontext bench --suite cpu-decode`
    """
    import subprocess

    root = Path(__file__).parent.parent
    if not (root / "bench" / "run.py").exists():
        with errors():
            raise RuntimeError("bench: expected a source checkout; clone the repository to run it")
    command = [sys.executable, "-m", "bench.run", *(context.args or ["--help"])]
    raise typer.Exit(subprocess.run(command, cwd=root, check=False).returncode)
