"""Rows of a needle run, and the JSONL file that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# Every field of a row that decides what the measurement is.
RowKey = tuple[str | int | float | None, ...]
_KEY = (
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


@dataclass(frozen=True)
class NeedleRow:
    """One prompt, what the model made of it, and how long that took.

    Attributes:
        model: Name or folder that the model was loaded from.
        method: The caller's label for the model as it ran.
        task: ``"single"`` or ``"multikey"``.
        haystack: Name or path of the haystack.
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
        return tuple(getattr(self, name) for name in _KEY)


def read_rows(paths: str | Path | Iterable[str | Path]) -> list[NeedleRow]:
    """Reads the rows of one or several JSONL files.

    Args:
        paths: A file, or several.

    Returns:
        The rows in order; an unfinished last line (a run that was killed) is left out.

    Raises:
        ValueError: If another line is not a row.
    """
    many = [paths] if isinstance(paths, str | Path) else list(paths)
    return [row for path in many for row in _parse(Path(path))[0]]


class RowFile:
    """A JSONL file that grows row by row; closed after each, so a killed run loses none.

    Args:
        path: The file; made, with its folders, if missing. An unfinished last line is cut off.

    Attributes:
        rows: The rows it held when it was opened, by key.

    Raises:
        ValueError: If the file cannot be written, or holds anything but rows.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                rows, end = _parse(self.path)
                file.truncate(end)
        except OSError as error:
            raise ValueError(
                f"out: expected a writable file, got {str(path)!r} ({error})"
            ) from error
        self.rows: dict[RowKey, NeedleRow] = {row.key: row for row in rows}

    def append(self, row: NeedleRow) -> None:
        """Adds one row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")


def _parse(path: Path) -> tuple[list[NeedleRow], int]:
    """Returns the finished rows and the length in bytes of what they take."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(data[:end].splitlines(), start=1):
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: expected a needle row in line {number} ({error})") from error
    return rows, end


def _row(content: object) -> NeedleRow:
    names = {field.name for field in fields(NeedleRow)}
    if not isinstance(content, dict) or set(content) != names:
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"expected the fields {sorted(names)}, got {found}")
    return NeedleRow(**content)
