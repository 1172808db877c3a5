"""The sweep of tile sizes: on the CPU, interpreted, with kernels compiled for sm_80."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend is optional")

from triton.backends.compiler import GPUTarget

from bench import compare, gpu_tune
from bench.device import Device
from bench.gpu_tune import DecodeSweep, PrefillSweep, Sweep
from bench.kernels_report import Config
from lowcontext import sparse_attention
from lowcontext.ops.triton import resources
from lowcontext.ops.triton.launch import Target, Tiles, plan

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    platform.system() != "Linux", reason="triton ships its assembler for Linux alone"
)


def test_a_dry_run_compiles_checks_and_times_tiles_beside_those_of_the_table(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "bench.run", "--suite", "tune", "--dry-run"]
    done = subprocess.run(
        [*command, "--only", "D=64", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = compare.figures([tmp_path])
    measured = [row for row in rows if "p50_ms" in row]
    assert {row["section"] for row in measured} == {"tune prefill", "tune decode"}
    for row in measured:
        assert row["spilled"] == 0, row
        assert row["registers"] > 0, row
        assert row["tests"] == "not run: attend", row
        tiles = Tiles(**row["tiles"])
        sweep = PrefillSweep(D=64) if row["section"] == "tune prefill" else DecodeSweep(D=64)
        if tiles == sweep.table(80):
            assert row["speedup_over_table"] == 1.0, row
        else:
            assert tiles in sweep.sizes(), row
    text = "\n".join(compare.tables(rows))
    assert "x table" in text
    assert "registers" in text


@pytest.mark.parametrize("sweep", list(gpu_tune.cases()), ids=lambda sweep: sweep.name)
def test_what_is_compiled_ahead_is_what_a_call_looks_up(sweep: Sweep) -> None:
    target = GPUTarget("cuda", 90, 32)
    table = sweep.table(90)
    assert table in sweep.sizes()
    ahead, *_ = sweep.config.launches(90, table)
    for group in sweep.shrunk().problems(Device("cpu")).values():
        for problem in group:
            called, *_ = plan(problem, Target(90, 132), table)[0]
            assert called.options == ahead.options
            sources = [resources.source(launch, target) for launch in (called, ahead)]
            assert sources[0].hash() == sources[1].hash()


def test_sizes_without_a_kernel_say_why() -> None:
    config = Config("decode", "bfloat16", 64, "pages", 4)
    odd, good = Tiles(16, 48, 4, 2), Tiles(16, 32, 4, 2)
    found = gpu_tune.compiled(config, [odd, good], 80, 200.0)
    assert found[odd] == {"failed": "not compiled: CompilationError"}
    assert found[good]["spilled"] == 0
    large = Tiles(16, 128, 8, 5)
    found = gpu_tune.compiled(replace(config, D=128), [large], 86, 200.0)
    assert found[large]["failed"].endswith("bytes of shared memory")
    found = gpu_tune.compiled(config, [good], 80, 0.0)
    assert found == {good: {"failed": "not compiled in time"}}


def test_sizes_are_timed_where_that_of_the_table_has_no_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = PrefillSweep(D=64).shrunk()
    assert isinstance(sweep, Sweep)
    ((first, *_),) = sweep.problems(Device("cpu")).values()
    assert first.index is not None
    out = sparse_attention(first.q, first.k, first.v, first.index, scale=first.scale)
    monkeypatch.setattr(gpu_tune, "solve", lambda *_: out)
    table, other = sweep.table(80), Tiles(64, 32, 4, 2)
    reports = {table: {"failed": "not compiled in time"}, other: {"spilled": 0}}
    refused, row = sweep._problem(Device("cpu"), [first], Target(80, 8), reports)
    assert "not compiled in time" in str(refused)
    assert row["p50_ms"] > 0
    assert "speedup_over_table" not in row


def test_an_output_without_one_of_many_keys_is_far_from_the_right_one() -> None:
    gen = torch.Generator().manual_seed(0)
    v = torch.randn(2000, 64, generator=gen)
    right = v.mean(0, keepdim=True)
    assert gpu_tune._apart(right.bfloat16(), right) < gpu_tune._APART
    assert gpu_tune._apart(v[1:].mean(0, keepdim=True), right) > gpu_tune._APART
    assert not gpu_tune._apart(right * float("nan"), right) <= gpu_tune._APART
