"""Pictures of the RULER suite: scores, score against density, times against length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lowcontext.eval.plots import COLOURS, FAINT, INK, NO_DATA, tokens
from lowcontext.eval.records import RulerRow
from lowcontext.eval.ruler.summary import ALL_TASKS, RulerSummary, summarize_ruler

# Told apart by colour and by marker; colours of Okabe and Ito, 2008, for any colour vision.
SERIES = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
MARKERS = "osD^vP*X"
PANEL_COLUMNS = 3
LABEL_CHARS = 34


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
    width = max(1.9, 0.62 * len(lengths))
    figure = _figure(1.5 + columns * (width + 0.25) + 0.5, 0.5 + height * (0.3 * len(tasks) + 0.75))
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
        axes.set_title(_wrapped(methods[place]), fontsize=8, color=INK, loc="left")
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
    """Score over all tasks against the share of pairs read, one panel per length."""
    lengths = sorted({line.length for line in lines})
    columns = min(PANEL_COLUMNS, len(lengths))
    height = -(-len(lengths) // columns)
    figure = _figure(2.4 + 2.7 * columns, 0.5 + 3.1 * height)
    figure.suptitle("Score against density of prefill", color=INK, weight="bold", fontsize=11)
    panels = figure.subplots(height, columns, sharey=True, squeeze=False).flatten()
    for axes in panels[len(lengths) :]:
        axes.set_axis_off()
    for axes, length in zip(panels, lengths, strict=False):
        for style, line in _series(lines, length):
            if line.density is None:
                continue
            error = [[100 * (line.score - line.low)], [100 * (line.high - line.score)]]
            axes.errorbar(
                [100 * line.density], [100 * line.score], yerr=error, capsize=3, lw=1, **style
            )
        axes.set_title(tokens(length), fontsize=9, color=INK)
        axes.set_xlim(0, 104)
        axes.xaxis.set_major_formatter("{x:g}%")
        axes.set_xlabel("pairs read", fontsize=8, color=FAINT)
        axes.set_ylim(-4, 104)
        _quiet(axes)
    for axes in panels[::columns]:
        axes.set_ylabel("mean score in % (95% interval)", fontsize=8, color=FAINT)
    _legend(figure, panels[0])
    return figure


def _latency(lines: Sequence[RulerSummary]) -> Any:
    """Median times to first token and per token against length."""
    lengths = sorted({line.length for line in lines})
    figure = _figure(8.0, 3.6)
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
    _legend(figure, left)
    return figure


def _series(
    lines: Sequence[RulerSummary], length: int
) -> list[tuple[dict[str, Any], RulerSummary]]:
    """The lines over all tasks at a length, each with the style of its method."""
    methods = _distinct(lines, "method")
    return [
        (
            {
                "color": SERIES[methods.index(line.method) % len(SERIES)],
                "marker": _marker(methods.index(line.method)),
                "markersize": 5,
                "label": _wrapped(line.method),
            },
            line,
        )
        for line in lines
        if line.length == length and line.task == ALL_TASKS
    ]


def _marker(place: int) -> str:
    """A marker; where the colours come round again they meet other markers."""
    return MARKERS[(place + place // len(SERIES)) % len(MARKERS)]


def _quiet(axes: Any) -> None:
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#c6ccd2")


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside right center", fontsize=7.5, frameon=False, labelcolor=INK
        )


def _distinct(lines: Sequence[RulerSummary], field: str) -> list[str]:
    return list(dict.fromkeys(getattr(line, field) for line in lines))


def _wrapped(label: str) -> str:
    """The method's name, and below it the settings that are not its defaults, cut short."""
    name, bracket, options = label.partition("(")
    settings = options.removesuffix(")")
    if len(settings) > LABEL_CHARS:
        settings = f"{settings[: LABEL_CHARS - 1]}…"
    return f"{name}\n{settings}" if bracket else name
