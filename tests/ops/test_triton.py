"""The Triton backend: its cases in the interpreter, on a GPU where there is one, and its limits."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from at_once import AtOnce, at_once, wanted

from lowcontext.ops import triton as backend

pytest.importorskip("triton", reason="the Triton backend is optional")


def numbers(package: str) -> tuple[int, int]:
    """(major, minor) of an installed package, (0, 0) if there is none."""
    try:
        major, minor = version(package).split(".")[:2]
    except PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


# File of cases and the fewest of them that must pass.
CASES = {
    "triton_cases.py": 40,
    "triton_score_cases.py": 130,
    "triton_select_cases.py": 50,
    "triton_rotary_cases.py": 50,
}


def check(done: subprocess.CompletedProcess[str], file: str) -> None:
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) >= CASES[file]


def started(request: pytest.FixtureRequest, folder: Path, **env: str) -> Iterator[AtOnce]:
    command = ["pytest", "-x", "-p", "no:cacheprovider"]
    files = {file: [*command, f"tests/ops/{file}"] for file in wanted(request, "file")}
    with at_once(files, folder, **env) as found:
        yield found


@pytest.fixture(scope="module")
def interpreted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AtOnce]:
    """The cases of each file in the interpreter."""
    yield from started(
        request, tmp_path_factory.mktemp("cases"), TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""
    )


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AtOnce]:
    """The cases of each file on the GPU."""
    yield from started(request, tmp_path_factory.mktemp("cases"))


@pytest.mark.skipif(
    numbers("triton") < (3, 7) and numbers("numpy") >= (2, 4),
    reason="the interpreter of triton 3.6 needs numpy < 2.4",
)
@pytest.mark.parametrize("file", CASES)
def test_every_case_passes_in_the_interpreter(file: str, interpreted: AtOnce) -> None:
    check(interpreted[file], file)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("file", CASES)
def test_every_case_passes_on_the_gpu(file: str, compiled: AtOnce) -> None:
    check(compiled[file], file)


@pytest.mark.parametrize(
    ("shape", "dtype", "Dv", "reason"),
    [
        ((1, 1, 4, 64), torch.float64, 64, "dtype"),
        ((1, 1, 4, 64), torch.float32, 32, "value head_dim"),
        ((1, 1, 4, 512), torch.float32, 512, "larger than 256"),
    ],
)
def test_an_unsupported_problem_is_refused_with_its_reason(
    shape: tuple[int, ...], dtype: torch.dtype, Dv: int, reason: str
) -> None:
    q = torch.zeros(shape, dtype=dtype)
    assert reason in str(backend.supports("attention", q, q, q[..., :Dv], None))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backend.status() == "no CUDA device"


def test_a_machine_without_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "not installed" in str(backend.status())
