"""The suite on another family: Qwen3 from disk, a byte-level BPE tokenizer, a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_qwen3 import write_tiny_qwen3
from typer.testing import CliRunner

from lowcontext.cli import app
from lowcontext.eval.ruler import TASKS, make_ruler_sample


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("qwen3"))


def test_a_random_qwen3_runs_all_tasks_that_need_no_file(qwen3: Path, tmp_path: Path) -> None:
    arguments = ["ruler", str(qwen3), "--lengths", "2k", "--samples", "1", "--out", str(tmp_path)]
    arguments += ["-m", "dense", "-m", "quest:budget=256,dense_layers=0"]
    arguments += ["-m", "streaming_llm:window=256"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "ruler.jsonl").read_text().splitlines()]
    offline = [task for task in TASKS if not task.startswith("qa_")]
    assert [row["task"] for row in rows] == offline * 3
    for row in rows:
        room = TASKS[row["task"]].answer_room
        assert 0.99 * 2048 <= row["prompt_tokens"] + room <= 2048
        assert 1 <= row["new_tokens"] <= room
    read = {row["method"].partition("(")[0]: row for row in rows if row["task"] == "niah_single_2"}
    assert read["dense"]["density"] == read["dense"]["stats"]["density_decode"] == 1.0
    assert read["quest"]["stats"]["density_decode"] < 0.2
    assert read["streaming_llm"]["density"] < 0.5


def test_the_answer_begins_behind_the_chat_templates_opening(qwen3: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(qwen3)
    sample = make_ruler_sample(tokenizer, "niah_single_1", length=1024, seed=0)
    text = tokenizer.decode(sample.input_ids)
    assert text.startswith("<|im_start|>user\n")
    question, opening, answer = text.rpartition("<|im_end|>\n<|im_start|>assistant\n")
    assert question
    assert opening
    assert answer
    assert sample.answers[0] in question
    assert sample.answers[0] not in answer
