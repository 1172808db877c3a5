"""The runner: rows, times, the JSONL file and what happens when a run is cut off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from result_rows import NEEDLE

from lowcontext.eval import NeedleGrid, NeedleRow, read_rows, records, run_needle

GRID = NeedleGrid(lengths=(200, 260), depths=(50.0,), samples=2, metric="exact")


class CountedModel:
    """The model, with its calls of generate counted."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.model.generate(*args, **options)


@pytest.fixture
def counted(model: Any) -> CountedModel:
    return CountedModel(model)


def without_times(rows: list[NeedleRow]) -> list[NeedleRow]:
    return [replace(row, ttft_s=0.0, tpot_s=0.0) for row in rows]


def test_rows_come_in_the_order_of_the_grid_with_answers_and_times(
    model: Any, tokenizer: Any
) -> None:
    rows = list(run_needle(model, tokenizer, GRID, method="dense"))
    assert [(row.length, row.depth, row.sample) for row in rows] == GRID.cells()
    assert all(row.correct and row.output == row.expected for row in rows)
    assert all(row.new_tokens == 4 for row in rows)  # three of the answer and the end
    assert all(row.prompt_tokens == row.length - GRID.answer_room for row in rows)
    assert all(row.ttft_s > 0 and row.tpot_s is not None and row.tpot_s > 0 for row in rows)
    assert [row.seed for row in rows[:2]] == [0, 1]


def test_the_time_to_first_token_is_that_of_the_prefill(model: Any, tokenizer: Any) -> None:
    grid = NeedleGrid(lengths=(2048,), depths=(50.0,))
    (row,) = run_needle(model, tokenizer, grid)
    assert row.tpot_s is not None
    assert row.ttft_s > 2 * row.tpot_s


def test_prefill_in_chunks_gives_the_same_answers(model: Any, tokenizer: Any) -> None:
    seen: list[int] = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].shape[1])
    )
    try:
        whole = list(run_needle(model, tokenizer, GRID))
        seen.clear()
        parts = list(run_needle(model, tokenizer, replace(GRID, chunk=64)))
    finally:
        handle.remove()
    assert max(seen) == 64
    assert [row.chunk for row in parts] == [64] * 4
    parts = [replace(row, chunk=None) for row in parts]
    assert without_times(parts) == without_times(whole)


def test_one_generated_token_has_no_time_per_token(model: Any, tokenizer: Any) -> None:
    grid = NeedleGrid(lengths=(200,), depths=(50.0,), answer_room=1)
    (row,) = run_needle(model, tokenizer, grid)
    assert (row.new_tokens, row.tpot_s, row.correct) == (1, None, False)


def test_stats_are_read_once_per_sample_and_after_the_warm_up(model: Any, tokenizer: Any) -> None:
    values: Iterator[int] = iter(range(100))

    def stats() -> dict[str, float]:
        number = float(next(values))
        return {"density": number, "pages": -number}

    rows = list(run_needle(model, tokenizer, GRID, stats=stats))
    assert [row.density for row in rows] == [float(n) for n in range(1, 5)]
    assert [row.stats for row in rows] == [{"pages": -float(n)} for n in range(1, 5)]


def test_progress_sees_every_row(model: Any, tokenizer: Any) -> None:
    seen: list[tuple[int, int, NeedleRow]] = []
    rows = list(run_needle(model, tokenizer, GRID, progress=lambda *event: seen.append(event)))
    assert seen == [(i, 4, row) for i, row in enumerate(rows, start=1)]


