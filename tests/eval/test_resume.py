"""A run that dies by SIGKILL, and the same command again, give the rows of a run that does not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lowcontext.cli import app

# Kills its own process in the middle of an answer: nothing can be cleaned up or flushed.
KILLED = """
import os, signal, sys
from lowcontext.cli import app
from lowcontext.eval.generation import TokenClock

class Fatal(TokenClock):
    started = 0

    def __init__(self):
        Fatal.started += 1
        super().__init__()

    def __call__(self, input_ids, scores):
        if Fatal.started == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(input_ids, scores)

import lowcontext.eval.generation
lowcontext.eval.generation.TokenClock = Fatal
app(sys.argv[2:])
"""
NEEDLE = ["--depths", "2", "--samples", "2", "--task", "multikey"]
RULER = ["--tasks", "niah_multikey_1,fwe", "--samples", "2"]


def timeless(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for name in ("ttft_s", "tpot_s", "peak_mib"):
            row.pop(name, None)
    return rows


@pytest.mark.parametrize(("command", "options"), [("needle", NEEDLE), ("ruler", RULER)])
def test_a_run_killed_halfway_and_resumed_gives_the_rows_of_a_whole_run(
    checkpoint: Path, tmp_path: Path, command: str, options: list[str]
) -> None:
    arguments = [command, str(checkpoint), "--lengths", "512", *options]
    arguments += ["-m", "dense", "-m", "streaming_llm:window=128"]

    def run(folder: Path) -> None:
        result = CliRunner().invoke(app, [*arguments, "--out", str(folder)])
        assert result.exit_code == 0, result.output

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole)
    # Dies in the ninth: a warm-up and four prompts of dense, a warm-up and two of the next method.
    died = subprocess.run(
        [sys.executable, "-c", KILLED, "9", *arguments, "--out", str(cut)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    name = f"{command}.jsonl"
    expected = timeless(whole / name)
    assert len(expected) == 8
    assert timeless(cut / name) == expected[:6]
    kept = (cut / name).read_bytes()
    run(cut)
    assert timeless(cut / name) == expected
    assert (cut / name).read_bytes().startswith(kept)
