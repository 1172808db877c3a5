"""Rows of a run, and the JSONL file that holds them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from lowcontext.eval.identity import Described, Settings, check_method, settings_by_label

# Every field of a row that decides what the measurement is.
RowKey = tuple[str | int | float | None, ...]


class Row(Protocol):
    """A frozen dataclass of JSON values with a key."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def method(self) -> str:
        """Label of what the model ran under."""

    @property
    def settings(self) -> Settings | None:
        """All its settings: in one file a label has one set of them."""

    @property
    def key(self) -> RowKey:
        """What names the row: two rows with one key are one measurement made twice."""


RowT = TypeVar("RowT", bound=Row)
CellT = TypeVar("CellT")

_NEEDLE_KEY = (
    "model",
    "method",
    "task",
    "haystack",
    "length",
    "depth",
    "sample",
    "seed",
    "answer_room",
    "chunk",
    "metric",
)
_RULER_KEY = ("model", "method", "task", "source", "length", "sample", "seed", "chunk")


@dataclass(frozen=True)
class NeedleRow:
    """One prompt, what the model made of it, and how long that took.

    Attributes:
        model: Folder that the model was loaded from, its dtype and a digest of its weights.
        method: Label of what the model ran under.
        settings: All settings of it, by name, those at their defaults too; {} where the caller
            gave a label alone, None in rows of a version that wrote none.
        task: Kind of needle, as ``NeedleTask.name``.
        haystack: Name of the haystack, or path and digest of its file.
        length: Asked length in tokens, answer room included.
        depth: Depth of the needle in percent.
        sample: Number of the sample in its cell.
        seed: Seed the sample was made with.
        answer_room: Most tokens to generate.
        chunk: Tokens of a prefill chunk; None for one pass.
        metric: How the answer was compared.
        prompt_tokens: Tokens of the prompt.
        expected: The answer.
        output: The model's answer.
        correct: Whether the answer counts.
        ttft_s: Time to first token, in seconds: the prefill and one choice of token.
        tpot_s: Mean time per output token after the first, in seconds; None with one token.
        new_tokens: Tokens generated, an end-of-sequence token included.
        density: Share of the causal pairs that was computed, if the caller told.
        stats: Whatever else the caller's ``stats`` returned.
    """

    model: str
    method: str
    settings: Settings | None
    task: str
    haystack: str
    length: int
    depth: float
    sample: int
    seed: int
    answer_room: int
    chunk: int | None
    metric: str
    prompt_tokens: int
    expected: str
    output: str
    correct: bool
    ttft_s: float
    tpot_s: float | None
    new_tokens: int
    density: float | None
    stats: dict[str, float]

    @property
    def key(self) -> RowKey:
        """What names the row: two rows with one key are one measurement made twice."""
        return tuple(getattr(self, name) for name in _NEEDLE_KEY)


@dataclass(frozen=True)
class RulerRow:
    """One prompt of the RULER suite, what the model made of it, and what that cost.

    Attributes:
        model: Folder that the model was loaded from, its dtype and a digest of its weights.
        method: Label of what the model ran under.
        settings: All settings of it, by name, those at their defaults too; {} where the caller
            gave a label alone, None in rows of a version that wrote none.
        task: Name of the task.
        source: Where the text around the task comes from: a haystack, or a file of questions; of a
            file its path and digest.
        length: Asked length in tokens, answer room included.
        sample: Number of the sample.
        seed: Seed the sample was made with.
        chunk: Tokens of a prefill chunk; None for one pass.
        prompt_tokens: Tokens of the prompt.
        answers: The references.
        output: The model's answer.
        score: The task's metric, 0..1.
        ttft_s: Time to first token, in seconds: the prefill and one choice of token.
        tpot_s: Mean time per output token after the first, in seconds; None with one token.
        new_tokens: Tokens generated, an end-of-sequence token included.
        peak_mib: Peak memory: PyTorch's on a GPU, the process's on a CPU; None if not measured.
        density: Share of the causal pairs that was computed, if the caller told.
        stats: Whatever else the caller's ``stats`` returned.
    """

    model: str
    method: str
    settings: Settings | None
    task: str
    source: str
    length: int
    sample: int
    seed: int
    chunk: int | None
    prompt_tokens: int
    answers: list[str]
    output: str
    score: float
    ttft_s: float
    tpot_s: float | None
    new_tokens: int
    peak_mib: float | None
    density: float | None
    stats: dict[str, float]

    @property
    def key(self) -> RowKey:
        """What names the row: two rows with one key are one measurement made twice."""
        return tuple(getattr(self, name) for name in _RULER_KEY)


