"""Commands that tests wait for, run at the same time: tests themselves run one after the other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


class AtOnce:
    """Started commands by name, each `python -m ...` in a process of its own."""

    def __init__(self, commands: dict[Any, list[str]], folder: Path, **env: str) -> None:
        # TRITON_INTERPRET of this process must not matter.
        kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")])
        self.folder = folder
        self.processes = {}
        for name, command in commands.items():
            with self._path(name, "out").open("w") as out, self._path(name, "err").open("w") as err:
                self.processes[name] = subprocess.Popen(
                    [sys.executable, "-m", *command],
                    cwd=ROOT,
                    env=kept | env,
                    stdout=out,
                    stderr=err,
                )

    def _path(self, name: Any, kind: str) -> Path:
        return self.folder / f"{name}.{kind}"

    def __getitem__(self, name: Any) -> subprocess.CompletedProcess[str]:
        """The result of a command, when it has ended."""
        code = self.processes[name].wait(timeout=600)
        out, err = (self._path(name, kind).read_text() for kind in ("out", "err"))
        return subprocess.CompletedProcess(str(name), code, out, err)


@contextmanager
def at_once(commands: dict[Any, list[str]], folder: Path, **env: str) -> Iterator[AtOnce]:
    """Starts the commands; ends those that nobody has waited for."""
    started = AtOnce(commands, folder, **env)
    try:
        yield started
    finally:
        for process in started.processes.values():
            process.kill()
            process.wait()


def wanted(request: pytest.FixtureRequest, parameter: str) -> list[Any]:
    """The values of a parameter with which the selected tests take this fixture."""
    items = (item for item in request.session.items if isinstance(item, pytest.Function))
    named = (item for item in items if request.fixturename in item.fixturenames)
    return list(dict.fromkeys(item.callspec.params[parameter] for item in named))
