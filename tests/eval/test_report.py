"""The table and the figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from result_rows import LABELS, NEEDLE, overlaps

from lowcontext.eval import NeedleRow, plot_needle, summarize
from lowcontext.eval.plots import COLOURS

ROW = replace(NEEDLE, model="some-model", method="dense", depth=0.0)


def rows() -> list[NeedleRow]:
    return [
        replace(
            ROW,
            method=method,
            length=length,
            depth=depth,
            sample=sample,
            correct=method == "dense" or depth == 100.0 or (sample == 1 and length == 1024),
            ttft_s=length / 1024 + sample,
            density=None if method == "dense" else 0.1 + 0.2 * sample,
        )
        for method in ("sliding(window=64)", "dense")
        for length in (4096, 1024)
        for depth in (0.0, 50.0, 100.0)
        for sample in range(2)
    ]


def test_a_summary_line_holds_counts_interval_and_averages() -> None:
    lines = summarize(rows())
    assert [(line.length, line.method) for line in lines] == [
        (1024, "sliding(window=64)"),
        (1024, "dense"),
        (4096, "sliding(window=64)"),
        (4096, "dense"),
    ]
    line = lines[2]
    assert (line.samples, line.correct, line.accuracy) == (6, 2, 2 / 6)
    assert line.low == pytest.approx(0.0968, abs=1e-4)
    assert line.high == pytest.approx(0.7000, abs=1e-4)
    assert line.density == pytest.approx(0.2)
    assert (line.ttft_s, line.tpot_s) == (4.5, 0.5)
    assert lines[3].density is None


def test_a_summary_over_all_lengths_has_one_line_per_method() -> None:
    lines = summarize(rows(), by_length=False)
    assert [(line.method, line.length, line.correct) for line in lines] == [
        ("sliding(window=64)", None, 6),
        ("dense", None, 12),
    ]


def test_tasks_and_haystacks_are_kept_apart() -> None:
    mixed = [ROW, replace(ROW, task="multikey", correct=False), replace(ROW, haystack="noise")]
    assert [(line.task, line.haystack, line.samples) for line in summarize(mixed)] == [
        ("multikey", "words", 1),
        ("single", "noise", 1),
        ("single", "words", 1),
    ]


def test_rows_without_times_per_token_have_none_in_the_summary() -> None:
    (line,) = summarize([replace(ROW, tpot_s=None)])
    assert line.tpot_s is None


def test_the_figure_shows_right_in_blue_and_wrong_in_orange(tmp_path: Path) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    pictures = {}
    for correct in (True, False):
        path = plot_needle([replace(ROW, correct=correct)], tmp_path / f"{correct}.png")
        assert path.read_bytes().startswith(b"\x89PNG")
        image = imread(path)[..., :3]
        # The pixels that are nearly of the colour of an end of the scale.
        pictures[correct] = [
            int((abs(image - colour).max(axis=-1) < 0.02).sum())
            for colour in map(to_rgb, (COLOURS[-1], COLOURS[0]))
        ]
    assert pictures[True][0] > 50 * pictures[True][1]
    assert pictures[False][1] > 50 * pictures[False][0]


def test_the_figure_takes_several_methods_tasks_and_gaps(tmp_path: Path) -> None:
    several = [*rows(), replace(ROW, task="multikey", haystack="some/book.txt", density=None)]
    one = plot_needle(several, tmp_path / "new" / "needle.png", columns=1)
    two = plot_needle(several, tmp_path / "needle.png", title="Two methods")
    assert one.stat().st_size > 10_000
    assert two.stat().st_size > 10_000


def test_no_text_of_the_figure_touches_another(tmp_path: Path, drawn: dict[str, Any]) -> None:
    slow = replace(ROW, ttft_s=123.45, tpot_s=0.1234, density=0.1234, haystack="some/book.txt")
    mixed = [
        replace(slow, method=method, length=length, depth=depth, correct=length < 5000)
        for method in LABELS
        for length in (4096, 16384, 131072)
        for depth in (0.0, 50.0, 100.0)
    ]
    for name, part in (("many", mixed), ("one", mixed[:1]), ("two", mixed[:12])):
        plot_needle(part, tmp_path / f"{name}.png")
        assert not overlaps(drawn[f"{name}.png"])


def test_a_vector_figure_names_methods_and_costs(tmp_path: Path) -> None:
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        text = plot_needle(rows(), tmp_path / "needle.svg").read_text()
    for part in ("sliding", "window=64", "accuracy 50%", "density 20%", "TTFT 4.50 s"):
        assert part in text


def test_no_rows_give_no_figure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows: expected at least one row, got none"):
        plot_needle([], tmp_path / "needle.png")
    with pytest.raises(ValueError, match="columns: expected 1 or more, got 0"):
        plot_needle([ROW], tmp_path / "needle.png", columns=0)
