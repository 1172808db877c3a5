"""Problems for the searches, and the definitions they are held to, list by list, in plain Python.

Scores are made of small integers, so that every backend computes them exactly and ties occur.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lowcontext import BlockIndex
from lowcontext.ops import native
from lowcontext.ops.hierarchy import SearchOptions, Stage, StageOptions, TreeOptions

BACKENDS = ["reference", *(["native"] if native.status() is None else [])]


TREE = TreeOptions(
    block_q=16,
    block_k=16,
    budget=64,
    sink=20,
    window=40,
    leaf=4,
    beam=10,
    row_stride=4,
    key_stride=2,
)
STAGES = StageOptions(
    block_q=16,
    block_k=16,
    budget=64,
    sink=20,
    window=40,
    stages=(Stage(64, 256, 4), Stage(16, 128, 2), Stage(4, row_stride=1)),
)


def integers(*shape: int, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=gen).float()


def qk(Lq: int, Lk: int, G: int = 2, Hkv: int = 2, D: int = 8, B: int = 1) -> tuple[Tensor, Tensor]:
    return integers(B, G * Hkv, Lq, D, seed=1), integers(B, Hkv, Lk, D, seed=2)


def listed(index: BlockIndex) -> dict:
    """Tiles of every (batch, list, block), by number."""
    return {
        at: (index.kv_starts[at][: int(count)] // index.block_k).tolist()
        for at, count in zip(
            torch.cartesian_prod(*map(torch.arange, index.kv_num_blocks.shape)).tolist(),
            index.kv_num_blocks.flatten(),
            strict=True,
        )
        for at in [tuple(at)]
    }


def scored_rows(q: Tensor, block: range, o: SearchOptions, stride: int, offset: int) -> Tensor:
    """Rows [R, D] of the block of absolute positions, of q [L, D] at `offset` and later."""
    rows = []
    for begin in block[::stride]:
        end = min(begin + stride, block.stop)
        found = [p - offset for p in range(begin, end) if offset <= p < offset + len(q)]
        if o.rows == "last":  # the last of the stride, or of the sequence
            found = [p for p in found if p + offset == min(end, offset + len(q)) - 1]
        if found:
            rows.append(q[found].double().mean(0))
    return torch.stack(rows)


def pick(left: int, right: int, which: str) -> int:
    return {"center": left + (right - left) // 2, "first": left, "last": right - 1}[which]


def best(scored: dict[int, float], count: int) -> list[int]:
    """Largest first, of equals the lower one; then in ascending order."""
    return sorted(sorted(scored, key=lambda i: (-scored[i], i))[:count])


def tree_tiles(score: Callable[[int], float], low: int, high: int, o: TreeOptions) -> list[int]:
    """Beam search over [low, high) tiles, `score` of a key; the tiles it lists."""
    per_tile = o.block_k // o.leaf
    n = (high - low) * per_tile
    size = 1
    while math.ceil(n / size) > 2 * o.beam:
        size *= 2
    nodes = [(left, min(left + size, n)) for left in range(0, n, size)]

    def value(node: tuple[int, int]) -> float:
        count = o.leaf // o.key_stride
        if o.representative == "spread":  # the middles of as many equal parts
            length = (node[1] - node[0]) * o.leaf
            keys = [node[0] * o.leaf + length * (2 * u + 1) // (2 * count) for u in range(count)]
        else:
            first = pick(*node, o.representative) * o.leaf
            keys = [first + u for u in range(o.key_stride - 1, o.leaf, o.key_stride)]
        return max(score(low * o.block_k + key) for key in keys)

    while True:
        nodes = [nodes[i] for i in best({i: value(x) for i, x in enumerate(nodes)}, o.beam)]
        if size == 1:
            break
        size //= 2
        pieces = [(range(*node)[:size], range(*node)[size:]) for node in nodes]
        nodes = [(half[0], half[-1] + 1) for piece in pieces for half in piece if half]
    votes: dict[int, float] = {}
    for node in nodes:
        tile = low + node[0] // per_tile
        votes[tile] = max(votes.get(tile, -math.inf), value(node))
    return best(votes, o.budget // o.block_k)


def chunk_score(score: Callable[[int], float], left: int, right: int, o: StageOptions) -> float:
    """SelectRep: the better half each time, down to one key."""
    won = []
    while True:
        middle = left + math.ceil((right - left) / 2)
        halves = [(left, middle), *([(middle, right)] if middle < right else [])]
        values = [score(pick(*half, o.representative)) for half in halves]
        left, right = halves[values.index(max(values))]
        won.append(max(values))
        if right - left == 1 and len(halves) == 1:
            return max(won) if o.chunk_score == "max" else won[-1]


def expected_lists(q: Tensor, k: Tensor, o: TreeOptions | StageOptions) -> dict:
    """Listed tiles of every (batch, list, block), straight from the definitions."""
    (B, Hq, Lq, _), (Hkv, Lk) = q.shape, k.shape[1:3]
    offset, lists = Lk - Lq, {"head": Hq, "group": Hkv, "layer": 1}[o.share]
    out = {}
    for b, h in itertools.product(range(B), range(lists)):
        heads = range(h * Hq // lists, (h + 1) * Hq // lists)
        for n, m in enumerate(range(offset // o.block_q, (Lk - 1) // o.block_q + 1)):
            first, last = m * o.block_q, min((m + 1) * o.block_q, Lk) - 1
            low = math.ceil(o.sink / o.block_k)
            high = max(low, math.floor((first - o.window + 1) / o.block_k))

            def by_head(stride: int, blocks: int = 1, b: int = b, m: int = m) -> dict[int, Tensor]:
                begin, width = m // blocks * blocks * o.block_q, blocks * o.block_q
                block = range(begin, begin + width)
                rows = {i: scored_rows(q[b, i], block, o, stride, offset) for i in range(Hq)}
                return {i: (r @ k[b, i // (Hq // Hkv)].double().T).amax(0) for i, r in rows.items()}

            if high - low <= o.budget // o.block_k:
                found = list(range(low, high))
            elif isinstance(o, TreeOptions):
                scores = by_head(o.row_stride)
                joint = torch.stack([scores[i] for i in heads]).amax(0).tolist()
                found = tree_tiles(joint.__getitem__, low, high, o)
            else:
                found = staged_tiles(by_head, heads, low, m, o)
            forced = {*range(low), *range(high, last // o.block_k + 1)}
            out[b, h, n] = sorted({*found, *(t for t in forced if t <= last // o.block_k)})
    return out


def staged_tiles(
    by_head: Callable[[int, int], dict[int, Tensor]],
    heads: range,
    low: int,
    m: int,
    o: StageOptions,
) -> list[int]:
    """Stages for block m of queries; the tiles they list."""
    begin, chunks = low * o.block_k, [(0, (m + 1) * o.block_q)]
    for stage in o.stages:
        last = (m // stage.blocks + 1) * stage.blocks - 1  # of the blocks that share the stage
        high = max(low, math.floor((last * o.block_q - o.window + 1) / o.block_k))
        chunks = [
            (x, y)
            for left, right in chunks
            for grid in range(left // stage.chunk * stage.chunk, right, stage.chunk)
            for x, y in [(max(grid, begin), min(grid + stage.chunk, high * o.block_k))]
            if x < y
        ]
        scores = {i: row.tolist() for i, row in by_head(stage.row_stride, stage.blocks).items()}
        value = {
            i: max(chunk_score(scores[h].__getitem__, *chunk, o) for h in heads)
            for i, chunk in enumerate(chunks)
        }
        if stage is not o.stages[-1]:
            chunks = [chunks[i] for i in best(value, stage.keep // stage.chunk)]
    votes: dict[int, float] = {}
    for i, (left, _) in enumerate(chunks):
        votes[left // o.block_k] = max(votes.get(left // o.block_k, -math.inf), value[i])
    return best(votes, o.budget // o.block_k)
