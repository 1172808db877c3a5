"""The page that compares runs: complete in itself, each run against its own dense rows."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from result_rows import NEEDLE, RULER
from typer.testing import CliRunner

from lowcontext.cli import app
from lowcontext.eval.records import RulerRow
from lowcontext.eval.report import load_runs, write_report
from lowcontext.eval.ruler.summary import summarize_ruler


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return path


def run(score: float, dense: float) -> list[RulerRow]:
    rows = [replace(RULER, seed=seed, score=dense) for seed in range(20)]
    return rows + [replace(row, method="hip", score=score) for row in rows]


def cells(page: Path) -> list[list[str]]:
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page.read_text())
    return [re.findall(r"<td>(.*?)</td>", row) for row in rows]


def test_each_run_is_compared_with_its_own_dense_rows(tmp_path: Path) -> None:
    one = write(tmp_path / "a" / "ruler.jsonl", run(score=0.0, dense=1.0))
    two = write(tmp_path / "b" / "ruler.jsonl", run(score=0.0, dense=0.0))
    page = write_report(load_runs([one, two]), tmp_path / "page")
    found = {row[1]: row[5] for row in cells(page) if row and row[0] == "vt"}
    assert found == {
        "a/ruler: dense": "",
        "a/ruler: hip": "-100",
        "b/ruler: dense": "",
        "b/ruler: hip": "+0",
    }
    assert page.read_text().count('<tr class="below') == 2  # the task and all tasks together


def test_a_table_per_length_begins_with_all_tasks_together(tmp_path: Path) -> None:
    rows = [
        replace(RULER, task=task, length=length)
        for length in (16384, 4096)
        for task in ("vt", "fwe")
    ]
    page = write_report(load_runs([write(tmp_path / "r.jsonl", rows)]), tmp_path)
    assert re.findall(r"<h3>(\d+) tokens</h3>", page.read_text()) == ["4096", "16384"]
    assert [row[0] for row in cells(page) if row] == ["all", "vt", "fwe"] * 2


def test_the_page_needs_no_other_file_and_escapes_names(tmp_path: Path) -> None:
    files = [write(tmp_path / "r.jsonl", run(1.0, 1.0)), write(tmp_path / "n.jsonl", [NEEDLE])]
    text = write_report(load_runs(files), tmp_path / "page").read_text()
    sources = re.findall(r'(?:src|href)="(.{30})', text)
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<td>quest&lt;&amp;&gt;</td>" in text
    assert "<script" not in text
    assert "http" not in re.sub(r'src="[^"]*"', "", text)


def test_one_run_keeps_its_method_names_and_an_unfinished_line_is_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", run(1.0, 1.0))
    with file.open("a") as stream:
        stream.write('{"half')
    (loaded,) = load_runs([file])
    assert len(loaded.ruler) == 40
    page = write_report([loaded], tmp_path)
    assert {row[1] for row in cells(page) if row} == {"dense", "hip"}


def test_files_that_are_no_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="runs: expected at least one JSONL file, got none"):
        load_runs([])
    with pytest.raises(ValueError, match="runs: expected a JSONL file, got '.*nowhere"):
        load_runs([tmp_path / "nowhere.jsonl"])
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(ValueError, match="runs: expected at least one row, got none in"):
        load_runs([empty])
    empty.write_text("dear diary\n")
    with pytest.raises(ValueError, match="runs: expected JSON lines in"):
        load_runs([empty])
    empty.write_text('{"a": 1}\n')
    message = r"expected a ruler row in line 1 .* missing: \['answers', .*\], unknown: \['a'\]"
    with pytest.raises(ValueError, match=message):
        load_runs([empty])
    for measure in ("nll", "mass"):
        empty.write_text(f'{{"method": "dense", "{measure}": 1}}\n')
        with pytest.raises(ValueError, match="expected rows of needle or ruler in .* same command"):
            load_runs([empty])


def test_a_run_is_named_only_beside_another_of_its_kind(tmp_path: Path) -> None:
    long = replace(RULER, method=f"minference(patterns={'x' * 60}.json)")
    for name, rows in (("a", [RULER, long]), ("b", [RULER]), ("c", [NEEDLE])):
        write(tmp_path / f"{name}.jsonl", rows)
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    page = write_report(load_runs(paths), tmp_path / "all").read_text()
    assert "a: dense" in page
    assert "b: dense" in page
    assert "c: " not in page.partition("<h2>")[2]
    page = write_report(load_runs(paths[1:]), tmp_path / "two").read_text()
    assert "b: dense" not in page.partition("<h2>")[2]


def test_rows_of_a_file_that_were_made_otherwise_are_a_run_of_their_own(tmp_path: Path) -> None:
    one = run(score=0.0, dense=1.0)
    other = [replace(row, chunk=64, score=0.5) for row in one]
    file = write(tmp_path / "ruler.jsonl", [*one, *other])
    runs = load_runs([file])
    assert [(found.title, found.ruler) for found in runs] == [
        ("ruler#1 (chunk=None)", tuple(one)),
        ("ruler#2 (chunk=64)", tuple(other)),
    ]
    page = write_report(runs, tmp_path)
    assert {row[1]: (row[2], row[5]) for row in cells(page) if row and row[0] == "vt"} == {
        "ruler#1: dense": ("20", ""),
        "ruler#1: hip": ("20", "-100"),
        "ruler#2: dense": ("20", ""),
        "ruler#2: hip": ("20", "+0"),
    }
    assert "ruler#2 (chunk=64)" in page.read_text()


def test_rows_without_a_chunk_are_not_compared_with_dense_in_chunks() -> None:
    dense, hip = RULER, replace(RULER, method="hip", score=0.25)
    chunks = [replace(dense, chunk=64, score=0.0), replace(hip, chunk=64)]
    lines = summarize_ruler([dense, hip, *chunks])
    assert [line.difference for line in lines if line.task == "vt"] == [None, (0.25 * 2 - 1) / 2]


def test_tasks_and_haystacks_have_needle_tables_of_their_own(tmp_path: Path) -> None:
    right = replace(NEEDLE, method="dense", stats={"density_decode": 0.5})
    wrong = replace(right, task="multikey", correct=False, stats={"density_decode": 0.25})
    file = write(tmp_path / "needle.jsonl", [right, wrong])
    result = CliRunner().invoke(app, ["report", str(file), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    printed = " ".join(result.output.split())
    for task, score, decode in (("single", "100%", "50.0%"), ("multikey", "0%", "25.0%")):
        by_length, by_depth = printed.split(f"{task}, words: ")[1:]
        assert re.search(rf"dense 1024 {score} \S+ 25.0% {decode}", by_length)
        assert re.search(rf"dense {score}", by_depth)
    found = {row[0]: row[8] for row in cells(tmp_path / "report.html") if row}
    assert found == {"single": "50.0%", "multikey": "25.0%"}
