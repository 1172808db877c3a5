"""Pictures of a method's choices: one head's attention under its selection, patterns by head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowcontext.index import BlockIndex
from lowcontext.integrations._probe import Enough, probe
from lowcontext.methods import LayerContext, Method
from lowcontext.methods._patterns import KINDS, Layer

INK, FAINT = "#1f2933", "#66727f"
_UNREAD = 0.85  # grey of what a method does not read
# Rows of the weights that are formed at a time.
_ROWS = 256


@dataclass(frozen=True)
class HeadMap:
    """Attention of one head and what a method reads of it, on a coarse grid.

    Args:
        weights: [n, n]; softmax weight in each cell, per query: a row of cells sums to 1.
        read: [n, n]; share of the causal pairs of each cell that the method reads.
        cell: tokens per side of a cell.
        length: tokens of the prompt.
        recall: share of the softmax that the method reads, averaged over the queries.
        density: share of the causal pairs that it reads.
        label: method, layer and head.
    """

    weights: Tensor
    read: Tensor
    cell: int
    length: int
    recall: float
    density: float
    label: str


def head_map(
    model: nn.Module, ids: Tensor, method: Method, layer: int, head: int, *, cells: int = 512
) -> HeadMap:
    """The attention of one head on a prompt, and what a method would read of it.

    Args:
        model: an unpatched transformers model.
        ids: int [1, N].
        method: the method, for its prefill.
        layer: index of the layer; head: index of the query head.
        cells: most cells per side.

    Raises:
        ValueError: the model has no such layer or head, or the layer a sliding window.
    """
    found: list[HeadMap] = []

    def look(q: Tensor, k: Tensor, v: Tensor, at: LayerContext, window: int) -> None:
        if at.layer_idx != layer:
            return
        if not 0 <= head < q.shape[1]:
            raise ValueError(f"head: expected 0 to {q.shape[1] - 1}, got {head}")
        if window:
            raise ValueError(
                f"layer: expected one with full attention, got layer {layer} with a sliding window"
            )
        found.append(map_head(q, k, at, method, head, cells))
        raise Enough

    probe(model, ids, look)
    if not found:
        raise ValueError(f"layer: expected a layer of the model, got {layer}")
    return found[0]


def map_head(
    q: Tensor, k: Tensor, layer: LayerContext, method: Method, head: int, cells: int
) -> HeadMap:
    """The same from the layer's queries [1, Hq, N, D] and keys [1, Hkv, N, D].

    Raises:
        NotImplementedError: the method moves keys to other positions.
    """
    if method.moves_keys:
        raise NotImplementedError(
            f"{method}: expected a method that reads keys where they are, got one that moves "
            "them; turn that off to draw it"
        )
    N, group = q.shape[2], q.shape[1] // k.shape[1]
    cell = max(1, -(-N // cells))
    n = -(-N // cell)
    keys = k[0, head // group].float()
    columns = torch.arange(N, device=q.device)
    of_cell = columns // cell
    weights, pairs, read = (torch.zeros(n, n, device=q.device) for _ in range(3))
    inside = 0.0
    # No `Moved` from a method that does not move keys.
    parts = cast(Iterator[tuple[int, int, BlockIndex | None]], method.parts(q, k, layer))
    for row0, row1, index in parts:
        for row in range(row0, row1, _ROWS):
            rows = torch.arange(row, min(row + _ROWS, row1), device=q.device)
            visible = columns <= rows[:, None]
            if index is None:
                chosen = visible
            else:
                heads = index.kv_starts.shape[1]
                block = rows // index.block_q - row0 // index.block_q
                lists = slice(int(block[0]), int(block[-1]) + 1)
                listed = index.key_mask(N, lists)[0, head * heads // q.shape[1]]
                chosen = listed[block - block[0]] & visible
            logits = q[0, head, rows].float() @ keys.T * layer.scale
            if layer.softcap:
                logits = layer.softcap * torch.tanh(logits / layer.softcap)
            p = logits.masked_fill(~visible, -torch.inf).softmax(-1)
            inside += float((p * chosen).sum())
            for total, values in ((weights, p), (pairs, visible), (read, chosen)):
                by_column = torch.zeros(len(rows), n, device=q.device)
                by_column.index_add_(1, of_cell, values.float())
                total.index_add_(0, rows // cell, by_column)
    density = float(read.sum() / pairs.sum())
    weights /= torch.bincount(of_cell)[:, None]
    return HeadMap(
        weights.cpu(),
        (read / pairs.clamp(min=1)).cpu(),
        cell,
        N,
        inside / N,
        density,
        f"{method}, layer {layer.layer_idx}, head {head}",
    )


def plot_head(found: HeadMap, path: str | Path) -> Path:
    """Draws the attention map, and beside it the same with what is not read in grey.

    Args:
        found: from `head_map`.
        path: the image to write; its suffix chooses the format.

    Returns:
        The path.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    figure, (axes,), target = grid_figure(path, 1, 2, (5.5, 5.2))
    floor = 1e-6
    norm = LogNorm(vmin=floor, vmax=1.0)
    size = (0, found.length, found.length, 0)
    causal = torch.ones_like(found.weights).tril().bool()
    shown = torch.where(causal, found.weights.clamp(min=floor), torch.nan)
    for place, axis in enumerate(axes):
        image = axis.imshow(
            shown.numpy(), norm=norm, cmap="viridis", extent=size, interpolation="nearest"
        )
        if place:
            hidden = torch.zeros(*causal.shape, 4)
            hidden[..., :3] = _UNREAD
            hidden[..., 3] = torch.where(causal, 1 - found.read, torch.zeros(()))
            axis.imshow(hidden.numpy(), extent=size, interpolation="nearest")
        axis.set_title(
            f"read: {found.density:.1%} of the pairs, {found.recall:.2%} of the attention"
            if place
            else "attention",
            fontsize=10,
            color=INK,
            loc="left",
        )
        axis.set_xlabel("key", fontsize=8, color=FAINT)
        plain_axis(axis)
    axes[0].set_ylabel("query", fontsize=8, color=FAINT)
    bar = figure.colorbar(image, ax=list(axes), fraction=0.025, pad=0.02)
    bar.set_label(f"weight per query in {found.cell} keys", fontsize=8, color=FAINT)
    bar.ax.tick_params(labelsize=7, colors=INK)
    axes[1].legend(
        handles=[Patch(color=(_UNREAD,) * 3, label="not read")],
        fontsize=8,
        frameon=False,
        loc="upper right",
        labelcolor=INK,
    )
    figure.suptitle(found.label, fontsize=11, color=INK, x=0.01, ha="left", weight="bold")
    figure.savefig(target)
    return target


