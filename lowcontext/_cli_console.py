"""What all commands share: the console, the option types, how failures are shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console()

ModelArg = Annotated[str, typer.Argument(help="Folder of a Hugging Face causal LM.")]
MethodsOpt = Annotated[str, typer.Option(help="Comma-separated names, each with its defaults.")]
MethodOpt = Annotated[
    list[str] | None,
    typer.Option("--method", "-m", help="NAME:key=value,key=value; repeatable."),
]
HaystackOpt = Annotated[str, typer.Option(help="words, noise, wonderwords or a text file.")]
DtypeOpt = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceOpt = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")]
ChunkOpt = Annotated[int | None, typer.Option(help="Prefill in chunks of so many tokens.", min=1)]


@contextmanager
def errors() -> Iterator[None]:
    """Turns expected failures into one red line and exit code 1."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, OSError, RuntimeError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error


def sample_progress() -> Progress:
    """A bar per method: samples done, time spent, time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
