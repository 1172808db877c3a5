"""The needle figure: a heatmap of accuracy over depth and length for every method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lowcontext.eval.records import NeedleRow
from lowcontext.eval.summary import SummaryRow, summarize

INK, FAINT = "#1f2933", "#66727f"
# Colour-blind safe: orange (wrong) over pale yellow to blue (right), both ends clearly not white.
COLOURS = ("#b3541e", "#f0a35e", "#fbf1d0", "#7fb2d6", "#1f5f99")
NO_DATA = "#e6e8eb"
TITLE_CHARS = 34


def plot_needle(
    rows: Iterable[NeedleRow], path: str | Path, *, title: str | None = None, columns: int = 4
) -> Path:
    """Draws one heatmap per method, with one colour scale for all of them.

    Cells show the share of right answers; the title of a heatmap gives the overall accuracy with
    its 95% Wilson interval, and the mean density and median times at the longest length.

    Args:
        rows: Rows of any number of methods; several tasks or haystacks are drawn below each other.
        path: The image to write; its suffix chooses the format (.png, .svg, .pdf).
        title: Heading of the figure; by default the task and the haystack.
        columns: Most heatmaps beside each other.

    Returns:
        The path.

    Raises:
        ValueError: If there are no rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    found = list(rows)
    if not found:
        raise ValueError("rows: expected at least one row, got none")
    groups: dict[tuple[str, str], dict[str, list[NeedleRow]]] = {}
    for row in found:
        groups.setdefault((row.task, row.haystack), {}).setdefault(row.method, []).append(row)
    lengths = sorted({row.length for row in found})
    depths = sorted({row.depth for row in found})
    several = len(groups) > 1
    panels = [
        (f"{_label(*group)} · {method}" if several else method, part)
        for group, methods in groups.items()
        for method, part in methods.items()
    ]
    wide = min(columns, max(len(methods) for methods in groups.values()))
    tall = sum(-(-len(methods) // wide) for methods in groups.values())
    slots = _slots([len(methods) for methods in groups.values()], wide)

    cell_width = max(1.75, 0.62 * len(lengths))
    cell_height = max(1.5, 0.36 * len(depths))
    size = (cell_width * wide + 0.75 * wide + 1.1, (cell_height + 1.35) * tall + 0.75)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.02, hspace=0.04)
    figure = Figure(figsize=size, dpi=160, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    grid = figure.subplots(tall, wide, squeeze=False)
    colours = LinearSegmentedColormap.from_list("accuracy", COLOURS)
    colours.set_bad(NO_DATA)
    images = []
    for (name, part), slot in zip(panels, slots, strict=True):
        images.append(_panel(grid[slot], name, part, lengths, depths, colours))
        if slot[1] == 0:
            grid[slot].set_ylabel("needle depth", color=INK, fontsize=9)
    for place in set(_slots([wide] * tall, wide)) - set(slots):
        grid[place].set_axis_off()
    bar = figure.colorbar(images[0], ax=grid, fraction=0.025, pad=0.015, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0%", "50%", "100%"], fontsize=8, color=INK)
    bar.set_label("right answers", fontsize=9, color=INK)
    bar.outline.set_visible(False)
    heading = title or " and ".join(_label(*group) for group in groups)
    figure.suptitle(heading, fontsize=12, fontweight="bold", color=INK)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def _slots(sizes: Sequence[int], wide: int) -> list[tuple[int, int]]:
    """Returns (row, column) for each panel; every group starts a new row."""
    slots, top = [], 0
    for size in sizes:
        slots += [(top + i // wide, i % wide) for i in range(size)]
        top += -(-size // wide)
    return slots


def _panel(
    axes: Any,
    name: str,
    rows: list[NeedleRow],
    lengths: list[int],
    depths: list[float],
    colours: Any,
) -> Any:
    """Draws one heatmap and returns its image."""
    cells: dict[tuple[float, int], list[bool]] = {}
    for row in rows:
        cells.setdefault((row.depth, row.length), []).append(row.correct)
    nan = float("nan")
    table = [
        [
            sum(cells[depth, length]) / len(cells[depth, length])
            if (depth, length) in cells
            else nan
            for length in lengths
        ]
        for depth in depths
    ]
    image = axes.imshow(table, cmap=colours, vmin=0.0, vmax=1.0, aspect="auto")
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            text = "–" if value != value else f"{100 * value:.0f}"
            dark = value == value and (value <= 0.12 or value >= 0.88)
            colour = "white" if dark else INK
            axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=colour)
    axes.set_xticks(range(len(lengths)), [_tokens(n) for n in lengths], fontsize=8)
    axes.set_yticks(range(len(depths)), [f"{depth:g}%" for depth in depths], fontsize=8)
    axes.set_xticks([x - 0.5 for x in range(1, len(lengths))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(depths))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0, colors=INK)
    axes.set_xlabel("context (tokens)", color=INK, fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    # Name in bold, two quiet lines of figures under it.
    figures = _figures(rows)
    axes.set_title("\n" * len(figures), fontsize=8, pad=6)
    axes.annotate(
        "\n".join(figures),
        xy=(0, 1),
        xytext=(0, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=7.5,
        color=FAINT,
        linespacing=1.35,
        va="bottom",
    )
    axes.annotate(
        _shorten(name),
        xy=(0, 1),
        xytext=(0, 9 + 10.5 * len(figures)),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=10,
        fontweight="bold",
        color=INK,
        va="bottom",
    )
    return image


def _figures(rows: list[NeedleRow]) -> list[str]:
    """Returns the lines under a heatmap's name."""
    (overall,) = summarize(rows, by_length=False)
    longest = summarize(rows)[-1]
    lines = [
        f"accuracy {overall.accuracy:.0%} "
        f"[{overall.low:.0%}–{overall.high:.0%}], n = {overall.samples}"
    ]
    return [*lines, f"at {_tokens(longest.length or 0)}: {_costs(longest)}"]


def _costs(line: SummaryRow) -> str:
    parts = [f"TTFT {line.ttft_s:.3g} s"]
    if line.density is not None:
        parts.insert(0, f"density {line.density:.1%}")
    if line.tpot_s is not None:
        parts.append(f"TPOT {1e3 * line.tpot_s:.3g} ms")
    return " · ".join(parts)


def _label(task: str, haystack: str) -> str:
    kind = {"single": "single needle", "multikey": "multi-key needle"}.get(task, task)
    return f"{kind}, haystack of {Path(haystack).name}"


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _shorten(name: str) -> str:
    return name if len(name) <= TITLE_CHARS else f"{name[: TITLE_CHARS - 1]}…"
