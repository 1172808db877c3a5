"""Attention mass and planted needles that a selection of keys captures, against the keys it loads.

    python -m bench.selection_study --lengths 8k,32k,128k,256k

One query head, one block of 64 queries, synthetic keys: a first-order autoregressive process, and
in it eight needles, each looked for by one query of the block. Rankings may carry over to a model;
figures do not.

mass: share of the softmax mass of the candidate keys (in neither sink nor window) that lies on
selected keys, mean over the rows. needles: share of those of which a key is selected. loads: keys
that are read to select, in thousands. All selections list the same number of keys.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.timing import environment
from lowcontext import _cli_parse as parse
from lowcontext.ops.hierarchy import Stage, StageOptions, TreeOptions, hip_stages, hip_tree

app = typer.Typer(add_completion=False)

ROWS, D = 64, 64
SINK, WINDOW, TILE = 64, 1024, 64
NEEDLES = 8
# Logits deviate by SPREAD over the keys: the best 2048 of 32K keys then hold four fifths of the
# mass. A needle adds STRENGTH deviations. COMMON is what a query shares with all of its block.
SPREAD, STRENGTH, COMMON = 2.5, 3.0, 0.7


@dataclass(frozen=True)
class World:
    """Neighbouring keys resemble each other over `correlation` keys; a needle has `width`."""

    correlation: int
    width: int

    @property
    def name(self) -> str:
        """Short label."""
        return f"{self.correlation}/{self.width}"


WORLDS = (World(16, 4), World(64, 4), World(4, 4), World(4, 1))


@dataclass(frozen=True)
class Problem:
    """One block of queries at the end of T keys.

    Args:
        q: [ROWS, D]; k: [T, D].
        before: [3 * ROWS, D]; the queries before, which may share a stage.
        needles: first keys of the needles.
        low, high: the candidate keys.
        mass: [ROWS, high - low], softmax over the candidates.
    """

    q: Tensor
    before: Tensor
    k: Tensor
    needles: list[int]
    low: int
    high: int
    mass: Tensor


def problem(T: int, world: World, seed: int) -> Problem:
    """The problem of a seed."""
    gen = torch.Generator().manual_seed(seed)
    decay = math.exp(-1.0 / world.correlation)
    k = autoregressive(torch.randn(T, D, generator=gen), decay)
    common = torch.randn(1, D, generator=gen)
    own = autoregressive(torch.randn(ROWS, D, generator=gen), decay)
    q = queries(common, own)
    low, high = bounds(T)
    tiles = torch.randperm((high - low) // TILE, generator=gen)[:NEEDLES] * TILE + low
    needles = tiles + torch.randint(0, TILE - world.width + 1, (NEEDLES,), generator=gen)
    seekers = torch.randint(0, ROWS, (NEEDLES,), generator=gen)
    for at, row in zip(needles.tolist(), seekers.tolist(), strict=True):
        k[at : at + world.width] += STRENGTH * q[row] / D**0.5
    mass = torch.softmax(SPREAD * (q @ k[low:high].T) / D**0.5, dim=1)
    before = queries(common, autoregressive(torch.randn(3 * ROWS, D, generator=gen), decay))
    return Problem(q, before, k, needles.tolist(), low, high, mass)


def queries(common: Tensor, own: Tensor) -> Tensor:
    """Queries of norm D^0.5 that share `common`."""
    q = COMMON**0.5 * common + (1 - COMMON) ** 0.5 * own
    return q / q.norm(dim=1, keepdim=True) * D**0.5


def bounds(T: int) -> tuple[int, int]:
    """The candidate keys among T."""
    return SINK, (T - ROWS - WINDOW + 1) // TILE * TILE


def autoregressive(noise: Tensor, decay: float) -> Tensor:
    """x_t = decay x_{t-1} + sqrt(1 - decay^2) noise_t along dim 0, in log2(T) doublings."""
    x, lag = noise * (1 - decay * decay) ** 0.5, 1
    while lag < len(x) and decay > 1e-8:
        x = torch.cat([x[:lag], x[lag:] + decay * x[:-lag]])
        lag, decay = 2 * lag, decay * decay
    return x


@dataclass(frozen=True)
class Result:
    """What a selection captures of a problem: mass and needles (shares), and keys loaded."""

    mass: float
    needles: float
    loads: float


def results(p: Problem, budget: int, width: int) -> Iterator[tuple[str, Result]]:
    """Every selection of `budget` keys of one problem."""
    for name, keep, loads in selections(p, budget):
        inside = torch.zeros(len(p.k), dtype=torch.bool)
        inside[p.low : p.high] = keep
        found = [bool(inside[at : at + width].any()) for at in p.needles]
        yield name, Result(float(p.mass[:, keep].sum(1).mean()), sum(found) / NEEDLES, loads)


def selections(p: Problem, budget: int) -> Iterator[tuple[str, Tensor, int]]:
    """(name, candidates selected, keys loaded)."""
    mass, n = p.mass.mean(0), p.high - p.low
    yield "oracle, tokens", best(mass, 1, budget), n
    yield "oracle, tiles", best(mass.view(-1, TILE).sum(1), TILE, budget), n
    keys = p.k[p.low : p.high]
    means = keys.view(-1, TILE, D).mean(1)
    yield "mean-pool, tiles", best(means @ p.q.mean(0), TILE, budget), n // TILE
    for page in (TILE, 16):
        low, high = keys.view(-1, page, D).aminmax(dim=1)
        bound = p.q.clamp(min=0) @ high.T + p.q.clamp(max=0) @ low.T
        yield f"Quest, pages of {page}", best(bound.amax(0), page, budget), 2 * n // page
    q, k = p.q[None, None], p.k[None, None]
    fixed: dict[str, Any] = {"sink": SINK, "window": WINDOW, "budget": budget}
    for name, options in searches():
        options = replace(options, **fixed)
        if isinstance(options, TreeOptions):
            index = hip_tree(q, k, options)
        else:
            shared = any(stage.blocks > 1 for stage in options.stages)
            rows = torch.cat([p.before, p.q])[None, None] if shared else q
            index, _ = hip_stages(rows, k, options)
        keep = index.key_mask(len(k[0, 0]))[0, 0, -1, p.low : p.high]
        yield name, keep, loads(options, n)


def best(scores: Tensor, width: int, budget: int) -> Tensor:
    """bool over the keys of the best pieces of `width` keys."""
    chosen = torch.zeros(len(scores), width, dtype=torch.bool)
    chosen[scores.topk(min(len(scores), budget // width)).indices] = True
    return chosen.flatten()


def searches() -> Iterator[tuple[str, TreeOptions | StageOptions]]:
    """Trees and stages by their settings; rows are means of 4 queries where nothing is said."""
    for beam in (512, 1024):  # leaves themselves are listed, as published
        tree = TreeOptions(block_k=2, leaf=2, key_stride=1, beam=beam, row_stride=4)
        yield f"tree, leaf 2 listed, beam {beam}", tree
    for leaf, stride in ((2, 1), (8, 4), (64, 8), (64, 4)):
        for beam in (256, 512, 1024) if stride == 4 else (512,):
            tree = TreeOptions(leaf=leaf, key_stride=stride, beam=beam, row_stride=4)
            yield f"tree, leaf {leaf}, stride {stride}, beam {beam}", tree
    tree = TreeOptions(leaf=64, key_stride=4, beam=512, row_stride=4)
    name = "tree, leaf 64, stride 4, beam 512"
    yield f"{name}, spread", replace(tree, representative="spread")
    for rows, row_stride in (("mean", 1), ("mean", 32), ("mean", 64), ("last", 32)):
        yield f"{name}, {rows} of {row_stride}", replace(tree, row_stride=row_stride, rows=rows)
    yield "tree, leaf 64, stride 1, beam 512", replace(tree, key_stride=1)
    published = ((256, 32768), (32, 8192), (8, 0))
    listed = StageOptions(block_k=8, stages=tuple(Stage(*s, row_stride=4) for s in published))
    yield "stages 256:32768 32:8192 8, listed", listed
    for text in (
        "256:32768 32:8192 8",
        "64:8192 8",
        "64:16384 2",
        "64:32768 2",
        "32:16384 2",
        "32:32768 2",
        "64",
        "32",
        "16",
    ):
        parts = (map(int, part.split(":")) for part in text.split())
        stages = tuple(replace(Stage(*part), row_stride=4) for part in parts)
        yield f"stages {text}", StageOptions(stages=stages)
    pooled = StageOptions(stages=(Stage(64, 32768, 32), Stage(2, row_stride=32)))
    yield "stages 64:32768 2, mean of 32", pooled
    shared = (Stage(64, 32768, 32, blocks=4), pooled.stages[1])
    yield "stages 64:32768x4 2, mean of 32", replace(pooled, stages=shared)


def loads(options: TreeOptions | StageOptions, candidates: int) -> int:
    """Keys that a search reads for a block of queries."""
    if isinstance(options, TreeOptions):
        leaves = candidates // options.leaf
        node, nodes = 1, 0
        while -(-leaves // node) > 2 * options.beam:
            node, nodes = 2 * node, nodes + 2 * options.beam
        return (nodes + -(-leaves // node)) * (options.leaf // options.key_stride)
    total = 0
    for stage in options.stages:
        rounds = max(1, (stage.chunk - 1).bit_length())
        total += 2 * rounds * -(-candidates // stage.chunk) // stage.blocks
        candidates = min(candidates, stage.keep or candidates)
    return total


@app.command()
def main(
    lengths: Annotated[str, typer.Option(help="Comma-separated, k is 1024.")] = "8k,32k,128k,256k",
    budget: Annotated[int, typer.Option(help="Keys selected.")] = 4096,
    trials: Annotated[int, typer.Option(help="Problems per length and world.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder of the JSONL file.")] = Path("bench/results"),
) -> None:
    """Prints a table per length, sorted by loads: mass / needles in percent for each world."""
    try:
        sizes = parse.lengths(lengths)
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from None
    for T in sizes:
        candidates = bounds(T)[1] - SINK
        if candidates < max(budget, NEEDLES * TILE):
            raise typer.BadParameter(
                f"--lengths, --budget: expected a length whose candidate keys, outside sink and "
                f"window, are at least {max(budget, NEEDLES * TILE)}, got {T} with "
                f"{max(0, candidates)}"
            )
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"selection-study-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    where = environment()
    with path.open("a") as file:
        for T in sizes:
            table: dict[str, dict[str, list[Result]]] = {}
            for world in WORLDS:
                for seed in range(trials):
                    for name, result in results(problem(T, world, seed), budget, world.width):
                        table.setdefault(name, {}).setdefault(world.name, []).append(result)
            for name, by_world in table.items():
                row = {"length": T, "budget": budget, "trials": trials, "selection": name}
                for world_name, found in by_world.items():
                    row |= {f"mass {world_name}": mean([r.mass for r in found])}
                    row |= {f"needles {world_name}": mean([r.needles for r in found])}
                row["loads"] = mean([r.loads for r in found])
                file.write(json.dumps({"suite": "selection-study", **row, **where}) + "\n")
            print("\n".join(lines(T, table)), flush=True)
    print(f"wrote {path}")


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def lines(T: int, table: dict[str, dict[str, list[Result]]]) -> Iterator[str]:
    """Markdown table of one length."""
    names = [world.name for world in WORLDS]
    yield f"\n| T = {T} | loads K | {' | '.join(names)} | mean |"
    yield "| --- " * (len(names) + 3) + "|"
    for name, by_world in sorted(table.items(), key=lambda row: mean(_loads(row[1]))):
        cells = [
            (mean([r.mass for r in by_world[w]]), mean([r.needles for r in by_world[w]]))
            for w in names
        ]
        cells.append((mean([c[0] for c in cells]), mean([c[1] for c in cells])))
        shown = " | ".join(f"{100 * mass:.0f}/{100 * needles:.0f}" for mass, needles in cells)
        yield f"| {name} | {mean(_loads(by_world)) / 1024:.1f} | {shown} |"


def _loads(by_world: dict[str, list[Result]]) -> list[float]:
    return [result.loads for found in by_world.values() for result in found]


if __name__ == "__main__":
    app()
