"""The harness runs a patched model, its own tasks and its own result file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lowcontext import _cli_lm_eval
from lowcontext.cli import app
from lowcontext.eval import write_retrieval_checkpoint

TASK = """
task: lowcontext_offline
output_type: generate_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason="lm-eval is an optional extra")
    return write_retrieval_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_the_model_of_the_harness_is_patched_with_the_asked_method(checkpoint: Path) -> None:
    from lowcontext.integrations import measure_density

    kind = _cli_lm_eval.register()
    lm = kind("streaming_llm", pretrained=str(checkpoint), method_window=32, device="cpu")
    assert str(lm.method) == "streaming_llm(window=32)"
    with measure_density(lm.model) as density, torch.no_grad():
        lm.model(torch.full((1, 512), 50))
    assert 0 < density.prefill < 0.5


def test_the_command_hands_over_to_the_harness(checkpoint: Path, tmp_path: Path) -> None:
    filler = "rain falls on old roofs . " * 60
    text = f"{filler} Note that the magic number of bodima is 417902133. {filler}"
    document = {"text": f"{text} The magic number of bodima is", "answer": "417902133"}
    (tmp_path / "data.json").write_text(json.dumps(document) + "\n")
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "data.json"))
    scores = {}
    for method in ("dense", "streaming_llm,method_window=64"):
        out = tmp_path / method.partition(",")[0]
        arguments = f"pretrained={checkpoint},method={method},dtype=float32"
        command = [sys.executable, "-m", "lowcontext", "lm-eval", "--model_args", arguments]
        command += ["--tasks", "lowcontext_offline", "--include_path", str(tmp_path)]
        command += ["--device", "cpu", "--batch_size", "1", "--output_path", str(out)]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **offline}
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (file,) = out.rglob("results_*.json")
        results = json.loads(file.read_text())["results"]["lowcontext_offline"]
        scores[out.name] = results["exact_match,none"]
    assert scores == {"dense": 1.0, "streaming_llm": 0.0}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("qest", "--model_args: method: expected one of"),
        ("quest,method_page=0", "--model_args: quest: page: expected at least 1, got 0"),
        ("quest,method_pages=16", "--model_args: quest: expected hyper-parameters among"),
    ],
)
def test_a_method_that_is_none_gives_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, method: str, message: str
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    arguments = f"pretrained={checkpoint},method={method}"
    result = CliRunner().invoke(app, ["lm-eval", "--model_args", arguments, "--tasks", "arc_easy"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert message in result.output.replace("\n", " ")


def test_the_help_names_the_arguments_of_methods_before_those_of_the_harness(
    checkpoint: Path,
) -> None:
    command = [sys.executable, "-m", "lowcontext", "lm-eval", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    own, _, others = done.stdout.partition("usage: lm-eval run")
    assert "method=NAME" in own
    assert "method_KEY=VALUE" in own
    assert "--num_fewshot" in others


def test_lists_reach_a_method_as_json(checkpoint: Path) -> None:
    from lm_eval._cli.harness import HarnessCLI

    given = {"pretrained": str(checkpoint), "method": "tidaldecode", "method_select_layers": [1]}
    arguments = ["run", "--tasks", "ruler_fwe", "--model_args", json.dumps(given)]
    parsed = HarnessCLI()._parser.parse_args(arguments).model_args
    lm = _cli_lm_eval.register()(**parsed, device="cpu")
    assert lm.method.select_layers == (1,)


def test_without_the_harness_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_cli_lm_eval, "find_spec", lambda _name: None)
    result = CliRunner().invoke(app, ["lm-eval", "--tasks", "ruler_fwe"])
    assert result.exit_code == 1
    assert "pip install lm-eval" in result.output.replace("\n", " ")
