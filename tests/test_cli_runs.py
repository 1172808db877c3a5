"""Sweep files, limits and refusals of the commands that run methods."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lowcontext import _cli_parse as parse
from lowcontext._cli_sweep import read_sweep
from lowcontext.cli import app
from lowcontext.eval import write_retrieval_checkpoint

TEXT = "the sky is clear and the road is long . " * 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_retrieval_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def run(*args: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert "Traceback" not in result.output
    return result.exit_code, result.output.replace("\n", " ")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lists_in_a_sweep_give_all_combinations(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "- dense\n"
        "- {name: quest, budget: [512, 1024], dense_layers: [0, 1]}\n"
        "- name: tidaldecode\n"
        "  select_layers: [[1, 2]]\n"
    )
    found = read_sweep(file)
    assert [one.name for one in found] == ["dense", *["quest"] * 4, "tidaldecode"]
    assert [(one.budget, one.dense_layers) for one in found[1:5]] == [  # type: ignore[attr-defined]
        (512, 0),
        (512, 1),
        (1024, 0),
        (1024, 1),
    ]
    assert list(found[5].select_layers) == [1, 2]  # type: ignore[attr-defined]


def test_a_method_that_is_named_twice_runs_once(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("[quest, dense, {name: quest, budget: 2048}, {name: quest, budget: 64}]")
    found = parse.methods("dense", ["dense", "streaming_llm"], file)
    assert [str(one) for one in found] == ["dense", "streaming_llm", "quest", "quest(budget=64)"]
    assert [str(one) for one in parse.methods("", None, None)] == ["dense"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a list, '- NAME' or '- {name: NAME, option: value}' on each line, got None"),
        ("name: quest", "expected a list, .* got {'name': 'quest'}"),
        ("- [", "expected a YAML file, got .*sweep.yaml"),
        ("- dense\n- qest", "entry 2 of .*sweep.yaml': method: expected one of .'block_topk'"),
        ("- {budget: 64}", "entry 1 of .*: expected NAME or {name: NAME, option: value}, got"),
        ("- {name: quest, bugdet: 64}", "expected hyper-parameters among .* got 'bugdet'"),
        ("- {name: quest, budget: 0}", "entry 1 of .* budget: expected at least"),
        ("- {name: quest, budget: []}", r"budget: expected at least one value, got \[\]"),
    ],
)
def test_a_sweep_that_cannot_run_says_which_entry_and_why(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(content)
    with pytest.raises((ValueError, TypeError), match=f"--sweep: .*{message}"):
        read_sweep(file)


def test_a_sweep_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--sweep: expected a YAML file, got .*nowhere.yaml"):
        read_sweep(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("command", "count"),
    [
        (["needle", "--lengths", "512", "--depths", "2", "--limit", "1"], 1),
        (["ruler", "--lengths", "512", "--tasks", "niah_single_1,fwe", "--limit", "3"], 3),
        (
            ["perplexity", "--text", "TEXT", "--lengths", "200", "--windows", "1", "--chunk", "64"],
            1,
        ),
        (["fidelity", "--prompt", "TEXT", "--max-length", "128"], 12),  # 3 layers of 4 heads
    ],
)
def test_commands_run_the_methods_of_a_sweep_within_the_limit(
    checkpoint: Path, tmp_path: Path, command: list[str], count: int
) -> None:
    sweep, text, out = tmp_path / "sweep.yaml", tmp_path / "book.txt", tmp_path / "out"
    sweep.write_text("- dense\n- {name: streaming_llm, window: [32, 64]}\n")
    text.write_text(TEXT)
    command = [str(text) if arg == "TEXT" else arg for arg in command]
    maps = ["--device-map", "auto", "--dtype", "float32"]
    code, output = run(command[0], checkpoint, *command[1:], *maps, "--sweep", sweep, "--out", out)
    assert code == 0, output
    labels = ["dense", "streaming_llm(window=32)", "streaming_llm(window=64)"]
    found = [row["method"] for row in rows(out / f"{command[0]}.jsonl")]
    assert found == [label for label in labels for _ in range(count)]


def test_a_device_map_and_a_dtype_reach_the_model(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    given: list[dict[str, Any]] = []
    load = AutoModelForCausalLM.from_pretrained

    def spy(folder: str, **options: Any) -> Any:
        given.append(options)
        return load(folder, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    model, _ = parse.load_model(str(checkpoint), "bfloat16", "auto", "balanced")
    assert {str(p.dtype) for p in model.parameters()} == {"torch.bfloat16"}
    parse.load_model(str(checkpoint), "auto", "cpu")
    assert [options["device_map"] for options in given] == ["balanced", None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device-map", "all"], "--device-map: expected one of auto, balanced"),
        (["--device-map", "auto", "--device", "cpu"], "expected it without --device, got"),
        (["--dtype", "int8"], "--dtype: expected one of auto, float32, bfloat16, float16"),
        (["-m", "qest"], "method: expected one of ['block_topk', "),
        (["--lengths", "256k"], "the model's max_position_embeddings), got 262144; drop it"),
    ],
)
def test_options_that_cannot_work_say_what_would(
    checkpoint: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    for command in ("needle", "ruler"):
        code, output = run(command, checkpoint, "--out", tmp_path, *options)
        assert code == 1
        assert message in output
        assert not list(tmp_path.iterdir())


def test_a_wrong_model_path_says_where_models_come_from(tmp_path: Path) -> None:
    for folder in ("org/name", str(tmp_path)):
        code, output = run("ruler", folder, "--out", tmp_path / "out")
        assert code == 1
        assert f"model: expected a folder with a config.json, got {folder!r}" in output
        assert "hf download OWNER/NAME --local-dir FOLDER" in output


def test_an_output_folder_that_is_a_file_is_named_before_anything_runs(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.write_text("")
    for command in ("needle", "ruler"):
        code, output = run(command, checkpoint, "--lengths", "1k", "--out", out)
        assert code == 1
        assert f"out: expected a writable file, got '{out}/{command}.jsonl'" in output
        assert "choose another folder" in output


def test_a_full_disk_stops_a_run_that_a_second_one_continues(
    checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "needle.jsonl"
    args = ["needle", checkpoint, "--lengths", "512", "--depths", "3", "--out", tmp_path]
    code = (
        "import resource, sys\n"
        "from lowcontext.cli import app\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"  # two rows, not three
        "app(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    message = done.stderr.replace("\n", " ")
    assert f"out: could not append to '{file}'" in message
    assert "make room and run the same command again" in message
    written = file.read_text()
    kept = [json.loads(line) for line in written[: written.rfind("\n") + 1].splitlines()]
    assert 1 <= len(kept) < 3
    status, output = run(*args)
    assert status == 0, output
    assert rows(file)[: len(kept)] == kept
    assert [row["depth"] for row in rows(file)] == [0.0, 50.0, 100.0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
@pytest.mark.parametrize(
    ("command", "name"), [("needle", "needle.png"), ("ruler", "ruler-density.png")]
)
def test_a_picture_that_does_not_fit_is_named_and_the_rows_are_kept(
    checkpoint: Path, tmp_path: Path, command: str, name: str
) -> None:
    os.symlink("/dev/full", tmp_path / name)
    args = ["--lengths", "512", "--limit", "1", "--out", tmp_path]
    code, output = run(command, checkpoint, *args)
    assert code == 1
    assert f"--out: could not write '{tmp_path}" in output
    assert "No space left on device" in output
    assert "the rows are kept" in output
    assert len(rows(tmp_path / f"{command}.jsonl")) == 1


@pytest.mark.parametrize("command", ["needle", "fidelity"])
def test_without_the_package_of_the_pictures_one_line_says_so_and_the_rows_are_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = tmp_path / "book.txt"
    text.write_text(TEXT)
    options = {
        "needle": ["--lengths", "512", "--limit", "1"],
        "fidelity": ["--prompt", text, "--max-length", "64"],
    }
    code, output = run(command, checkpoint, *options[command], "--out", tmp_path)
    assert code == 1
    assert "error: expected matplotlib to be installed; pip install matplotlib" in output
    assert rows(tmp_path / f"{command}.jsonl")
