"""Per-head patterns of MInference: the published JSON schema, read and written.

A file is an array over layers of objects over query heads, "0" .. "H - 1"; each value is
[pattern, a, b, score]. `score` is what the search measured and is not used. "tri_shape", "dense"
and "gain" are ours; the others are published.

    vertical_and_slash   a vertical lines, b slash lines
    stream_llm           a first keys, b recent keys (A-shape)
    tri_shape            the same, and the last queries dense
    block_sparse         the best key blocks; a and b are not used
    dense                everything; a and b are not used
    gain                 lines by attention per key read; at most a vertical and b / 64 slash lines
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PUBLISHED = ("vertical_and_slash", "stream_llm", "block_sparse")
KINDS = (*PUBLISHED, "tri_shape", "dense", "gain")
_SIZELESS = ("block_sparse", "dense")
# What the published code uses for a head that its file does not list.
PUBLISHED_DEFAULT = ("vertical_and_slash", 1000, 6096)


@dataclass(frozen=True)
class HeadPattern:
    """The pattern of one query head.

    Args:
        kind: one of `KINDS`.
        a, b: sizes; what they mean depends on the kind.
        score: what a search measured; informational.
    """

    kind: str
    a: int = 0
    b: int = 0
    score: float = 0.0

    def __str__(self) -> str:
        """The kind, and the sizes where it has any."""
        return self.kind if self.kind in _SIZELESS else f"{self.kind} {self.a} {self.b}"


Layer = tuple[HeadPattern, ...]


def read_patterns(source: str | Path | Sequence[Any], *, fill: bool = False) -> tuple[Layer, ...]:
    """Patterns of every layer from a file in the published schema, or from its contents.

    Args:
        source: path of the JSON file, or what it holds.
        fill: give heads that are missing in the middle the published default instead of raising.

    Raises:
        ValueError: the contents do not follow the schema; the message names the place.
    """
    if isinstance(source, (str, Path)):
        place = str(source)
        try:
            layers = json.loads(Path(source).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"patterns: {place}: expected JSON, got {error}") from error
    else:
        place, layers = "the given list", source
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
        raise ValueError(
            f"patterns: {place}: expected an array with one object per layer, got {_short(layers)}"
        )
    heads = max((len(layer) for layer in layers if isinstance(layer, dict)), default=0)
    return tuple(
        _read_layer(f"patterns: {place}: layer {i}", layer, heads, fill)
        for i, layer in enumerate(layers)
    )


def write_patterns(layers: Sequence[Layer], path: str | Path) -> Path:
    """Writes patterns in the published schema; returns the path."""
    table = [{str(h): [p.kind, p.a, p.b, p.score] for h, p in enumerate(layer)} for layer in layers]
    lines = [json.dumps(layer) for layer in table]
    target = Path(path)
    target.write_text("[" + ",\n ".join(lines) + "]\n", encoding="utf-8")
    return target


def _read_layer(place: str, layer: Any, heads: int, fill: bool) -> Layer:
    if not isinstance(layer, dict):
        raise ValueError(
            f"{place}: expected an object with one entry per head, got {_short(layer)}"
        )
    for key in layer:
        if not (isinstance(key, str) and key.isdecimal()):
            raise ValueError(f'{place}: expected heads "0" to "{heads - 1}", got {key!r}')
    if fill:
        heads = max(heads, 1 + max((int(key) for key in layer), default=-1))
    elif set(layer) != {str(h) for h in range(heads)}:
        wrong = [f'"{h}" is missing' for h in range(heads) if str(h) not in layer]
        wrong += [f'"{key}" is too many' for key in layer if int(key) >= heads]
        raise ValueError(
            f'{place}: expected heads "0" to "{heads - 1}" as in the other layers, '
            f"{', '.join(wrong[:4])}"
        )
    default = HeadPattern(*PUBLISHED_DEFAULT)
    return tuple(
        _read_head(f'{place}, head "{h}"', layer[str(h)]) if str(h) in layer else default
        for h in range(heads)
    )


def _read_head(place: str, entry: Any) -> HeadPattern:
    if not isinstance(entry, (list, tuple)) or len(entry) != 4:
        raise ValueError(f"{place}: expected [pattern, a, b, score], got {_short(entry)}")
    kind, a, b, score = entry
    if kind not in KINDS:
        raise ValueError(f"{place}: expected a pattern among {list(KINDS)}, got {kind!r}")
    for name, value in (("a", a), ("b", b)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{place}: {name}: expected an int of at least 0, got {value!r}")
    if kind in ("stream_llm", "tri_shape") and b < 1:
        raise ValueError(f"{place}: b: expected a window of at least 1 key, got {b}")
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise ValueError(f"{place}: score: expected a number, got {score!r}")
    return HeadPattern(kind, a, b, float(score))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
