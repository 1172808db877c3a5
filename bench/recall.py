"""Attention recall against density of every prefill method, on structured inputs.

python -m bench.recall --length 16k --plot docs/recall.png

Recall is the share of the dense softmax that a method reads, averaged over queries and heads of
`bench.structured`; density is the share of the causal pairs. Published MInference budgets are
compared with the default selection at equal density.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from bench.prefill_methods import Parts, mean_density
from bench.structured import HEADS, structured
from bench.timing import environment
from lowcontext import LayerContext, Method, get_method
from lowcontext import _cli_parse as parse

console = Console()
app = typer.Typer(add_completion=False)

BLOCK = 128  # rows of a sampled block
PUBLISHED = "minference, published rule"
# (vertical, slash) budgets of shipped files, and smaller ones for densities below those.
BUDGETS = (
    (30, 100),
    (40, 130),
    (50, 150),
    (100, 200),
    (100, 400),
    (30, 800),
    (100, 750),
    (100, 800),
    (500, 700),
    (512, 2048),
    (1000, 2048),
    (1000, 4096),
    (1000, 6096),
    (1000, 100),
    (3500, 100),
)
# Settings of each method's curve; the default is marked where it is among them.
SWEEPS: dict[str, tuple[str, list[Any]]] = {
    "minference": ("gain", [8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.12, 0.06]),
    "flexprefill": ("gamma", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98]),
    "xattention": ("threshold", [0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95]),
    "block_topk": ("budget", [512, 1024, 2048, 4096, 8192]),
    "streaming_llm": ("window", [256, 512, 1024, 2048, 4096, 8192]),
    "hip": ("budget", [512, 1024, 2048, 4096]),
    "infinitehip": ("budget", [512, 1024, 2048, 4096]),
    "tokenselect": ("k", [256, 512, 1024, 2048, 4096]),
}


@dataclass(frozen=True)
class Point:
    """One setting of one method.

    Args:
        curve: the method; setting: its hyper-parameters.
        default: whether these are the method's defaults.
        density, recall: averages; worst: recall of the head that loses most.
        heads: recall of each head.
    """

    curve: str
    setting: str
    default: bool
    density: float
    recall: float
    worst: float
    heads: list[float]


@app.command()
def main(
    length: Annotated[str, typer.Option(help="Tokens.")] = "16k",
    blocks: Annotated[int, typer.Option(help="Sampled blocks of 128 queries.", min=1)] = 24,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="The image to write.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the JSONL file.")] = Path("bench/results"),
) -> None:
    """Prints one table, writes one JSONL row per setting, and draws one plot."""
    (N,) = parse.lengths(length)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"recall-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    where = environment()
    with path.open("w") as file:
        points = []
        for point in measure(N, blocks, seed):
            points.append(point)
            row = {"suite": "recall", "N": N, "seed": seed, **asdict(point), **where}
            file.write(json.dumps(row) + "\n")
            file.flush()
    console.print(table_of(points))
    for line in comparison(points):
        console.print(line, highlight=False)
    if plot is not None:
        console.print(f"wrote {draw(points, N, plot)}")
    console.print(f"wrote {path}")


@torch.inference_mode()
def measure(N: int, blocks: int, seed: int) -> list[Point]:
    """Every point of every curve."""
    q, k = structured(N, seed)
    rows = sampled_rows(N, blocks)
    exact = [dense_weights(q, k, row) for row in rows]
    points = []
    for v, s in BUDGETS:
        table = [{str(h): ["vertical_and_slash", v, s, 1.0] for h in range(len(HEADS))}] * 32
        method = get_method("minference", patterns=table, min_length=0, parity="minference")
        points.append(measured(PUBLISHED, f"{v}, {s}", False, method, q, k, rows, exact))
    table = [{str(h): ["block_sparse", 0, 0, 1.0] for h in range(len(HEADS))}] * 32
    method = get_method("minference", patterns=table, min_length=0)
    points.append(
        measured("minference, block-sparse", "100 blocks", False, method, q, k, rows, exact)
    )
    for name, (option, values) in SWEEPS.items():
        for value in values:
            method = get_method(name, **{option: value, "min_length": 0})
            default = getattr(get_method(name), option) == value
            setting = f"{option}={value}"
            points.append(measured(name, setting, default, method, q, k, rows, exact))
    return points


def sampled_rows(N: int, blocks: int) -> list[int]:
    """First rows of blocks spread over the prompt, each in the middle of its share."""
    total = N // BLOCK
    blocks = min(blocks, total)
    return [(2 * i + 1) * total // (2 * blocks) * BLOCK for i in range(blocks)]


def dense_weights(q: Tensor, k: Tensor, row: int) -> Tensor:
    """Softmax weights of one block of queries, summed over its halves: [H, 2, keys]."""
    end = row + BLOCK
    G = q.shape[1] // k.shape[1]
    logits = q[0, :, row:end] @ k[0, :, :end].repeat_interleave(G, dim=0).transpose(1, 2)
    future = torch.arange(end) > torch.arange(row, end)[:, None]
    p = logits.masked_fill(future, -torch.inf).softmax(-1)
    return p.unflatten(1, (2, -1)).sum(2)


def measured(
    curve: str,
    setting: str,
    default: bool,
    method: Method,
    q: Tensor,
    k: Tensor,
    rows: list[int],
    exact: list[Tensor],
) -> Point:
    """Density and recall of one method."""
    N = q.shape[2]
    # A layer in the middle: some methods leave the first ones dense.
    layer = LayerContext(layer_idx=16, num_layers=32, scale=1.0)
    parts: Parts = list(method.parts(q, k, layer))
    kept = torch.zeros(q.shape[1], dtype=torch.float64)
    for row, weights in zip(rows, exact, strict=True):
        for half in range(2):
            at = row + half * BLOCK // 2
            kept += (weights[:, half] * keys_read(parts, at, weights.shape[2])).double().sum(-1)
    recall = kept / (len(rows) * BLOCK)
    return Point(
        curve,
        setting,
        default,
        mean_density(parts, N),
        float(recall.mean()),
        float(recall.min()),
        [round(float(x), 5) for x in recall],
    )


def keys_read(parts: Parts, at: int, keys: int) -> Tensor:
    """Keys listed for the block of queries at position `at`: [1 or H, keys]."""
    for row, end, index in parts:
        if row <= at < end:
            if index is None:
                return torch.ones(1, keys, dtype=torch.bool)
            n = at // index.block_q - row // index.block_q
            listed = index.key_mask(keys, slice(n, n + 1))[0, :, 0]
            heads = len(HEADS)
            return (
                listed
                if len(listed) in (1, heads)
                else listed.repeat_interleave(heads // len(listed), dim=0)
            )
    raise ValueError(f"at: expected a position inside the parts, got {at}")


def table_of(points: list[Point]) -> Table:
    """All points; the defaults are marked."""
    names = ("density", "recall", "worst head")
    table = Table("method", "setting", *(Column(n, justify="right") for n in names), box=SIMPLE)
    for p in points:
        marked = f"{p.setting} (default)" if p.default else p.setting
        table.add_row(p.curve, marked, f"{p.density:.3f}", f"{p.recall:.4f}", f"{p.worst:.4f}")
    return table


def frontier(points: list[Point], density: float) -> float:
    """Best recall that mixing the settings of a curve reaches at a density: its upper hull."""
    best = max((p.recall for p in points if p.density <= density), default=0.0)
    for a in points:
        for b in points:
            if a.density <= density < b.density:
                share = (density - a.density) / (b.density - a.density)
                best = max(best, a.recall + share * (b.recall - a.recall))
    return best


def comparison(points: list[Point]) -> list[str]:
    """The default selection against the best mix of published budgets, at each density."""
    published = [p for p in points if p.curve == PUBLISHED]
    lines = []
    for p in points:
        if p.curve == "minference" and p.density >= min(x.density for x in published):
            best = frontier(published, p.density)
            lines.append(
                f"density {p.density:.3f} ({p.setting}): recall {p.recall:.4f}, published budgets "
                f"at most {best:.4f}: {p.recall - best:+.4f}"
            )
    return lines


def draw(points: list[Point], N: int, path: Path) -> Path:
    """Recall over density, a line per method, defaults as large dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for curve in dict.fromkeys(p.curve for p in points):
        part = sorted((p for p in points if p.curve == curve), key=lambda p: p.density)
        scattered = curve == PUBLISHED
        (line,) = axes.plot(
            [p.density for p in part],
            [p.recall for p in part],
            linestyle="none" if scattered else "-",
            marker="x" if scattered else "o",
            markersize=5 if scattered else 3,
            label=curve,
        )
        chosen = [p for p in part if p.default]
        axes.plot(
            [p.density for p in chosen],
            [p.recall for p in chosen],
            "o",
            markersize=9,
            color=line.get_color(),
        )
    axes.set_xscale("log")
    shares = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
    axes.minorticks_off()
    axes.set_xlabel("density: share of the causal pairs that is read")
    axes.set_ylabel("recall: share of the dense softmax")
    axes.set_title(f"{N} tokens, structured inputs; large dots are defaults", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    return path


if __name__ == "__main__":
    app()
