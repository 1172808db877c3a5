"""Pictures of the RULER suite: scores, score against density, times against length."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lowcontext.eval.plots import COLOURS, FAINT, INK, NO_DATA, method_lines, tokens
from lowcontext.eval.records import RulerRow
from lowcontext.eval.ruler.summary import ALL_TASKS, RulerSummary, summarize_ruler

# Told apart by colour and by marker; colours of Okabe and Ito, 2008, for any colour vision.
SERIES = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
MARKERS = "osD^vP*X"
PANEL_COLUMNS = 3
LEGEND = 2.2  # inches
NOTE_CHARS = 34  # under a panel of the densities
TICKS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # percent
PHASES = {"prefill": "density", "decode": "density_decode"}


def plot_ruler(rows: Iterable[RulerRow], folder: str | Path) -> list[Path]:
    """Draws the three pictures of a run.

    Args:
        rows: Rows of any number of methods and lengths.
        folder: Where to write ``ruler-scores.png``, ``ruler-density.png``, ``ruler-latency.png``.

    Returns:
        Their paths.

    Raises:
        ValueError: If there are no rows.
    """
    lines = summarize_ruler(rows)
    if not lines:
        raise ValueError("rows: expected at least one row, got none")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[Sequence[RulerSummary]], Any]] = {
        "scores": _scores,
        "density": _density,
        "latency": _latency,
    }
    paths = []
    for name, draw in drawings.items():
        paths.append(target / f"ruler-{name}.png")
        draw(lines).savefig(paths[-1])
    return paths


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _scores(lines: Sequence[RulerSummary]) -> Any:
    """One heatmap per method: mean score in percent by task and length."""
    from matplotlib.colors import LinearSegmentedColormap

    methods, tasks = _distinct(lines, "method"), _distinct(lines, "task")
    lengths = sorted({line.length for line in lines})
    found = {(line.method, line.task, line.length): line.score for line in lines}
    columns = min(PANEL_COLUMNS, len(methods))
    height = -(-len(methods) // columns)
    width = max(2.1, 0.62 * len(lengths))
    figure = _figure(1.6 + columns * (width + 0.25) + 0.6, 0.5 + height * (0.3 * len(tasks) + 0.85))
    figure.suptitle("RULER suite: mean score in %", color=INK, weight="bold", fontsize=11)
    panels = figure.subplots(height, columns, squeeze=False).flatten()
    colours = LinearSegmentedColormap.from_list("score", COLOURS).with_extremes(bad=NO_DATA)
    image = None
    for place, axes in enumerate(panels):
        if place >= len(methods):
            axes.set_axis_off()
            continue
        table = [
            [found.get((methods[place], task, length), float("nan")) for length in lengths]
            for task in tasks
        ]
        image = axes.imshow(table, cmap=colours, vmin=0.0, vmax=1.0, aspect="auto")
        for y, line in enumerate(table):
            for x, value in enumerate(line):
                dark = abs(value - 0.5) > 0.35
                text = f"{100 * value:.0f}" if value == value else "–"
                style = {"fontsize": 7.5, "color": "white" if dark else INK}
                axes.text(x, y, text, ha="center", va="center", **style)
        title = "\n".join(method_lines(methods[place], 8, width))
        axes.set_title(title, fontsize=8, color=INK, loc="left")
        axes.set_xticks(range(len(lengths)), [tokens(n) for n in lengths], fontsize=7.5)
        names = tasks if place % columns == 0 else [""] * len(tasks)
        axes.set_yticks(range(len(tasks)), names, fontsize=7.5)
        axes.axhline(len(tasks) - 1.5, color="white", linewidth=3)
        axes.tick_params(length=0, colors=INK)
        for spine in axes.spines.values():
            spine.set_visible(False)
    shrink = 0.6 / height
    bar = figure.colorbar(image, ax=list(panels), ticks=[0, 0.5, 1], shrink=shrink, aspect=20)
    bar.ax.set_yticklabels(["0%", "50%", "100%"], fontsize=7.5, color=INK)
    bar.outline.set_visible(False)
    return figure


def _density(lines: Sequence[RulerSummary]) -> Any:
    """Score over all tasks against the share of pairs read in prefill and, below, in decode."""
    lengths = sorted({line.length for line in lines})
    columns = min(PANEL_COLUMNS, len(lengths))
    height = -(-len(lengths) // columns)
    figure = _figure(
        0.7 + LEGEND + 2.5 * columns, max(0.5 + 2.7 * height * len(PHASES), _legend_height(lines))
    )
    figure.suptitle("Score against density", color=INK, weight="bold", fontsize=11)
    known = [getattr(line, field) for line in lines for field in PHASES.values()]
    low = min([1.0, *(70 * density for density in known if density)])
    panels = figure.subplots(height * len(PHASES), columns, sharey=True, squeeze=False)
    for place, (phase, field) in enumerate(PHASES.items()):
        part = panels[place * height : (place + 1) * height].flatten()
        for axes in part[len(lengths) :]:
            axes.set_axis_off()
        for axes, length in zip(part, lengths, strict=False):
            axes.set_title(f"{tokens(length)}, {phase}", fontsize=9, color=INK)
            _score_against(axes, _series(lines, length), field)
            axes.set_xlim(low, 130)
            axes.set_xticks([tick for tick in TICKS if tick >= low])
            axes.minorticks_off()
    for axes in panels[:, 0]:
        axes.set_ylabel("mean score in % (95% interval)", fontsize=8, color=FAINT)
    _legend(figure, lines)
    return figure


def _score_against(
    axes: Any, series: Sequence[tuple[dict[str, Any], RulerSummary]], field: str
) -> None:
    """Draws the scores of one length over a density, and names the methods that have none."""
    unknown = []
    for style, line in series:
        density = getattr(line, field)
        if density is None:
            unknown.append(line.method.partition("(")[0])
            continue
        error = [[100 * (line.score - line.low)], [100 * (line.high - line.score)]]
        axes.errorbar([100 * density], [100 * line.score], yerr=error, capsize=2, lw=0.8, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}%")
    note = textwrap.wrap(f"not measured: {', '.join(unknown)}", NOTE_CHARS) if unknown else []
    axes.set_xlabel("\n".join(["pairs read", *note]), fontsize=8, color=FAINT)
    axes.set_ylim(-4, 104)
    _quiet(axes)


def _latency(lines: Sequence[RulerSummary]) -> Any:
    """Median times to first token and per token against length."""
    lengths = sorted({line.length for line in lines})
    figure = _figure(5.8 + LEGEND, max(3.6, _legend_height(lines)))
    figure.suptitle("Median times against length", color=INK, weight="bold", fontsize=11)
    left, right = figure.subplots(1, 2)
    drawn: dict[str, tuple[dict[str, Any], list[RulerSummary]]] = {}
    for length in lengths:
        for style, line in _series(lines, length):
            drawn.setdefault(line.method, (style, []))[1].append(line)
    for style, part in drawn.values():
        left.plot([x.length for x in part], [x.ttft_s for x in part], lw=1.2, **style)
        timed = [x for x in part if x.tpot_s is not None]
        times = [1e3 * (x.tpot_s or 0.0) for x in timed]
        right.plot([x.length for x in timed], times, lw=1.2, **style)
    for axes, label in ((left, "time to first token (s)"), (right, "time per token (ms)")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [tokens(n) for n in lengths])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("context (tokens)", fontsize=8, color=FAINT)
        axes.set_title(label, fontsize=9, color=INK)
        _quiet(axes)
    _legend(figure, lines)
    return figure


def _series(
    lines: Sequence[RulerSummary], length: int
) -> list[tuple[dict[str, Any], RulerSummary]]:
    """The lines over all tasks at a length, each with the style of its method."""
    methods = _distinct(lines, "method")
    return [
        (_style(methods.index(line.method)), line)
        for line in lines
        if line.length == length and line.task == ALL_TASKS
    ]


def _style(place: int) -> dict[str, Any]:
    """Colour and marker of a method; where the colours come round again they meet other markers."""
    marker = MARKERS[(place + place // len(SERIES)) % len(MARKERS)]
    return {"color": SERIES[place % len(SERIES)], "marker": marker, "markersize": 5}


def _quiet(axes: Any) -> None:
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#c6ccd2")


def _legend(figure: Any, lines: Sequence[RulerSummary]) -> None:
    """Names every method of the run, whichever panels it is in."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linewidth=1.2, label="\n".join(_legend_label(method)), **_style(place))
        for place, method in enumerate(_distinct(lines, "method"))
    ]
    figure.legend(
        handles=handles, loc="outside right center", fontsize=7.5, frameon=False, labelcolor=INK
    )


def _legend_label(method: str) -> list[str]:
    return method_lines(method, 7.5, LEGEND - 0.4)


def _legend_height(lines: Sequence[RulerSummary]) -> float:
    """Inches that the legend needs, and the title above it."""
    labels = [_legend_label(method) for method in _distinct(lines, "method")]
    return 0.6 + sum(0.13 * len(label) + 0.06 for label in labels)


def _distinct(lines: Sequence[RulerSummary], field: str) -> list[str]:
    return list(dict.fromkeys(getattr(line, field) for line in lines))
