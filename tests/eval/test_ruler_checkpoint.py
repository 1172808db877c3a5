"""The checkpoint of kind ``ruler``: dense attention solves the tasks, a window does not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measure_lists import decoding, losses

from lowcontext.eval import ruler_weights as weights
from lowcontext.eval import write_retrieval_checkpoint
from lowcontext.eval.circuits import Mlp
from lowcontext.eval.ruler import RulerRun, make_ruler_sample, run_ruler
from lowcontext.eval.ruler_vocabulary import build_vocabulary, words_of
from lowcontext.methods import get_method

# The constants of the construction were tuned on prompts of the first seeds.
UNSEEN = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_retrieval_checkpoint(tmp_path_factory.mktemp("ruler"), kind="ruler")


@pytest.fixture(scope="module")
def solver(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def solver_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def scores(model: Any, tokenizer: Any, run: RulerRun) -> dict[str, float]:
    """Mean scores by task, on prompts on which no constant was tuned."""
    total: dict[str, float] = {}
    for row in run_ruler(model, tokenizer, replace(run, seed=UNSEEN)):
        total[row.task] = total.get(row.task, 0.0) + row.score / run.samples
    return total


def test_dense_attention_answers_every_task_with_one_asked_value(
    solver: Any, solver_tokenizer: Any
) -> None:
    tasks = tuple(f"niah_{kind}_{i}" for kind in ("single", "multikey") for i in (1, 2, 3))
    found = scores(solver, solver_tokenizer, RulerRun((1024,), tasks, samples=2))
    assert found == dict.fromkeys(tasks, 1.0)


def test_a_head_at_rest_outvotes_another_in_the_list_that_they_share(
    solver: Any, solver_tokenizer: Any
) -> None:
    answer = decoding(solver, solver_tokenizer, "niah_multivalue", 1024, UNSEEN)
    options = {"sink": 64, "window": 128, "budget": 128, "dense_layers": 0}
    shared, own = (
        losses(solver, answer, get_method("hip", **options, share=share, refresh=1))
        for share in ("group", "head")
    )
    assert own == []
    assert shared
    for line in shared:
        _, _, layer, head, mass, _, rank, in_group, loudest = line.split(" | ")
        assert (layer, head, mass, rank) == ("4", "2", "0.00", "1")
        assert int(in_group) > 2  # tiles that are listed
        assert loudest.startswith("3: ")


def test_dense_attention_answers_most_of_the_tasks_with_several_parts(
    solver: Any, solver_tokenizer: Any
) -> None:
    tasks = ("niah_multivalue", "niah_multiquery", "vt")
    found = scores(solver, solver_tokenizer, RulerRun((1024,), tasks, samples=4))
    assert min(found.values()) >= 0.75, found


def test_dense_attention_counts_words(solver: Any, solver_tokenizer: Any) -> None:
    found = scores(solver, solver_tokenizer, RulerRun((2048,), ("cwe", "fwe"), samples=4))
    assert min(found.values()) >= 0.6, found


def test_a_window_loses_what_lies_before_it(solver: Any, solver_tokenizer: Any) -> None:
    import lowcontext

    tasks = ("niah_single_2", "niah_multivalue", "niah_multiquery", "vt")
    run = RulerRun((1024,), tasks, samples=2)
    with lowcontext.patched(solver, "streaming_llm", sink=4, window=128):
        found = scores(solver, solver_tokenizer, run)
    assert max(found.values()) <= 0.5, found


def test_the_answer_ends_by_itself(solver: Any, solver_tokenizer: Any) -> None:
    run = RulerRun((1024,), ("niah_single_2", "niah_single_3"), samples=2)
    for row in run_ruler(solver, solver_tokenizer, run):
        assert row.output == row.answers[0]


def test_the_folder_is_a_plain_llama(folder: Path, solver: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config
    assert type(solver).__name__ == "LlamaForCausalLM"


def test_the_same_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = write_retrieval_checkpoint(tmp_path / "again", kind="ruler")
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind: expected one of needle, ruler, got 'qa'"):
        write_retrieval_checkpoint(tmp_path, kind="qa")


def test_every_part_of_the_vocabulary_is_in_it_and_a_variable_is_three_tokens(
    solver_tokenizer: Any,
) -> None:
    ids = build_vocabulary()
    assert sorted(ids.values()) == list(range(8192))
    assert words_of(ids).size == 8192
    assert len(solver_tokenizer("QXWVZ", add_special_tokens=False)["input_ids"]) == 3
    code = "5a13069b-9067-f97f-01fe-bf52048f830b"
    tokens = solver_tokenizer(code, add_special_tokens=False)["input_ids"]
    assert solver_tokenizer.decode(tokens) == code


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_zigzag_of_hinges_is_the_product_of_signs(count: int) -> None:
    one = torch.zeros(1, weights.SHAPE.hidden)
    one[0, 0] = 1.0
    mlp = Mlp(weights.SHAPE, 1.0, one)
    mlp.parity([torch.eye(weights.SHAPE.hidden)[i + 1] for i in range(count)], column=9)
    for signs in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * count).view(-1, count):
        x = torch.zeros(weights.SHAPE.hidden)
        x[0], x[1 : count + 1] = 1.0, signs
        hidden = torch.nn.functional.silu(mlp.gate @ x) * (mlp.up @ x)
        assert abs(float((mlp.down @ hidden)[9] - signs.prod())) < 1e-5


def test_counts_are_logarithms_and_only_words_of_a_list_have_one(
    solver: Any, solver_tokenizer: Any
) -> None:
    sample = make_ruler_sample(solver_tokenizer, "fwe", length=2048, seed=0)
    with torch.no_grad():
        states = solver.model(torch.tensor([sample.input_ids]), output_hidden_states=True)
    counts = states.hidden_states[2][0, :, weights.COUNT] * weights.COUNT_UNIT
    words = set(words_of(build_vocabulary()).words)
    seen: dict[int, int] = {}
    for token, count in zip(sample.input_ids, counts.tolist(), strict=True):
        seen[token] = seen.get(token, 0) + 1
        expected = math.log1p(seen[token] / weights.SAME_SINK) if token in words else 0.0
        assert abs(count - expected) < 0.05


def test_offsets_and_the_smear_hold_over_128k() -> None:
    frequencies = weights.SHAPE.frequencies()
    distance = torch.arange(131072, dtype=torch.float64)
    for offset in range(1, weights.NGRAM + 1):
        angles = (distance - offset)[:, None] * frequencies[:8]
        best = (weights.OFFSET_LOGIT * angles.cos().sum(dim=1)).topk(2)
        assert best.indices[0] == offset
        assert best.values[0] - best.values[1] > 47
    logits = sum(
        a * ((distance * frequencies[pair]).cos() - 1) for pair, a in weights.SMEAR_LOGITS.items()
    )
    assert torch.softmax(torch.as_tensor(logits), dim=0)[100:].sum() < 1e-5
    assert frequencies[weights.SHAPE.first_slow] * 131072 < 0.32
