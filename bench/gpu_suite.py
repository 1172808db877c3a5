"""Runs the cases of the GPU suite in the order of their weight, within a time limit.

A case that fails, takes too long or does not fit leaves a row that says so, and the next one runs.
An error after which CUDA cannot be used, or a call that does not return, ends the process: it
starts itself again and goes on behind the case.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.device import Device
from bench.gpu_cases import Case, Ceilings, DecodeLists, Prefill, Row
from bench.gpu_methods import DecodeSteps, Prompt
from bench.monitor import Monitor
from bench.outcomes import Outcomes
from bench.timing import environment

K = 1024
SUITES = ("gpu", "tune")
# A case is not begun with less time left than this share of its limit.
_LEAST = 0.5


def suite_cases(suite: str) -> Iterator[Case]:
    """The cases of one of `SUITES`, the weightiest first."""
    if suite == "gpu":
        return cases()
    # It needs triton, which a benchmark on a CPU does without.
    from bench import gpu_tune

    return gpu_tune.cases()


def cases() -> Iterator[Case]:
    """Every case of the suite "gpu"."""
    seven = {"Hq": 28, "Hkv": 4}
    yield Ceilings()
    yield Prefill(32 * K)
    yield Prefill(128 * K)
    yield Prompt(128 * K, seconds=90)
    yield DecodeLists(128 * K, B=8)
    yield DecodeSteps(128 * K, seconds=60)
    yield Prompt(32 * K)
    yield DecodeSteps(1024 * K, seconds=30)
    yield Prompt(256 * K, seconds=40, rounds=2)
    yield Prefill(8 * K)
    yield DecodeSteps(32 * K)
    yield Prompt(64 * K)
    yield Prefill(32 * K, **seven)
    yield Prefill(32 * K, B=4)
    yield Prompt(512 * K, seconds=60, rounds=1)
    yield Prompt(1024 * K, seconds=120, rounds=1)
    yield DecodeLists(128 * K, B=8, **seven)
    yield Prefill(128 * K, **seven)
    yield DecodeSteps(128 * K, B=4)
    yield DecodeSteps(128 * K, **seven)
    yield Prompt(128 * K, seconds=40, **seven)
    yield Prompt(32 * K, B=4)
    yield DecodeLists(128 * K)
    yield Prefill(32 * K, flex=True, densities=(0.05, 0.1), seconds=60)
    yield Prefill(8 * K, B=4)
    yield Prefill(32 * K, B=4, **seven)
    yield Prefill(128 * K, B=4, seconds=30)
    yield Prefill(512 * K, densities=(0.02, 0.05), seconds=90)


@dataclass(frozen=True)
class Run:
    """One run of a suite.

    Args:
        device: where it runs.
        path: JSONL file of the rows, appended to.
        until: no case begins, or goes on, after this `time.time()`.
        only: run the cases whose name contains this.
        tests: JSONL file of the outcomes of the tests, or None.
        commit: of the tree, where git does not know it.
        suite: one of `SUITES`.
    """

    device: Device
    path: Path
    until: float
    only: str = ""
    tests: Path | None = None
    commit: str | None = None
    suite: str = "gpu"

    def all(self, chosen: list[Case], restart: Callable[[], None] | None = None) -> bool:
        """Runs the cases that have no row in the file yet, or one for which no time was left.

        False if a case of the file failed, was not done in time or gave a wrong output.

        Args:
            chosen: the cases.
            restart: ends this process and goes on in a new one; default `again`.
        """
        restart = restart or self.again
        done = self._done()
        where = environment() | self.device.versions()
        where["commit"] = where["commit"] or self.commit
        where["suite"] = self.suite + " dry run" * self.device.tiny
        outcomes = Outcomes.read(self.tests)
        monitor = None if self.device.tiny else Monitor()
        with self.path.open("a") as file:
            write = _Writer(file, where, outcomes, restart)
            if monitor is not None and not done:
                write({"section": "device", "case": "device", **monitor.device})
            for case in chosen:
                if self.only in case.name and case.name not in done:
                    self._one(case, write, monitor)
        if monitor is not None:
            monitor.stop()
        return not any(row.get("red") for row in self._rows_so_far())

    def again(self) -> None:
        """Replaces this process by one that goes on behind the rows in the file."""
        command = [sys.executable, "-m", "bench.run", "--suite", self.suite]
        command += ["--resume", str(self.path)]
        command += ["--limit", str(max(0.0, self.until - time.time())), "--only", self.only]
        if self.tests is not None:
            command += ["--tests", str(self.tests)]
        if self.commit is not None:
            command += ["--commit", self.commit]
        command += ["--dry-run"] * self.device.tiny
        sys.stdout.flush()
        os.execv(sys.executable, command)

    def _rows_so_far(self) -> list[Row]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [json.loads(line) for line in lines]

    def _done(self) -> set[str]:
        return {row["case"] for row in self._rows_so_far() if not row.get("open")}

    def _one(self, case: Case, write: _Writer, monitor: Monitor | None) -> None:
        label: Row = {"section": case.section, "case": case.name}
        left = self.until - time.time()
        free = self.device.free_bytes()
        if left < _LEAST * case.seconds:
            write({**label, "skipped": f"{max(0, left):.0f} s left", "open": True})
            return
        if free is not None and case.bytes > free:
            sizes = f"{case.bytes / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
            write({**label, "skipped": f"needs about {sizes}"})
            return
        run = case.shrunk() if self.device.tiny else case
        label |= {"shape": {"L": run.L, "Hq": run.Hq, "Hkv": run.Hkv, "B": run.B}}
        label["dtype"] = "bfloat16"
        limit = min(case.seconds, left)

        late = {**label, "skipped": f"not done after {limit:.0f} s", "red": True}
        watch = threading.Timer(limit, write.last, [late])
        watch.daemon = True
        watch.start()
        start = time.time()
        try:
            self._rows(run, label, write)
        except Exception as error:
            # Whatever a case raises, the others shall run; a dry run is there to raise.
            if self.device.tiny:
                raise
            traceback.print_exc()
            reason = (str(error) or type(error).__name__).splitlines()[0][:300]
            write({**label, "skipped": f"{type(error).__name__}: {reason}", "red": True})
            # The frames of the traceback hold the tensors of the case.
            error.__traceback__ = None
        finally:
            watch.cancel()
        gc.collect()
        end = {**label, "seconds": time.time() - start}
        end |= monitor.since(start) if monitor is not None else {}
        if self.device.broken():
            write.last(end)
        write(end)

    @torch.inference_mode()
    def _rows(self, case: Case, label: Row, write: _Writer) -> None:
        for row in case.rows(self.device):
            write({**label, **row})


class _Writer:
    """Writes rows to the file at once, and a line for each to the console."""

    def __init__(
        self, file: Any, where: Row, outcomes: Outcomes, restart: Callable[[], None]
    ) -> None:
        self.file, self.where, self.outcomes, self.restart = file, where, outcomes, restart
        self.console = Console()
        self.lock = threading.Lock()

    def __call__(self, row: Row) -> None:
        """Writes one row; `needs` becomes the state of the tests it names."""
        with self.lock:
            self._write(row)

    def last(self, row: Row) -> None:
        """Writes one row and starts again; no other thread can be within a row then."""
        with self.lock:
            self._write(row)
            self.restart()

    def _write(self, row: Row) -> None:
        needs = row.pop("needs", ())
        if needs:
            row["tests"] = self.outcomes.state(needs)
        self.file.write(json.dumps({**row, **self.where}) + "\n")
        self.file.flush()
        self.console.print(line(row), soft_wrap=True, highlight=False, markup=False)


def line(row: Row) -> str:
    """One row for the eye."""
    text = f"{row['case']:28s} {row.get('candidate', ''):24s}"
    if "p50_ms" in row:
        text += f" {row['p50_ms']:9.3f} ms"
    for key, title in (
        ("density", "density"),
        ("speedup_over_dense", "x dense"),
        ("speedup_over_table", "x table"),
        ("efficiency", "efficiency"),
        ("select_share", "select"),
        ("tflops", "TFLOP/s"),
        ("gb_per_s", "GB/s"),
        ("bandwidth_share", "of copy"),
    ):
        if row.get(key) is not None:
            text += f"  {title} {row[key]:.3g}"
    for key in ("tests", "skipped"):
        if row.get(key) not in (None, "passed"):
            text += f"  {key}: {row[key]}"
    return text
