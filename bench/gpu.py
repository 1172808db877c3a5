"""Everything that needs a GPU, in one run: build, correctness, benchmarks, memory checks.

    python -m bench.gpu --out bench/results

Nothing need be installed but what `REQUIRED` names; the package runs from the source tree. Every
stage has a time limit; one that fails or is ended costs the later ones nothing, and what it wrote
until then stays. A figure whose kernels did not pass their tests says so in its row. `--out` gets:

    summary.json              exit code and seconds of each stage
    build.log test.log bench.log sanitizer.log
    tests.jsonl               a line per test: outcome, and the kernels that it covers
    gpu-TIME.jsonl            a line per figure
    tune-TIME.jsonl           a line per tile size, from the stage `tune`, which `--only` asks for
    tables.md                 the tables of docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Module: what pip calls it.
REQUIRED = {
    "torch": "torch",
    "triton": "triton",
    "numpy": "numpy",
    "transformers": "transformers",
    "einops": "einops",
    "typer": "typer",
    "rich": "rich",
    "yaml": "pyyaml",
    "pytest": "pytest",
    "ninja": "ninja",
}
TESTS = [
    "tests/ops/test_gpu.py",
    "tests/integrations/test_methods_on_gpu.py",
    *(f"tests/ops/triton_{kind}cases.py" for kind in ("", "score_", "select_")),
]
# Bytes of a log that are kept, its end.
_LOG_BYTES = 8 * 2**20
_OK, _ENDED = 0, "ended at its limit"


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        name: what `--only` takes.
        command: what runs in the root of the sources.
        log: file under `--out` that its output is appended to.
        least: seconds that are kept for it.
        most: seconds after which it is ended.
        plans: whether it takes `--limit SECONDS` and begins only what it can finish.
        asked: whether it runs only where `--only` names it.
    """

    name: str
    command: list[str]
    log: str
    least: float
    most: float
    plans: bool = False
    asked: bool = False


@dataclass(frozen=True)
class Result:
    """How a stage went: its exit code, or why it has none."""

    name: str
    exit: int | str
    seconds: float

    @property
    def green(self) -> bool:
        """Whether it succeeded."""
        return self.exit == _OK


def stages(out: Path, commit: str | None) -> list[Stage]:
    """The stages in their order, the benchmarks before what can leave a GPU unusable."""
    python = [sys.executable, "-m"]
    # Compiling the kernels takes longer than running them.
    workers = ["-n", str(min(12, os.cpu_count() or 1))] if find_spec("xdist") else []
    outcomes = ["-p", "bench.outcomes", "--outcomes", str(out / "tests.jsonl")]
    test = [*python, "pytest", *workers, *outcomes, "--durations=15", *TESTS]
    bench = [*python, "bench.run", "--out", str(out), "--tests", str(out / "tests.jsonl")]
    bench += ["--commit", commit] * (commit is not None)
    # `info` says which backends run here, and why the others do not.
    build = ["sh", "-ec", '"$0" setup.py --quiet build_ext --inplace; "$0" -m lowcontext.cli info']
    found = [
        Stage("build", [*build, sys.executable], "build.log", 20, 90),
        Stage("test", test, "test.log", 60, 170),
        Stage("bench", [*bench, "--suite", "gpu"], "bench.log", 120, 420, plans=True),
        Stage("tune", [*bench, "--suite", "tune"], "bench.log", 90, 540, plans=True, asked=True),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    small = [*python, "pytest", "-p", "no:cacheprovider", "-m", "small", TESTS[0]]
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck") if sanitizer else ():
        least = 45 if tool in ("memcheck", "racecheck") else 0
        options = ["--tool", tool, "--error-exitcode", "1", "--print-limit", "50"]
        # Without torch's cache an access behind the end of a tensor is one behind its allocation.
        alone = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
        command = [*alone, sanitizer or "", *options, *small]
        found.append(Stage(tool, command, "sanitizer.log", least, 90))
    tables = [*python, "bench.compare", str(out), "--out", str(out / "tables.md")]
    return [*found, Stage("tables", tables, "bench.log", 10, 30)]


def run(stage: Stage, out: Path, seconds: float) -> Result:
    """Runs a stage, with all it starts, for at most so many seconds."""
    start = time.monotonic()
    command = stage.command
    if stage.plans:
        # Some time is left to write the last row.
        command = [*command, "--limit", str(int(seconds - 10))]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    with (out / stage.log).open("ab") as log:
        log.write(f"\n== {stage.name}: {' '.join(command)}\n".encode())
        log.flush()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
            )
        except OSError as error:
            return Result(stage.name, str(error), 0.0)
        try:
            code: int | str = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            code = _ENDED
        _end(process)
    return Result(stage.name, code, time.monotonic() - start)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it has started, which is one group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def run_all(chosen: list[Stage], out: Path, minutes: float) -> list[Result]:
    """Runs the stages, each with what its successors leave, and writes the summary after each."""
    until = time.monotonic() + 60 * minutes
    results: list[Result] = []
    for number, stage in enumerate(chosen):
        kept = sum(each.least for each in chosen[number + 1 :])
        seconds = min(stage.most, until - time.monotonic() - kept)
        if seconds < stage.least or seconds < 5:
            results.append(Result(stage.name, "no time left", 0.0))
        else:
            results.append(run(stage, out, seconds))
            _keep_end(out / stage.log)
        last = results[-1]
        print(f"{last.name}: exit {last.exit} after {last.seconds:.0f} s", flush=True)
        summary = [{**asdict(each), "green": each.green} for each in results]
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return results


def _keep_end(path: Path) -> None:
    data = path.read_bytes()
    if len(data) > _LOG_BYTES:
        path.write_bytes(b"(the beginning is cut off)\n" + data[-_LOG_BYTES:])


def missing() -> list[str]:
    """Packages that the stages import and this Python does not have."""
    return [package for module, package in REQUIRED.items() if find_spec(module) is None]


def main() -> int:
    """Runs the stages; 0 if all were green."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of results")
    parser.add_argument("--only", default="", help="stages to run, separated by commas")
    parser.add_argument("--minutes", type=float, default=8.5, help="of the whole run")
    parser.add_argument("--commit", help="commit of the sources, where there is no git")
    options = parser.parse_args()
    if missing():
        names = " ".join(missing())
        parser.error(
            f"expected packages that are not installed: {names}. Where there is no network, bring "
            f"a folder made by `pip install --target DIR {names}` and name it in PYTHONPATH"
        )
    import torch

    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, got none")
    out = options.out.absolute()
    chosen = stages(out, options.commit)
    names = [stage.name for stage in chosen]
    unasked = [stage.name for stage in chosen if not stage.asked]
    only = options.only.split(",") if options.only else unasked
    for name in only:
        if name not in names:
            parser.error(f"--only: expected some of {','.join(names)}, got {name!r}")
    out.mkdir(parents=True, exist_ok=True)
    results = run_all([s for s in chosen if s.name in only], out, options.minutes)
    tables = out / "tables.md"
    if tables.exists():
        print(tables.read_text())
    return 0 if all(result.green for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
