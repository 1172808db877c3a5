"""Methods and their hyper-parameters from a YAML file."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from lowcontext.methods import Method, get_method


def read_sweep(path: Path) -> list[Method]:
    """The methods of a file: a list of NAME and of {name: NAME, option: value, ...}.

    A list as a value stands for its entries, one method for each; several such lists give all
    combinations, the last option changing fastest. An option whose value is itself a list is
    written as a list of it: `select_layers: [[2, 13]]`.

    Raises:
        ValueError, TypeError: the file is no such list, or a method refuses its options.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--sweep: expected a YAML file, got {str(path)!r} ({error})") from error
    if not isinstance(content, list) or not content:
        raise ValueError(
            "--sweep: expected a list, '- NAME' or '- {name: NAME, option: value}' on each line, "
            f"got {content!r} in {str(path)!r}"
        )
    found = []
    for number, entry in enumerate(content, start=1):
        try:
            found += _expanded(entry)
        except (ValueError, TypeError) as error:
            raise type(error)(f"--sweep: entry {number} of {str(path)!r}: {error}") from error
    return found


def _expanded(entry: Any) -> list[Method]:
    """One method, or all of a grid."""
    options = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        raise ValueError(f"expected NAME or {{name: NAME, option: value}}, got {entry!r}")
    grid = {key: value if isinstance(value, list) else [value] for key, value in options.items()}
    for key, values in grid.items():
        if not values:
            raise ValueError(f"{key}: expected at least one value, got []")
    return [
        get_method(**dict(zip(grid, values, strict=True))) for values in product(*grid.values())
    ]
