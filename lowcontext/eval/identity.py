"""Which method rows are of: a short label to show, and all settings to tell versions apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

# Name -> JSON value; {} where a caller named a method by a label alone, None in rows of versions
# that wrote no settings.
Settings = dict[str, Any]


class Described(Protocol):
    """What a model runs under, as `lowcontext.methods.Method`: ``str`` of it is its label."""

    @property
    def settings(self) -> Settings:
        """Everything that decides what it does, defaults included, as JSON values."""


class Labelled(Protocol):
    """A row."""

    @property
    def method(self) -> str: ...

    @property
    def settings(self) -> Settings | None: ...


def describe(method: str | Described) -> tuple[str, Settings]:
    """The label and the settings that the rows of a method carry."""
    return (method, {}) if isinstance(method, str) else (str(method), method.settings)


def settings_by_label(rows: Iterable[Labelled], place: str) -> dict[str, Settings | None]:
    """The settings of every label; refuses rows that share a label and not their settings.

    Raises:
        ValueError: Naming the settings that differ.
    """
    found: dict[str, Settings | None] = {}
    for row in rows:
        before = found.setdefault(row.method, row.settings)
        if before != row.settings:
            one, other = _apart(before, row.settings)
            raise ValueError(
                f"{place}: expected the same settings in all rows of {row.method}, got {one} and "
                f"{other}; keep them in files of their own"
            )
    return found


def check_method(method: str | Described, known: dict[str, Settings | None], place: str) -> None:
    """Refuses a method whose label stands in a file already, with other settings.

    Args:
        method: What is about to run.
        known: From `settings_by_label`.
        place: The file.

    Raises:
        ValueError: Naming the settings that differ.
    """
    label, settings = describe(method)
    before = known.get(label, settings)
    if before != settings:
        one, other = _apart(before, settings)
        raise ValueError(
            f"out: expected rows of {label} with {other} in {place!r}, got rows with {one}, which "
            "do not belong to this run; choose another folder"
        )


def _apart(one: Settings | None, other: Settings | None) -> tuple[str, str]:
    """What two settings do not have in common, as text."""
    return _told(one, other), _told(other, one)


def _told(settings: Settings | None, other: Settings | None) -> str:
    if settings is None:
        return "settings unknown (an older version wrote none)"
    if not settings:
        return "a label alone"
    if not other:
        return "all settings"
    own, before = _flat(settings), _flat(other)
    keys = [key for key in {**own, **before} if own.get(key, ...) != before.get(key, ...)]
    return ", ".join(f"{key}={own[key]!r}" if key in own else f"no {key}" for key in keys)


def _flat(settings: Settings, before: str = "") -> dict[str, Any]:
    """Settings with those of the halves of a method for two phases as `prefill.k`, `decode.k`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict)
        found |= _flat(value, f"{before}{key}.") if nested else {f"{before}{key}": value}
    return found
