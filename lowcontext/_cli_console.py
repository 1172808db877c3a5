"""What all commands share: the console, the option types, how failures are shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

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
MethodsOpt = Annotated[
    str,
    typer.Option(
        help="Comma-separated names, each with its defaults; what is compared with dense needs "
        "dense among them. Default, without -m and --sweep: dense."
    ),
]
MethodOpt = Annotated[
    list[str] | None,
    typer.Option("--method", "-m", help="NAME:key=value,key=value; repeatable."),
]
SweepOpt = Annotated[
    Path | None,
    typer.Option(help="YAML list of NAME and of {name: NAME, key: value or list of values}."),
]
LimitOpt = Annotated[
    int | None, typer.Option(help="Most prompts per method, the first of the run.", min=1)
]
HaystackOpt = Annotated[str, typer.Option(help="words, noise, wonderwords or a text file.")]
DtypeOpt = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceOpt = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")]
DeviceMapOpt = Annotated[
    str | None, typer.Option(help="Spread layers over devices: auto, balanced, sequential, ...")
]
SeedOpt = Annotated[int, typer.Option(help="Seed of the first sample; the next has the next.")]
ChunkOpt = Annotated[int | None, typer.Option(help="Prefill in chunks of so many tokens.", min=1)]


@contextmanager
def errors() -> Iterator[None]:
    """Turns expected failures into one red line and exit code 1."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        _fail(f"expected {package} to be installed; pip install {package}, and run again", error)
    except (ValueError, TypeError, NotImplementedError, OSError, RuntimeError) as error:
        _fail(str(error), error)


def _fail(message: str, error: Exception) -> NoReturn:
    # Not wrapped: a path in it can be copied.
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"error: {message}", style="red", markup=False
    )
    raise typer.Exit(1) from error


@contextmanager
def writing(path: Path, kept: str) -> Iterator[None]:
    """Names the file, or the folder, that could not be written, and what is safe without it."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"--out: could not write {str(path)!r} ({error}); {kept}: make room, or choose another "
            "folder, and run again"
        ) from error


def sample_progress() -> Progress:
    """A bar per method: samples done, time spent, time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