def read_rows(paths: str | Path | Iterable[str | Path]) -> list[NeedleRow]:
    """Reads the needle rows of one or several JSONL files.

    Args:
        paths: A file, or several.

    Returns:
        The rows in order; an unfinished last line (a run that was killed) is left out, and so is
        all but the last of rows of one file with one key (two runs at once).

    Raises:
        ValueError: If another line is not a row, or if rows share a method's label and not its
            settings.
    """
    return read_any(paths, NeedleRow)


def read_ruler_rows(paths: str | Path | Iterable[str | Path]) -> list[RulerRow]:
    """Reads the rows of one or several JSONL files of the RULER suite, as ``read_rows`` does."""
    return read_any(paths, RulerRow)


def read_any(paths: str | Path | Iterable[str | Path], kind: type[RowT]) -> list[RowT]:
    """Reads rows of a kind from one or several JSONL files, as ``read_rows`` does."""
    many = [paths] if isinstance(paths, str | Path) else list(paths)
    files = [_parse(Path(path).read_bytes(), str(path), kind)[0] for path in many]
    settings_by_label(chain.from_iterable(files), ", ".join(map(str, many)))
    return [row for rows in files for row in _by_key(rows).values()]


class RowFile(Generic[RowT]):
    """A JSONL file that grows row by row; closed after each, so a killed run loses none.

    Args:
        path: The file; made, with its folders, if missing. An unfinished last line is cut off.
        kind: The class of its rows.
        methods: What is about to run.

    Attributes:
        rows: The rows it held when it was opened, by key.

    Raises:
        ValueError: If the file cannot be written, holds anything but rows, or has rows under the
            label of a method that were made with other settings, or with settings unknown.
    """

    def __init__(self, path: str | Path, kind: type[RowT], *methods: str | Described) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                file.seek(0)
                data = file.read()
                rows, end = _parse(data, str(path), kind)
                if end < len(data):  # not always: another run may have added a row since
                    file.truncate(end)
        except ValueError as error:
            raise ValueError(f"out: {error}; choose another folder") from error
        except OSError as error:
            raise ValueError(
                f"out: expected a writable file, got {str(path)!r} ({error}); choose another folder"
            ) from error
        known = settings_by_label(rows, str(path))
        for method in methods:
            check_method(method, known, str(path))
        self.rows = _by_key(rows)

    def append(self, row: RowT) -> None:
        """Adds one row.

        Raises:
            OSError: If it does not fit on the disk. The rows before it are safe.
        """
        line = json.dumps(asdict(row), ensure_ascii=False) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise OSError(
                f"out: could not append to {str(self.path)!r} ({error}); the rows before are kept: "
                "make room and run the same command again"
            ) from error


def recorded(
    cells: Iterable[CellT],
    key: Callable[[CellT], RowKey],
    run: Callable[[CellT], RowT],
    book: RowFile[RowT] | None,
) -> Iterator[RowT]:
    """Yields the row of every cell; runs it, and writes it down, where the file lacks it."""
    known = book.rows if book else {}
    for cell in cells:
        row = known.get(key(cell))
        if row is None:
            row = run(cell)
            if book:
                book.append(row)
        yield row


def _by_key(rows: Iterable[RowT]) -> dict[RowKey, RowT]:
    """Rows without those that were measured again."""
    return {row.key: row for row in rows}


def _parse(data: bytes, place: str, kind: type[RowT]) -> tuple[list[RowT], int]:
    """Returns the finished rows of a file and the length in bytes of what they take."""
    end = data.rfind(b"\n") + 1
    name = kind.__name__.removesuffix("Row").lower()
    rows = []
    for number, line in enumerate(data[:end].splitlines(), start=1):
        try:
            rows.append(_row(json.loads(line), kind))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{place}: expected a {name} row in line {number} ({error})"
            ) from error
    return rows, end


def _row(content: object, kind: type[RowT]) -> RowT:
    names = {field.name for field in fields(kind)}
    if isinstance(content, dict):
        content = {"settings": None, **content}  # versions before this field wrote none
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {type(content).__name__}")
    if set(content) != names:
        missing, unknown = sorted(names - set(content)), sorted(set(content) - names)
        raise ValueError(
            f"expected the fields of this version; missing: {missing}, unknown: {unknown}"
        )
    return kind(**content)
