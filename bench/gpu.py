"""Everything that needs a GPU, in one run: build, correctness, memory checks, benchmarks.

    python -m bench.gpu --out bench/results

Needs no installation: the package runs from the source tree.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

app = typer.Typer(add_completion=False)
ROOT = Path(__file__).parent.parent
CASES = "tests/ops/test_gpu.py"


def stages(out: Path) -> dict[str, list[str]]:
    """The commands, by name, in order."""
    python = sys.executable
    commands = {
        "build": [python, "setup.py", "build_ext", "--inplace"],
        "test": [python, "-m", "pytest", CASES],
    }
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        small = [python, "-m", "pytest", CASES, "-k", "small"]
        for tool in ("memcheck", "racecheck"):
            commands[tool] = [sanitizer, "--tool", tool, "--error-exitcode", "1", *small]
    commands["bench"] = [python, "-m", "bench.run", "--suite", "gpu", "--out", str(out)]
    return commands


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of the JSONL file.")] = Path("bench/results"),
    only: Annotated[str, typer.Option(help="Run this stage alone.")] = "",
) -> None:
    """Runs the stages in order and stops at the first that fails."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("bench.gpu: expected a CUDA device, got none")
    commands = stages(out.absolute())
    if only and only not in commands:
        raise typer.BadParameter(f"--only: expected one of {list(commands)}, got {only!r}")
    for name, command in commands.items():
        if only in ("", name):
            start = time.perf_counter()
            code = subprocess.run(command, cwd=ROOT, check=False).returncode
            print(f"{name}: exit {code} after {time.perf_counter() - start:.0f} s", flush=True)
            if code:
                raise typer.Exit(code)


if __name__ == "__main__":
    app()
