"""A row of each kind, for the tests to change with `dataclasses.replace`."""

from __future__ import annotations

from lowcontext.eval.records import NeedleRow, RulerRow

RULER = RulerRow(
    model="m",
    method="dense",
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
