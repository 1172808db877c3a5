"""The needle figure: a heatmap of accuracy over depth and length for every method."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowcontext.eval.records import NeedleRow
from lowcontext.eval.summary import SummaryRow, summarize

INK, FAINT, NO_DATA = "#1f2933", "#66727f", "#e6e8eb"
# Colour-blind safe: orange is wrong, blue is right, and no value is white.
COLOURS = ("#b3541e", "#f0a35e", "#fbf1d0", "#7fb2d6", "#1f5f99")

# Inches.
LEFT, RIGHT, TOP, BOTTOM = 0.85, 1.0, 0.45, 0.5
GAP_X, GAP_Y, GROUP, LINE = 0.3, 0.6, 0.2, 0.146
MIN_FIGURE, MIN_WIDTH, CELL_WIDTH, CELL_HEIGHT = 5.2, 2.4, 0.5, 0.3
CHAR = 0.0081  # mean width of a character per point of font size, a little generous
SETTINGS_LINES = 2


@dataclass(frozen=True)
class _Grid:
    """Lengths, depths and settings of all heatmaps, and the size of one in inches."""

    lengths: list[int]
    depths: list[float]
    methods: list[str]

    @property
    def width(self) -> float:
        return max(MIN_WIDTH, CELL_WIDTH * len(self.lengths))

    @property
    def height(self) -> float:
        return max(0.9, CELL_HEIGHT * len(self.depths))

    @property
    def settings(self) -> int:
        """Lines of settings above a heatmap, so that all names stand at one height."""
        return max(len(method_lines(method, 7.5, self.width)) - 1 for method in self.methods)

    @property
    def header(self) -> float:
        """Name, settings and three lines of figures."""
        return 0.3 + LINE * (self.settings + 3)


def plot_needle(
    rows: Iterable[NeedleRow], path: str | Path, *, title: str | None = None, columns: int = 4
) -> Path:
    """Draws one heatmap per method, with one colour scale for all of them.

    Cells show the share of right answers in percent. Above each heatmap stand the overall accuracy
    with its 95% Wilson interval, and the mean density and median times at the longest length.

    Args:
        rows: Rows of any number of methods; several tasks or haystacks are drawn below each other.
        path: The image to write; its suffix chooses the format (.png, .svg, .pdf).
        title: Heading of the figure.
        columns: Most heatmaps beside each other.

    Returns:
        The path.

    Raises:
        ValueError: If there are no rows, or ``columns`` is not positive.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    found = list(rows)
    if not found:
        raise ValueError("rows: expected at least one row, got none")
    if columns < 1:
        raise ValueError(f"columns: expected 1 or more, got {columns}")
    groups: dict[tuple[str, str], dict[str, list[NeedleRow]]] = {}
    for row in found:
        groups.setdefault((row.task, row.haystack), {}).setdefault(row.method, []).append(row)
    grid = _Grid(
        sorted({row.length for row in found}),
        sorted({row.depth for row in found}),
        list(dict.fromkeys(row.method for row in found)),
    )

    wide = min(columns, max(len(methods) for methods in groups.values()))
    lines = {group: -(-len(methods) // wide) for group, methods in groups.items()}
    panels = LEFT + wide * (grid.width + GAP_X) - GAP_X
    width = max(MIN_FIGURE, panels + RIGHT)
    height = TOP + BOTTOM + len(groups) * GROUP
    step = grid.header + grid.height + GAP_Y
    height += sum(lines.values()) * step - GAP_Y
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    colours = LinearSegmentedColormap.from_list("accuracy", COLOURS).with_extremes(bad=NO_DATA)

    def add_axes(left: float, top: float, size: tuple[float, float]) -> Any:
        """Adds axes given in inches from the top left corner."""
        bottom = height - top - size[1]
        return figure.add_axes((left / width, bottom / height, size[0] / width, size[1] / height))

    heading = title or "Needle in a haystack"
    figure.text(LEFT / width, 1 - 0.3 / height, heading, fontsize=13, color=INK, weight="bold")
    top = TOP
    images: list[Any] = []
    for group, methods in groups.items():
        label = _group_label(*group)
        figure.text(LEFT / width, 1 - (top + 0.1) / height, label, fontsize=10, color=FAINT)
        top += GROUP
        for place, (method, part) in enumerate(methods.items()):
            line, column = divmod(place, wide)
            panel_top = top + line * step + grid.header
            left = LEFT + column * (grid.width + GAP_X)
            axes = add_axes(left, panel_top, (grid.width, grid.height))
            images.append(_draw_cells(axes, part, grid, colours))
            _draw_header(axes, method, part, grid)
            _draw_ticks(axes, grid, first=column == 0)
            axes.set_xlabel("context (tokens)", color=FAINT, fontsize=8)
        top += lines[group] * step
    bar_axes = add_axes(panels + 0.25, TOP + GROUP + grid.header, (0.13, grid.height))
    bar = figure.colorbar(images[0], cax=bar_axes, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0%", "50%", "100%"], fontsize=8, color=INK)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def _draw_cells(axes: Any, rows: list[NeedleRow], grid: _Grid, colours: Any) -> Any:
    """Draws the cells of one heatmap and returns its image."""
    cells: dict[tuple[float, int], list[bool]] = {}
    for row in rows:
        cells.setdefault((row.depth, row.length), []).append(row.correct)
    table = [
        [_share(cells.get((depth, length), [])) for length in grid.lengths] for depth in grid.depths
    ]
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            known = value == value
            text = f"{100 * value:.0f}" if known else "–"
            colour = "white" if known and abs(value - 0.5) > 0.35 else INK
            axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=colour)
    return axes.imshow(table, cmap=colours, vmin=0.0, vmax=1.0, aspect="auto")


def _draw_ticks(axes: Any, grid: _Grid, *, first: bool) -> None:
    axes.set_xticks(range(len(grid.lengths)), [tokens(n) for n in grid.lengths], fontsize=8)
    depths = [f"{depth:.4g}%" for depth in grid.depths]
    axes.set_yticks(range(len(depths)), depths if first else [""] * len(depths), fontsize=8)
    axes.set_xticks([x - 0.5 for x in range(1, len(grid.lengths))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(depths))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if first:
        axes.set_ylabel("needle depth", color=FAINT, fontsize=8)


def _draw_header(axes: Any, method: str, rows: list[NeedleRow], grid: _Grid) -> None:
    """Writes the method's name and quiet lines of settings and figures above a heatmap."""
    settings = method_lines(method, 7.5, grid.width)[1:]
    name = method_lines(method, 10.5, grid.width)[0]
    missing = grid.settings - len(settings)
    lines = [*settings, *[""] * missing, *_figures(rows)]
    for place, line in enumerate(reversed(lines)):
        _write_above(axes, 5 + 72 * LINE * place, line, size=7.5, color=FAINT)
    _write_above(axes, 7 + 72 * LINE * len(lines), name, size=10.5, color=INK, weight="bold")


def _write_above(axes: Any, points: float, text: str, *, size: float, **style: str) -> None:
    axes.annotate(
        text,
        xy=(0, 1),
        xytext=(0, points),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=size,
        va="bottom",
        **style,
    )


def _figures(rows: list[NeedleRow]) -> list[str]:
    """Returns the lines of figures of one heatmap."""
    (overall,) = summarize(rows, by_length=False)
    longest = summarize(rows)[-1]
    interval = f"[{100 * overall.low:.0f}–{100 * overall.high:.0f}%]"
    return [
        f"accuracy {overall.accuracy:.0%} {interval}, n = {overall.samples}",
        f"at {tokens(longest.length or 0)}: {_density(longest)}",
        _times(longest),
    ]


def _density(line: SummaryRow) -> str:
    return "density not known" if line.density is None else f"density {100 * line.density:.3g}%"


def _times(line: SummaryRow) -> str:
    per_token = "" if line.tpot_s is None else f", TPOT {1e3 * line.tpot_s:.0f} ms"
    return f"TTFT {line.ttft_s:.2f} s{per_token}"


def _share(outcomes: list[bool]) -> float:
    return sum(outcomes) / len(outcomes) if outcomes else float("nan")


def _group_label(task: str, haystack: str) -> str:
    kind = {"single": "one needle", "multikey": "one of four needles"}.get(task, task)
    return f"right answers in %, {kind}, haystack: {Path(haystack).name}"


def tokens(length: int) -> str:
    """A length as people write it: 16K, or 1000."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def method_lines(label: str, size: float, width: float) -> list[str]:
    """A method's name, and the settings that are not its defaults in at most two lines.

    Args:
        label: The method as rows name it.
        size: Font size in points.
        width: Inches that there are.

    Returns:
        The name, then no line, one or two; what does not fit is cut off.
    """
    name, _, options = label.partition("(")
    chars = int(width / (CHAR * size))
    if len(name) > chars:
        name = f"{name[: chars - 1]}…"
    settings = textwrap.wrap(
        options.removesuffix(")"), chars, max_lines=SETTINGS_LINES, placeholder=" …"
    )
    return [name, *settings]