def plot_patterns(layers: Sequence[Layer], path: str | Path) -> Path:
    """Draws which pattern each head of each layer has.

    Args:
        layers: from `read_patterns`.
        path: the image to write; its suffix chooses the format.

    Returns:
        The path.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    patterns = sorted(
        (p for layer in layers for p in layer), key=lambda p: (KINDS.index(p.kind), p.a, p.b)
    )
    counts = Counter(str(p) for p in patterns)
    names = list(counts)
    heads = max(len(layer) for layer in layers)
    size = max(5.0, 0.22 * heads + 3.6), max(2.4, 0.2 * len(layers) + 1.4)
    figure, ((axis,),), target = grid_figure(path, 1, 1, size)
    colours = [colormaps["turbo"]((i + 0.5) / len(names)) for i in range(len(names))]
    table = [[names.index(str(p)) for p in layer] for layer in layers]
    axis.imshow(
        table, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(names) - 0.5, aspect="auto"
    )
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("query head", fontsize=8, color=FAINT)
    axis.set_ylabel("layer", fontsize=8, color=FAINT)
    plain_axis(axis)
    axis.legend(
        handles=[
            Patch(color=colour, label=f"{name}: {counts[name]}")
            for colour, name in zip(colours, names, strict=True)
        ],
        fontsize=7,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
    )
    figure.savefig(target, bbox_inches="tight")
    return target


def grid_figure(
    path: str | Path,
    rows: int,
    columns: int,
    size: tuple[float, float],
) -> tuple[Any, Any, Path]:
    """A figure of so many panels of a size in inches, its axes, and the path with its folder."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    whole = (size[0] * columns, size[1] * rows)
    figure = Figure(figsize=whole, dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False), target


def plain_axis(axis: Any) -> None:
    """Takes ticks and frame off an axis."""
    axis.tick_params(labelsize=7, colors=INK, length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
