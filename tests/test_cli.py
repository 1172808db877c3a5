"""The command line, end to end on the retrieval checkpoint."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lowcontext
from lowcontext import _cli_parse as parse
from lowcontext.cli import app
from lowcontext.methods import get_method
from lowcontext.ops import _dispatch

runner = CliRunner()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "retrieval"
    result = runner.invoke(app, ["checkpoint", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


def test_info_lists_every_backend_with_its_reason() -> None:
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    for name in ("native", "triton", "reference", "torch"):
        assert name in result.output


def test_info_says_which_backend_each_op_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"native": "gone", "triton": "gone"}
    monkeypatch.setattr(_dispatch, "_status", reasons.get)
    output = runner.invoke(app, ["info"]).output
    ops = ("sparse_attention", "topk", "mass_mask", "line_index", "antidiagonal_scores", "hip_tree")
    for name in ops:
        line = next(line for line in output.splitlines() if name in line)
        assert "reference" in line
    monkeypatch.setattr(_dispatch, "_status", lambda name: "gone")
    output = runner.invoke(app, ["info"]).output
    assert "none" in next(line for line in output.splitlines() if "topk" in line)


def test_methods_lists_every_method_with_its_hyper_parameters() -> None:
    result = runner.invoke(app, ["methods"])
    for name in lowcontext.available_methods():
        assert name in result.output
    assert "budget=2048" in result.output


COMMANDS = [
    "info",
    "methods",
    "checkpoint",
    "generate",
    "needle",
    "ruler",
    "report",
    "perplexity",
    "fidelity",
    "calibrate",
    "inspect",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"lowcontext {command}" in result.output


def test_generate_prints_text_density_and_times(checkpoint: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the sky is clear and the road is long . " * 60)
    args = ["--prompt-file", str(prompt), "--max-new-tokens", "3"]
    for method in (["-m", "streaming_llm:window=64"], ["--decode", "quest:budget=64"]):
        result = runner.invoke(app, ["generate", str(checkpoint), *args, *method])
        assert result.exit_code == 0, result.output
        assert "prompt tokens, first token after" in result.output.replace("\n", " ")


def test_needle_writes_rows_and_a_picture_and_continues(checkpoint: Path, tmp_path: Path) -> None:
    args = ["needle", str(checkpoint), "--out", str(tmp_path), "--lengths", "1k", "--depths", "3"]
    args += ["-m", "dense", "-m", "streaming_llm:window=128"]
    result = runner.invoke(app, args)
    assert result.exit_code == 0, result.output
    file = tmp_path / "needle.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 6
    right = {(r["method"], r["depth"]): r["correct"] for r in rows}
    assert all(right["dense", d] for d in (0.0, 50.0, 100.0))
    assert not right["streaming_llm(window=128)", 50.0]
    assert right["streaming_llm(window=128)", 100.0]
    dense, sparse = rows[0], rows[-1]
    assert dense["density"] == 1.0
    assert 0 < sparse["density"] < 0.5
    assert (tmp_path / "needle.png").stat().st_size > 10_000
    assert runner.invoke(app, args).exit_code == 0
    assert len(file.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "nowhere", "--prompt", "x"], "expected a folder with a config.json"),
        (["generate", "nowhere"], "expected one of --prompt and --prompt-file"),
        (["generate", "nowhere", "--prompt", "x", "-m", "qest"], "method: expected one of"),
        (["generate", "x", "--prompt", "x", "-m", "quest:budget"], "NAME:key=value,key=value"),
        (["generate", "x", "--prompt", "x", "-m", "quest:budget=0"], "budget: expected at least"),
        (["generate", "x", "--prompt", "x", "-m", "quest", "--decode", "quest"], "expected alone"),
        (["needle", "nowhere", "--lengths", "4x"], "lengths: expected numbers such as"),
        (["needle", "nowhere", "--task", "some"], "task: expected one of"),
    ],
)
def test_mistakes_give_one_line_and_exit_code_1(args: list[str], message: str) -> None:
    result = runner.invoke(app, args)
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate MODEL --prompt-file BINARY", "prompt: expected UTF-8 text in"),
        ("generate MODEL --prompt-file EMPTY", "prompt: expected some text in"),
        ("generate MODEL --prompt x --device cuda:9", "cuda"),
        ("generate BARE --prompt x", "model: expected a tokenizer in"),
        ("calibrate MODEL --prompt EMPTY --out OUT", "prompt: expected some text in"),
        ("calibrate MODEL --prompt TEXT --out OUT --max-length 0", "--max-length: expected at"),
        ("inspect MODEL --prompt TEXT --max-length -5", "--max-length: expected at least 1"),
    ],
)
def test_files_and_devices_that_do_not_fit_are_named(
    checkpoint: Path, tmp_path: Path, command: str, message: str
) -> None:
    files = {"BINARY": b"\xff\xfe", "EMPTY": b"", "TEXT": b"the sky is clear . " * 99}
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
    bare = tmp_path / "BARE"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    places = {"MODEL": checkpoint, "OUT": tmp_path / "p.json", "BARE": bare}
    places |= {name: tmp_path / name for name in files}
    result = runner.invoke(app, [str(places.get(word, word)) for word in command.split()])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert message in result.output.replace("\n", " ")


def test_hyper_parameters_can_be_lists() -> None:
    method = parse.method("tidaldecode:k=64,select_layers=[0, 5],local=2")
    assert str(method) == "tidaldecode(k=64, local=2, select_layers=(0, 5))"
    with pytest.raises(ValueError, match=r"method: expected a YAML value of k, got '\[1'"):
        parse.method("tidaldecode:k=[1")


def test_a_length_over_the_models_positions_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    args = ["needle", str(checkpoint), "--lengths", "256k", "--out", str(tmp_path)]
    result = runner.invoke(app, args)
    assert result.exit_code == 1
    assert "max_position_embeddings" in result.output.replace("\n", " ")


def test_more_new_tokens_than_positions_are_an_error(checkpoint: Path) -> None:
    args = ["generate", str(checkpoint), "--prompt", "the sky is clear", "--max-new-tokens"]
    result = runner.invoke(app, [*args, "131072"])
    assert result.exit_code == 1
    message = r"--max-new-tokens: expected at most 131072 tokens .* the prompt's \d+, got 131072"
    assert re.search(message, result.output.replace("\n", " "))


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "lowcontext", "ruler", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: lowcontext ruler" in done.stdout


def test_lengths_and_depths_are_parsed() -> None:
    assert parse.lengths("1k, 4096,128K") == (1024, 4096, 131072)
    assert parse.depth_grid(3) == (0.0, 50.0, 100.0)
    assert parse.depth_grid(1) == (50.0,)


def test_calibrate_writes_patterns_that_generate_and_inspect_read(
    checkpoint: Path, tmp_path: Path
) -> None:
    prompt, out = tmp_path / "prompt.txt", tmp_path / "found" / "patterns.json"
    prompt.write_text("the sky is clear and the road is long . " * 60)
    args = ["calibrate", str(checkpoint), "--prompt", str(prompt), "--out", str(out)]
    result = runner.invoke(app, [*args, "--max-length", "300", "--blocks", "2"])
    assert result.exit_code == 0, result.output
    assert "mean density" in result.output
    measured = out.with_suffix(".measured.jsonl").read_text()
    cheaper = [*args, "--max-length", "300", "--blocks", "2", "--density", "0.9", "--published"]
    result = runner.invoke(app, cheaper)
    assert result.exit_code == 0, result.output
    assert out.with_suffix(".measured.jsonl").read_text() == measured
    method = f"minference:patterns={out},min_length=0"
    result = runner.invoke(
        app, ["generate", str(checkpoint), "--prompt-file", str(prompt), "-m", method]
    )
    assert result.exit_code == 0, result.output
    picture = tmp_path / "picture.png"
    for arguments in ([str(out)], [str(checkpoint), "--prompt", str(prompt), "-m", method]):
        picture.unlink(missing_ok=True)
        result = runner.invoke(app, ["inspect", *arguments, "--out", str(picture)])
        assert result.exit_code == 0, result.output
        assert picture.stat().st_size > 2000
    result = runner.invoke(app, ["inspect", str(checkpoint)])
    assert result.exit_code == 1
    assert "--prompt: expected a text file" in result.output


def test_ruler_compares_methods_with_dense_and_continues(checkpoint: Path, tmp_path: Path) -> None:
    args = ["ruler", str(checkpoint), "--lengths", "1k", "--samples", "2", "--out", str(tmp_path)]
    args += ["--tasks", "niah_single_1,fwe", "-m", "dense", "-m", "streaming_llm:window=128"]
    result = runner.invoke(app, args)
    assert result.exit_code == 0, result.output
    for part in ("niah_single_1", "fwe", "all", "diff", "TTFT", "MiB"):
        assert part in result.output
    assert len((tmp_path / "ruler.jsonl").read_text().splitlines()) == 8
    for name in ("scores", "density", "latency"):
        assert (tmp_path / f"ruler-{name}.png").stat().st_size > 5000
    assert runner.invoke(app, args).exit_code == 0
    assert len((tmp_path / "ruler.jsonl").read_text().splitlines()) == 8
    result = runner.invoke(app, ["ruler", str(checkpoint), "--tasks", "niah"])
    assert result.exit_code == 1
    assert "tasks: expected one of" in result.output.replace("\n", " ")


def test_perplexity_writes_rows_and_continues(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("the sky is clear and the road is long . " * 60)
    args = ["perplexity", str(checkpoint), "--text", str(text), "--lengths", "200", "--out"]
    args += [str(tmp_path), "-m", "dense", "-m", "streaming_llm:window=32", "--windows", "2"]
    for _ in range(2):
        result = runner.invoke(app, args)
        assert result.exit_code == 0, result.output
    rows = [json.loads(x) for x in (tmp_path / "perplexity.jsonl").read_text().splitlines()]
    dense, sparse = ([row["nll"] for row in rows[i : i + 2]] for i in (0, 2))
    printed = " ".join(result.output.split())
    assert f"dense 200 ({dense[0]:.4f}) ({dense[1]:.4f})" in printed
    gaps = [f"{one - other:+.4f}" for one, other in zip(sparse, dense, strict=True)]
    assert f"streaming_llm 200 {' '.join(gaps)}" in printed
    assert [(row["method"], row["window"]) for row in rows] == [
        (method, window) for method in ("dense", "streaming_llm(window=32)") for window in (0, 1)
    ]
    assert rows[0]["density"] == 1.0 > rows[2]["density"]


def test_fidelity_writes_rows_and_a_picture(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("the sky is clear and the road is long . " * 60)
    args = ["fidelity", str(checkpoint), "--prompt", str(text), "--max-length", "256", "--steps"]
    args += ["2", "--out", str(tmp_path), "-m", "dense", "-m", "streaming_llm:window=32"]
    result = runner.invoke(app, [*args, "--layers", "0-1,2"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "fidelity.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 3 * 4  # methods, phases, layers, heads
    for phase in ("prefill", "decode"):
        sparse = [row for row in rows if row["phase"] == phase and row["density"] < 1]
        groups = [
            [row["mass"] for row in sparse if row["layer"] in part] for part in ((0, 1), (2,))
        ]
        means = [f"{sum(group) / len(group):.2%}" for group in [*groups, [*groups[0], *groups[1]]]]
        assert re.search(rf"streaming_llm +{' +'.join(means)} ", result.output)
    by_layer = re.findall(r"streaming_llm, (\w+) +(\d) ", result.output)
    assert by_layer == [(phase, layer) for phase in ("prefill", "decode") for layer in "012"]
    assert (tmp_path / "fidelity.png").exists()


def test_fidelity_measures_only_what_a_file_lacks(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowcontext.integrations import fidelity

    measured: list[tuple[str, int, int]] = []
    measure = fidelity.measure_fidelity

    def counted(model: Any, ids: Any, method: Any, *, steps: int) -> Any:
        measured.append((str(method), ids.shape[1], steps))
        return measure(model, ids, method, steps=steps)

    monkeypatch.setattr(fidelity, "measure_fidelity", counted)
    text, file = tmp_path / "book.txt", tmp_path / "fidelity.jsonl"
    text.write_text("the sky is clear and the road is long . " * 60)

    def run(length: int, steps: int, *methods: str) -> str:
        args = ["fidelity", str(checkpoint), "--prompt", str(text), "--out", str(tmp_path)]
        args += ["--max-length", str(length), "--steps", str(steps), "--methods", ",".join(methods)]
        result = runner.invoke(app, args)
        assert result.exit_code == 0, result.output
        return result.output.partition("Softmax")[2].partition("wrote")[0]

    first = run(64, 2, "dense")
    assert run(64, 2, "dense") == first
    both = run(64, 2, "dense", "quest")
    kept = file.read_bytes()
    assert run(64, 2, "dense", "quest") == both
    assert file.read_bytes() == kept
    run(64, 3, "dense")
    run(48, 2, "dense")
    asked = [("dense", 64, 2), ("quest", 64, 2), ("dense", 64, 3), ("dense", 48, 2)]
    assert measured == asked
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 4 * 2 * 3 * 4
    text.write_text("another text , as long as the one before . " * 60)
    run(48, 2, "dense")
    assert measured == [*asked, ("dense", 48, 2)]


def test_fidelity_keeps_rows_that_another_run_writes_meanwhile(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowcontext.integrations import fidelity

    text, file = tmp_path / "book.txt", tmp_path / "fidelity.jsonl"
    text.write_text("the sky is clear and the road is long . " * 60)
    measure = fidelity.measure_fidelity

    def meanwhile(model: Any, ids: Any, method: Any, *, steps: int) -> Any:
        fidelity.write_rows(measure(model, ids, get_method("quest"), steps=steps), file)
        return measure(model, ids, method, steps=steps)

    monkeypatch.setattr(fidelity, "measure_fidelity", meanwhile)
    args = ["fidelity", str(checkpoint), "--prompt", str(text), "--max-length", "64"]
    result = runner.invoke(app, [*args, "--methods", "dense", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line)["method"] for line in file.read_text().splitlines()]
    assert rows == ["quest"] * 12 + ["dense"] * 12  # layers, heads


@pytest.mark.parametrize("layers", ["3", "2-1", "0-3", "first", "0-"])
def test_groups_of_layers_that_a_model_lacks_are_refused(
    checkpoint: Path, tmp_path: Path, layers: str
) -> None:
    text = tmp_path / "book.txt"
    text.write_text("the sky is clear . " * 60)
    args = ["fidelity", str(checkpoint), "--prompt", str(text), "--layers", layers]
    result = runner.invoke(app, [*args, "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    expected = f"--layers: expected N or N-M of the layers 0-2, got {layers!r}"
    assert expected in result.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_missing_is_one_red_line(checkpoint: Path, tmp_path: Path) -> None:
    args = ["perplexity", str(checkpoint), "--text", "nowhere.txt", "--out", str(tmp_path)]
    result = runner.invoke(app, args)
    assert result.exit_code == 1
    assert "text: expected a UTF-8 file, got 'nowhere.txt'" in result.output.replace("\n", "")