def test_every_row_is_in_the_file_before_the_next_one_runs(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "needle.jsonl"
    for count, row in enumerate(run_needle(model, tokenizer, GRID, out=out), start=1):
        lines = out.read_text().splitlines()
        assert len(lines) == count
        assert json.loads(lines[-1]) == asdict(row)


def test_a_finished_run_is_not_run_again(
    counted: CountedModel, tokenizer: Any, tmp_path: Path
) -> None:
    out = tmp_path / "needle.jsonl"
    first = list(run_needle(counted, tokenizer, GRID, out=out))
    calls, data = counted.calls, out.read_bytes()
    assert calls == 5  # four samples and the warm-up
    assert list(run_needle(counted, tokenizer, GRID, out=out)) == first
    assert (counted.calls, out.read_bytes()) == (calls, data)


@pytest.mark.parametrize("change", [{"chunk": 64}, {"answer_room": 8}, {"metric": "contains"}])
def test_other_settings_or_another_model_are_another_run(
    counted: CountedModel, tokenizer: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    out = tmp_path / "needle.jsonl"
    grid = replace(GRID, lengths=(200,), samples=1)
    list(run_needle(counted, tokenizer, grid, out=out))
    list(run_needle(counted, tokenizer, replace(grid, **change), out=out))
    assert len(read_rows(out)) == 2
    counted.name_or_path = "another"
    list(run_needle(counted, tokenizer, grid, out=out))
    assert [row.model for row in read_rows(out)][-1].startswith("another (float32, ")
    # The same folder with other weights.
    weight = next(counted.parameters()).data
    before = weight.clone()
    try:
        weight += 1
        list(run_needle(counted, tokenizer, grid, out=out))
    finally:
        weight.copy_(before)  # the model belongs to all tests of the session
    assert len({row.model for row in read_rows(out)}) == 3


def test_a_run_cut_off_in_a_line_resumes_with_that_sample(
    counted: CountedModel, tokenizer: Any, tmp_path: Path
) -> None:
    out = tmp_path / "needle.jsonl"
    whole = list(run_needle(counted, tokenizer, GRID, out=out))
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    assert read_rows(out) == whole[:2]
    counted.calls = 0
    resumed = list(run_needle(counted, tokenizer, GRID, out=out))
    assert counted.calls == 3  # two samples and the warm-up
    assert without_times(resumed) == without_times(whole)
    assert resumed[:2] == whole[:2]
    assert read_rows(out) == resumed


def test_methods_and_haystacks_share_a_file(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    out = tmp_path / "needle.jsonl"
    grid = NeedleGrid(lengths=(200,), depths=(50.0,))
    for method in ("one", "two"):
        for haystack in ("words", "noise"):
            one = replace(grid, haystack=haystack)
            assert len(list(run_needle(model, tokenizer, one, method=method, out=out))) == 1
    assert [(row.method, row.haystack) for row in read_rows(out)] == [
        ("one", "words"),
        ("one", "noise"),
        ("two", "words"),
        ("two", "noise"),
    ]
    assert read_rows([out, out]) == read_rows(out) * 2


def test_rows_that_two_runs_at_once_both_wrote_count_once(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    out = tmp_path / "needle.jsonl"
    rows = list(run_needle(model, tokenizer, GRID, out=out))
    out.write_bytes(out.read_bytes() * 2)
    assert read_rows(out) == rows


def test_a_row_that_another_run_adds_while_a_file_is_opened_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, parse = tmp_path / "needle.jsonl", records._parse
    records.RowFile(out, NeedleRow).append(NEEDLE)

    def parse_and_append(*arguments: Any) -> Any:
        with out.open("ab") as file:
            file.write(out.read_bytes())
        return parse(*arguments)

    monkeypatch.setattr(records, "_parse", parse_and_append)
    records.RowFile(out, NeedleRow)
    assert len(out.read_bytes().splitlines()) == 2


def test_a_file_of_something_else_is_left_alone(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    out = tmp_path / "notes.txt"
    out.write_text("dear diary\nmore")
    message = "out: .*expected a needle row in line 1 .* choose another folder"
    with pytest.raises(ValueError, match=message):
        run_needle(model, tokenizer, GRID, out=out)
    assert out.read_text() == "dear diary\nmore"


def test_an_unwritable_file_is_refused_before_anything_runs(
    counted: CountedModel, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="out: expected a writable file, got"):
        run_needle(counted, tokenizer, GRID, out=tmp_path)
    assert counted.calls == 0


def test_a_length_beyond_the_models_positions_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="lengths: expected at most 131072 .* got 131073"):
        run_needle(model, tokenizer, NeedleGrid(lengths=(512, 131073)))


def test_a_length_without_room_for_the_prompt_is_refused_before_anything_runs(
    counted: CountedModel, tokenizer: Any, tmp_path: Path
) -> None:
    out = tmp_path / "needle.jsonl"
    with pytest.raises(ValueError, match=r"length: expected at least \d+ tokens for task 'single'"):
        run_needle(counted, tokenizer, NeedleGrid(lengths=(512, 40)), out=out)
    assert not out.exists()


def test_a_changed_haystack_file_is_another_haystack(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    out, book = tmp_path / "needle.jsonl", tmp_path / "book.txt"
    grid = NeedleGrid(lengths=(200,), depths=(50.0,), haystack=str(book))
    for text in ("the sky is clear", "the road is long", "the road is long"):
        book.write_text(text)
        list(run_needle(model, tokenizer, grid, out=out))
    first, second = (row.haystack for row in read_rows(out))
    assert first.startswith(f"{book} (")
    assert first != second


def test_a_tokenizer_without_an_end_is_refused(model: Any, checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    endless = AutoTokenizer.from_pretrained(checkpoint)
    endless.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: expected one with an end-of-sequence token"):
        run_needle(model, endless, GRID)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": ()}, "lengths: expected at least one value, got none"),
        ({"depths": ()}, "depths: expected at least one value, got none"),
        ({"lengths": (0,)}, "lengths: expected 1 or more, got 0"),
        ({"depths": (101,)}, "depths: expected 0..100 .percent., got 101"),
        ({"samples": 0}, "samples: expected 1 or more, got 0"),
        ({"chunk": 0}, "chunk: expected 1 or more, or None, got 0"),
        ({"limit": 0}, "limit: expected 1 or more, or None, got 0"),
        ({"metric": "f1"}, "metric: expected one of contains, exact, got 'f1'"),
        (
            {"task": "qa"},
            "task: expected one of single, multikey, several:COUNT, thread:COUNT, got 'qa'",
        ),
    ],
)
def test_a_grid_that_cannot_run_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GRID, **change)


def test_another_architecture_runs_and_answers_wrong_without_training(tokenizer: Any) -> None:
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    grid = NeedleGrid(lengths=(200,), depths=(50.0,))
    (row,) = run_needle(GPTNeoXForCausalLM(config).eval(), tokenizer, grid)
    assert not row.correct
    assert 1 <= row.new_tokens <= grid.answer_room
