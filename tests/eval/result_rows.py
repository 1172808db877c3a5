"""Rows to change with `dataclasses.replace`, and what the tests of the pictures share."""

from __future__ import annotations

from typing import Any

from lowcontext.eval.records import NeedleRow, RulerRow

RULER = RulerRow(
    model="m",
    method="dense",
    settings={},
    task="vt",
    source="noise",
    length=4096,
    sample=0,
    seed=0,
    chunk=None,
    prompt_tokens=4000,
    answers=["A"],
    output="A",
    score=1.0,
    ttft_s=1.0,
    tpot_s=0.1,
    new_tokens=4,
    peak_mib=100.0,
    density=1.0,
    stats={},
)
NEEDLE = NeedleRow(
    model="m",
    method="quest<&>",
    settings={},
    task="single",
    haystack="words",
    length=1024,
    depth=50.0,
    sample=0,
    seed=0,
    answer_room=16,
    chunk=None,
    metric="contains",
    prompt_tokens=1008,
    expected="1",
    output="1",
    correct=True,
    ttft_s=1.0,
    tpot_s=0.5,
    new_tokens=4,
    density=0.25,
    stats={},
)


def overlaps(figure: Any) -> list[tuple[str, str]]:
    """Texts of a figure that touch each other or leave it."""
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    beyond = [  # matplotlib keeps ticks beyond the ends of an axis, and does not draw them
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        for label in (tick.label1, tick.label2)
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    ]
    texts = [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text not in beyond
    ]
    boxes = [x.get_window_extent(renderer) for x in texts]
    found = [
        (a.get_text(), b.get_text())
        for i, (a, box) in enumerate(zip(texts, boxes, strict=True))
        for b, other in zip(texts[:i], boxes[:i], strict=True)
        if box.overlaps(other)
    ]
    outside = [
        (x.get_text(), "outside")
        for x, box in zip(texts, boxes, strict=True)
        if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1
    ]
    return found + outside


# Methods with settings as long as they come, enough of them for the colours to come round again.
LABELS = [
    "dense",
    "a-run-of-a-long-name-and-before/ruler: minference(gain=0.25)",
    "minference(patterns=checkpoints/llama-3-8b/patterns-at-32k.json, gain=0.25, vertical=2048)",
    *(
        f"infinitehip(dense_layers=3, budget={n}, sink=128, window=448, wide_layers=0)"
        for n in range(9)
    ),
]
