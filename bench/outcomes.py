"""Which tests passed: written by pytest as it runs, read by the benchmarks they stand behind.

    pytest -p bench.outcomes --outcomes tests.jsonl tests/ops/test_gpu.py

A test says which kernels it covers by `@pytest.mark.ops("attend")`; one with a parameter `method`
also covers "method NAME".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    """Adds --outcomes."""
    parser.addoption("--outcomes", type=Path, default=None, help="JSONL file of test outcomes")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Puts what a test covers into its report, which also travels between processes."""
    for item in items:
        covered = [name for mark in item.iter_markers("ops") for name in mark.args]
        method = getattr(item, "callspec", None) and item.callspec.params.get("method")
        if isinstance(method, str):
            covered.append(f"method {method}")
        item.user_properties.append(("ops", covered))


def pytest_configure(config: Any) -> None:
    """Writes reports where --outcomes says; with several processes, in the one that collects."""
    path = config.getoption("outcomes")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(path))


class _Writer:
    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        row = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            "ops": dict(report.user_properties).get("ops", []),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


@dataclass(frozen=True)
class Outcomes:
    """Tests that passed and failed, by what they cover.

    Args:
        passed, failed: number of tests by name of what they cover.
    """

    passed: dict[str, int]
    failed: dict[str, int]

    @classmethod
    def read(cls, path: Path | None) -> Outcomes:
        """The outcomes in a file; none where there is no file."""
        passed: dict[str, int] = {}
        failed: dict[str, int] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                counts = {"passed": passed, "failed": failed}.get(row["outcome"])
                for name in row["ops"] if counts is not None else ():
                    counts[name] = counts.get(name, 0) + 1
        return cls(passed, failed)

    def state(self, needs: tuple[str, ...]) -> str:
        """ "passed", or which of the needed tests failed or did not run."""
        failed = [name for name in needs if self.failed.get(name)]
        absent = [name for name in needs if not self.passed.get(name) and name not in failed]
        said = [f"failed: {', '.join(failed)}"] * bool(failed)
        said += [f"not run: {', '.join(absent)}"] * bool(absent)
        return "; ".join(said) or "passed"
