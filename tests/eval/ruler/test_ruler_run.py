"""The runner of the RULER suite: rows, a full disk, refusals, table and pictures."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from result_rows import LABELS, RULER, overlaps

from lowcontext.eval.records import RowFile, RulerRow, read_ruler_rows
from lowcontext.eval.ruler import RulerRun, Sources, plot_ruler, run_ruler, summarize_ruler
from lowcontext.eval.scoring import any_found, paired_interval, share_found

RUN = RulerRun(lengths=(512,), tasks=("niah_single_1", "niah_multikey_1", "fwe"), samples=2)


def test_dense_attention_finds_single_needles_and_rows_say_what_it_cost(
    model: Any, tokenizer: Any
) -> None:
    tasks = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2")
    rows = list(run_ruler(model, tokenizer, RulerRun((768,), tasks, samples=2)))
    assert [(row.task, row.sample) for row in rows] == [(t, i) for t in tasks for i in (0, 1)]
    assert all(row.score == 1.0 and row.answers == [row.output] for row in rows)
    assert all(row.ttft_s > 0 and row.tpot_s is not None for row in rows)
    if sys.platform == "linux":
        assert all(row.peak_mib is not None and 50 < row.peak_mib < 32_768 for row in rows)


def test_a_full_disk_names_the_file_and_keeps_the_rows(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    out = tmp_path / "ruler.jsonl"
    rows = run_ruler(model, tokenizer, RUN, out=out)
    first = next(rows)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (out.stat().st_size + 40, hard))
    try:
        with pytest.raises(OSError, match="make room and run the same command again"):
            next(rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_ruler_rows(out) == [first]
    assert list(RowFile(out, RulerRow).rows.values()) == [first]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": ()}, "lengths: expected at least one value"),
        ({"lengths": (0,)}, "lengths: expected 1 or more, got 0"),
        ({"samples": 0}, "samples: expected 1 or more, got 0"),
        ({"chunk": 0}, "chunk: expected 1 or more, or None, got 0"),
        ({"tasks": ("qa_2",)}, "expected --hotpot FILE with task 'qa_2', got none"),
        ({"tasks": ("needle",)}, "tasks: expected one of niah_single_1"),
    ],
)
def test_a_run_that_cannot_work_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RUN, **change)


ROW = replace(RULER, answers=["A", "B"], stats={"density_decode": 0.5})


def some_rows() -> list[RulerRow]:
    return [
        replace(ROW, method=method, task=task, length=length, seed=seed, score=score)
        for length in (4096, 16384)
        for task in ("vt", "fwe")
        for method in ("dense", "quest(budget=64)", "hip(mask_k=512)")
        for seed, score in enumerate([1.0, 1.0, 0.5] if method == "dense" else [1.0, 0.0, 0.5])
    ]


def test_the_difference_is_taken_on_the_prompts_that_dense_answered_too() -> None:
    extra = replace(ROW, method="quest(budget=64)", seed=77, score=0.0)
    lines = {
        (x.method, x.task): x for x in summarize_ruler([*some_rows(), extra]) if x.length < 5000
    }
    line = lines["quest(budget=64)", "vt"]
    assert (line.samples, line.score, line.dense) == (4, 1.5 / 4, 2.5 / 3)
    assert line.difference == pytest.approx(-1 / 3)
    assert (line.difference_low, line.difference_high) == paired_interval([0.0, -1.0, 0.0])
    assert lines["dense", "all"].difference is None
    assert lines["dense", "all"].samples == 6
    assert lines["quest(budget=64)", "all"].density_decode == 0.5


def test_the_paired_interval_covers_the_true_difference() -> None:
    import random

    rng = random.Random(0)
    for total, worse, better, least in (
        (20, 0.2, 0.0, 0.9),
        (50, 0.1, 0.05, 0.93),
        (50, 0.0, 0.0, 0.93),
        (200, 0.3, 0.1, 0.93),
    ):
        hits = 0
        for _ in range(500):
            draws = [rng.random() for _ in range(total)]
            gaps = [-1.0 if d < worse else 1.0 if d < worse + better else 0.0 for d in draws]
            low, high = paired_interval(gaps)
            hits += low <= better - worse <= high
        assert hits >= least * 500


def test_metrics_are_shares_of_references_and_one_of_many() -> None:
    assert share_found("alpha, BETA and gam", ["Alpha", "beta", "gamma"]) == pytest.approx(2 / 3)
    assert any_found("it was Paris.", ["London", "paris"]) == 1.0
    assert any_found("it was Rome.", ["London", "paris"]) == 0.0
    with pytest.raises(ValueError, match="expected at least one answer"):
        share_found("x", [])


def test_pictures_take_gaps_and_missing_figures(tmp_path: Path) -> None:
    rows = some_rows()[:-4]
    rows += [replace(ROW, method="bare", density=None, tpot_s=None, peak_mib=None)]
    for path in plot_ruler(rows, tmp_path / "new"):
        assert path.stat().st_size > 10_000
    with pytest.raises(ValueError, match="rows: expected at least one row, got none"):
        plot_ruler([], tmp_path)


@pytest.mark.parametrize("lengths", [(4096,), (4096, 16384, 32768), (1024, 2048, 4096, 8192)])
@pytest.mark.parametrize("methods", [LABELS[:1], LABELS])
def test_no_text_of_the_pictures_touches_another(
    tmp_path: Path, drawn: dict[str, Any], lengths: tuple[int, ...], methods: list[str]
) -> None:
    rows = [
        replace(ROW, method=method, task=task, length=length, score=place % 3 / 2)
        for place, method in enumerate(methods)
        for task in ("niah_multikey_1", "vt")
        for length in lengths
    ]
    for path in plot_ruler(rows, tmp_path):
        assert not overlaps(drawn[path.name])


def test_a_method_without_density_is_named_and_every_method_is_in_the_legend(
    tmp_path: Path, drawn: dict[str, Any]
) -> None:
    rows = [
        ROW,
        replace(ROW, method="late(budget=64)", length=16384),
        replace(ROW, method="bare", density=None),
        replace(ROW, method="short", stats={}),
    ]
    plot_ruler(rows, tmp_path)
    figure = drawn["ruler-density.png"]
    notes = {axes.get_title(): axes.get_xlabel() for axes in figure.axes}
    assert notes["4K, prefill"] == "pairs read\nnot measured: bare"
    assert notes["4K, decode"] == "pairs read\nnot measured: short"
    assert notes["16K, prefill"] == "pairs read"
    for name in ("ruler-density.png", "ruler-latency.png"):
        labels = [text.get_text() for text in drawn[name].legends[0].get_texts()]
        assert labels == ["dense", "bare", "short", "late\nbudget=64"]


def test_the_axis_of_the_densities_reaches_down_to_the_smallest(
    tmp_path: Path, drawn: dict[str, Any]
) -> None:
    for density, end in ((0.5, 1.0), (0.002, 0.14)):
        plot_ruler([replace(ROW, density=density, stats={})], tmp_path)
        assert drawn["ruler-density.png"].axes[0].get_xlim()[0] == pytest.approx(end)


def test_sources_and_the_text_of_their_files_are_part_of_a_rows_key(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    out, book = tmp_path / "ruler.jsonl", tmp_path / "book.txt"
    run = RulerRun((400,), ("niah_single_2",), samples=1)
    texts = ("a cold day in april", "a warm day in april")
    for haystack in ("words", "noise", *texts, texts[1]):
        book.write_text(haystack)
        source = str(book) if haystack in texts else haystack
        list(run_ruler(model, tokenizer, replace(run, sources=Sources(source)), out=out))
    digests = [hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts]
    expected = ["words", "noise", *(f"{book} ({digest})" for digest in digests)]
    assert [row.source for row in read_ruler_rows(out)] == expected


def test_a_changed_file_of_questions_is_another_source(
    model: Any, tokenizer: Any, sources: Sources, tmp_path: Path
) -> None:
    out, file = tmp_path / "ruler.jsonl", tmp_path / "squad.json"
    content = Path(str(sources.squad)).read_text()
    run = RulerRun((400,), ("qa_1",), samples=1, sources=Sources(squad=str(file)))
    for text in (content, content + "\n"):
        file.write_text(text)
        list(run_ruler(model, tokenizer, run, out=out))
    assert len({row.source for row in read_ruler_rows(out)}) == 2


def test_a_length_that_a_later_sample_does_not_fit_is_refused_before_the_first_prompt(
    model: Any, tokenizer: Any, sources: Sources, tmp_path: Path
) -> None:
    content = json.loads(Path(str(sources.squad)).read_text())
    parts = [part for article in content["data"] for part in article["paragraphs"]]
    asked = [question for part in parts for question in part["qas"] if question["answers"]]
    asked[-1]["question"] += " and why" * 300
    file, out = tmp_path / "squad.json", tmp_path / "ruler.jsonl"
    file.write_text(json.dumps(content))
    first = RulerRun((400,), ("qa_1",), samples=1, sources=Sources(squad=str(file)))
    seeds = range(len(asked))
    fits = [seed for seed in seeds if _runs(model, tokenizer, replace(first, seed=seed))]
    assert len(fits) == len(asked) - 1
    every = replace(first, seed=fits[0], samples=len(asked))
    with pytest.raises(ValueError, match=r"length: expected at least \d+ tokens for task 'qa_1'"):
        run_ruler(model, tokenizer, every, out=out)
    assert not out.exists()


def _runs(model: Any, tokenizer: Any, run: RulerRun) -> bool:
    """Whether a run is not refused; nothing of it runs."""
    try:
        run_ruler(model, tokenizer, run)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("task", ["cwe", "niah_multikey_2", "fwe"])
def test_every_length_is_checked_for_every_task_before_the_first_prompt(
    model: Any, tokenizer: Any, tmp_path: Path, task: str
) -> None:
    out = tmp_path / "ruler.jsonl"
    run = RulerRun((512, 200), ("niah_single_1", task), samples=1)
    with pytest.raises(ValueError, match=r"length: expected at least \d+ tokens for task"):
        run_ruler(model, tokenizer, run, out=out)
    assert not out.exists()
    # A task that `limit` leaves out is not asked for.
    (row,) = run_ruler(model, tokenizer, replace(run, limit=1))
    assert row.length == 512
