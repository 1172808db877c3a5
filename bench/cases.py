"""The cases of each suite: shapes, dtypes, and the index that is attended over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowcontext import BlockIndex
from lowcontext.ops import native


@dataclass(frozen=True)
class Case:
    """One attention problem.

    Args:
        name: short label.
        Hq, Hkv, Lq, Lk, D, B: the shape.
        dtype: "float32", "bfloat16" or "float16".
        pattern: "dense", "blocks" (random tiles of the past), "pages" or "columns" (random lists).
        density: share of the causal pairs to list ("blocks").
        tokens: keys in a list ("pages", "columns").
        block: (block_q, block_k) of the index.
        device: of the index.
    """

    name: str
    Hq: int
    Hkv: int
    Lq: int
    Lk: int
    dtype: str
    pattern: str
    D: int = 128
    B: int = 1
    density: float = 1.0
    tokens: int = 0
    block: tuple[int, int] = (128, 64)
    device: str = "cpu"

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k, v on the CPU, the same for the same shape."""
        gen = torch.Generator().manual_seed(0)
        dtype = getattr(torch, self.dtype)
        shapes = [(self.Hq, self.Lq), (self.Hkv, self.Lk), (self.Hkv, self.Lk)]
        q, k, v = (torch.randn(self.B, h, n, self.D, generator=gen).to(dtype) for h, n in shapes)
        return q, as_cached(k), as_cached(v)

    def index(self, seed: int = 0) -> BlockIndex | None:
        """The index of the pattern; None where dense."""
        if self.pattern == "dense":
            return None
        return (random_blocks if self.pattern == "blocks" else random_lists)(self, seed)


def as_cached(x: Tensor) -> Tensor:
    """A copy of x in memory as the KV cache allocates it."""
    out = torch.empty_like(x)
    native.prefer_huge_pages(out)
    return out.copy_(x)


def random_blocks(case: Case, seed: int) -> BlockIndex:
    """Per query head: sink tile, the tiles of the diagonal, and random tiles up to the density."""
    block_q, block_k = case.block
    first, Nq = BlockIndex.query_blocks(case.Lq, case.Lk, block_q)
    Nk = -(-case.Lk // block_k)
    gen = torch.Generator(case.device).manual_seed(seed)
    row0 = torch.arange(first, first + Nq, device=case.device) * block_q
    row1 = (row0 + block_q).clamp(max=case.Lk)
    m = torch.arange(Nk, device=case.device)
    diagonal = (m[None] * block_k < row1[:, None]) & ((m[None] + 1) * block_k > row0[:, None])
    past = (m[None] + 1) * block_k <= row0[:, None]
    # The diagonal tiles hold about half of their pairs; the rest of the share comes from the past.
    total = case.Lk * (case.Lk + 1) / 2
    inside = float(block_q * (block_q + 1) / 2 * Nq)
    wanted = max(0.0, case.density * total - inside) / max(1.0, total - inside)
    scores = torch.rand(case.B, case.Hq, Nq, Nk, generator=gen, device=case.device)
    scores = scores.masked_fill(~past, -1.0)
    counts = (past.sum(-1) * wanted).round().long().clamp(min=0)
    if wanted > 0:
        scores[..., 0] = torch.where(past[:, 0], 2.0, -1.0)
    rank = scores.argsort(dim=-1, descending=True).argsort(dim=-1)
    keep = diagonal | ((rank < counts[:, None]) & past)
    limit = int(keep.sum(-1).max())
    return BlockIndex.from_blocks(keep, case.block, limit)


def random_lists(case: Case, seed: int) -> BlockIndex:
    """Per KV head: `tokens` keys as random aligned pages, or as random single columns."""
    gen = torch.Generator(case.device).manual_seed(seed)
    width = case.block[1] if case.pattern == "pages" else 1
    count = case.tokens // width
    slots = case.Lk // width
    shape = (case.B, case.Hkv, case.Lq, slots)
    picks = torch.rand(shape, generator=gen, device=case.device).topk(count, dim=-1).indices
    picks = (picks.sort(dim=-1).values * width).to(torch.int32)
    counts = torch.full(picks.shape[:3], count, dtype=torch.int32, device=case.device)
    if case.pattern == "pages":
        return BlockIndex(counts, picks, case.block)
    none = torch.zeros_like(counts)
    return BlockIndex(none, picks[..., :0], (1, 64), counts, picks)


def cpu_prefill(Lk: int = 16384) -> Iterator[Case]:
    """16K prompt, 8 query and 2 KV heads, D = 128, densities 3 to 100%."""
    for dtype in ("float32", "bfloat16"):
        for density in (0.03, 0.1, 0.2, 1.0):
            yield Case(
                name=f"prefill-{Lk // 1024}k-{density:.0%}-{dtype}",
                Hq=8,
                Hkv=2,
                Lq=Lk,
                Lk=Lk,
                dtype=dtype,
                pattern="blocks",
                density=density,
            )


def cpu_decode(Lk: int = 131072) -> Iterator[Case]:
    """One token on 128K cached ones: dense, pages of 64 and 16 keys, columns; 2K and 8K keys."""
    for dtype in ("float32", "bfloat16"):
        for Hq, Hkv in ((32, 8), (8, 2)):
            label = f"{Hq}/{Hkv}-{dtype}"
            shape = {"Hq": Hq, "Hkv": Hkv, "Lq": 1, "Lk": Lk, "dtype": dtype}
            yield Case(name=f"decode-dense-{label}", pattern="dense", **shape)
            for tokens in (2048, 8192):
                size = f"{tokens // 1024}k-{label}"
                for page in (64, 16):
                    yield Case(
                        name=f"decode-pages{page}-{size}",
                        pattern="pages",
                        tokens=tokens,
                        block=(1, page),
                        **shape,
                    )
                yield Case(name=f"decode-columns-{size}", pattern="columns", tokens=tokens, **shape)


SUITES = {"cpu-prefill": cpu_prefill, "cpu-decode": cpu_decode}
