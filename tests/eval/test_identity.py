"""Rows know all settings of their method, so a changed default is not taken for the old one."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from result_rows import NEEDLE, RULER
from typer.testing import CliRunner

from lowcontext.cli import app
from lowcontext.eval.records import NeedleRow, RowFile, RulerRow, read_rows
from lowcontext.methods import combine, get_method, method_class
from lowcontext.methods.streaming_llm import StreamingLLM

RUNS = {
    "needle": ["--lengths", "256", "--depths", "1"],
    "ruler": ["--lengths", "512", "--tasks", "fwe", "--samples", "1"],
    "perplexity": ["--text", "TEXT", "--lengths", "64", "--windows", "1"],
    "fidelity": ["--prompt", "TEXT", "--max-length", "64", "--steps", "2"],
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("the sky is clear and the road is long . " * 30)
    return path


@dataclass(frozen=True)
class Later(StreamingLLM):
    """The method as a version with another default has it."""

    window: int = 32


def run(
    command: str,
    checkpoint: Path | str,
    text: Path,
    out: Path,
    method: str = "streaming_llm:sink=2",
) -> tuple[int, str]:
    options = [str(text) if option == "TEXT" else option for option in RUNS[command]]
    arguments = [command, str(checkpoint), *options, "-m", "dense", "-m", method]
    arguments += ["--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output.replace("\n", " ")


def methods_in(path: Path) -> list[tuple[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return list(dict.fromkeys((row["method"], row["settings"].get("window")) for row in found))


@pytest.mark.parametrize("command", RUNS)
def test_rows_of_another_default_are_refused_and_not_reused(
    checkpoint: Path, text: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = tmp_path / "out", tmp_path / "out" / f"{command}.jsonl"
    code, output = run(command, checkpoint, text, out)
    assert code == 0, output
    assert methods_in(file) == [("dense", None), ("streaming_llm(sink=2)", 1024)]
    kept = file.read_bytes()
    for folder in (checkpoint, f"{checkpoint}/"):
        code, output = run(command, folder, text, out)
        assert (code, file.read_bytes()) == (0, kept), output

    known = {"dense": method_class("dense"), "streaming_llm": Later}
    monkeypatch.setattr("lowcontext.methods.method_class", known.__getitem__)
    code, output = run(command, checkpoint, text, out)
    assert code == 1
    assert "out: expected rows of streaming_llm(sink=2) with window=32 in" in output
    assert f"{command}.jsonl', got rows with window=1024, which do not belong to this run" in output
    assert "choose another folder" in output
    assert file.read_bytes() == kept
    assert run(command, tmp_path / "nowhere", text, out) == (1, output)  # no model is loaded
    # A method with a label of its own finds room there, and the same one elsewhere.
    assert run(command, checkpoint, text, out, "streaming_llm:sink=1")[0] == 0
    assert methods_in(file)[2:] == [("streaming_llm(sink=1)", 32)]
    assert run(command, checkpoint, text, tmp_path / "new")[0] == 0
    assert methods_in(tmp_path / "new" / f"{command}.jsonl")[1] == ("streaming_llm(sink=2)", 32)


@pytest.mark.parametrize("command", ["needle", "ruler", "perplexity"])
def test_rows_of_a_version_without_settings_are_read_and_not_continued(
    checkpoint: Path, text: Path, tmp_path: Path, command: str
) -> None:
    out, file = tmp_path / "out", tmp_path / "out" / f"{command}.jsonl"
    assert run(command, checkpoint, text, out)[0] == 0
    old = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        del row["settings"]
        old.append(json.dumps(row) + "\n")
    file.write_text("".join(old))
    code, output = run(command, checkpoint, text, out)
    assert code == 1
    assert "out: expected rows of dense with all settings in" in output
    assert "got rows with settings unknown (an older version wrote none)" in output
    assert file.read_text() == "".join(old)
    if command != "perplexity":
        arguments = ["report", str(file), "--out", str(tmp_path / "report")]
        assert CliRunner().invoke(app, arguments).exit_code == 0


def test_a_file_with_two_settings_under_one_label_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "needle.jsonl"
    book = RowFile(path, NeedleRow)
    row = replace(NEEDLE, method="quest", settings={"name": "quest", "page": 16, "budget": 64})
    book.append(row)
    book.append(replace(row, sample=1, settings={"name": "quest", "page": 4}))
    message = r"needle.jsonl: expected the same settings in all rows of quest, got page=16, budget="
    with pytest.raises(ValueError, match=message + "64 and page=4, no budget; keep them in"):
        read_rows(path)
    with pytest.raises(ValueError, match=message):
        RowFile(path, NeedleRow, get_method("dense"))
    # In files of their own they are one call's rows all the same.
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    one.write_text(lines[0])
    other.write_text(lines[1])
    assert len(read_rows(one)) == len(read_rows(other)) == 1
    with pytest.raises(ValueError, match="one.jsonl, .*other.jsonl: expected the same settings"):
        read_rows([one, other])


def test_a_label_alone_goes_on_under_that_label_and_not_as_a_method(tmp_path: Path) -> None:
    path = tmp_path / "ruler.jsonl"
    RowFile(path, RulerRow).append(replace(RULER, method="dense", settings={}))
    assert len(RowFile(path, RulerRow, "dense").rows) == 1
    with pytest.raises(ValueError, match="dense with all settings in .* with a label alone"):
        RowFile(path, RulerRow, get_method("dense"))


def test_settings_name_every_field_of_both_phases() -> None:
    both = combine(prefill=get_method("hip"), decode=get_method("tidaldecode"))
    found = both.settings
    assert found == json.loads(json.dumps(found))
    assert (found["name"], found["prefill"]["name"]) == ("phases", "hip")
    assert (found["prefill"]["refresh"], found["decode"]["select_layers"]) == (8, [2, 13])


def test_a_setting_of_one_phase_is_named_with_its_phase(tmp_path: Path) -> None:
    path = tmp_path / "needle.jsonl"
    made = combine(prefill=get_method("dense"), decode=get_method("quest"))
    old = {**made.settings, "decode": {**made.settings["decode"], "page": 99}}
    RowFile(path, NeedleRow).append(replace(NEEDLE, method=str(made), settings=old))
    with pytest.raises(ValueError, match="with decode.page=16 in .* got rows with decode.page=99,"):
        RowFile(path, NeedleRow, made)
