"""BlockIndex: which keys each block of queries reads; the one type between select and attend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """Lists, for every block of queries, the tiles and the single columns of keys that it reads.

    Query blocks are anchored at absolute position 0: with `Lq` queries at the end of `Lk` keys, the
    first query has position `Lk - Lq` and row `n` of the index describes the queries whose position
    divided by `block_q` is `(Lk - Lq) // block_q + n`. Attention over an index is always causal:
    a listed key after a query is masked for that query. `H` is 1, `Hkv` or `Hq`; a smaller `H` is
    shared by the query heads it covers. `B` may be 1 (shared by the batch). Entries of `kv_starts`
    and `kv_columns` beyond the count of their row are never read.

    Args:
        kv_num_blocks: int32 [B, H, Nq]; tiles listed for each query block.
        kv_starts: int32 [B, H, Nq, S]; first key position of each tile, ascending, tiles disjoint.
            A start need not be a multiple of `block_k`; a tile may run past the last key.
        block_size: `(block_q, block_k)` in tokens; decode uses `block_q = 1`.
        kv_num_columns: int32 [B, H, Nq] or None; single keys listed for each query block.
        kv_columns: int32 [B, H, Nq, C] or None; their positions, ascending, outside every tile.

    Raises:
        TypeError: a field is not an int32 tensor.
        ValueError: shapes do not fit each other.

    Example:
        >>> import torch, lowcontext
        >>> index = lowcontext.BlockIndex(
        ...     kv_num_blocks=torch.tensor([[[1, 2]]], dtype=torch.int32),
        ...     kv_starts=torch.tensor([[[[0, 0], [0, 64]]]], dtype=torch.int32),
        ...     block_size=(64, 64),
        ... )
        >>> index.density(128, 128)
        1.0
    """

    kv_num_blocks: Tensor
    kv_starts: Tensor
    block_size: tuple[int, int]
    kv_num_columns: Tensor | None = None
    kv_columns: Tensor | None = None

    def __post_init__(self) -> None:
        _expect_int32("kv_num_blocks", self.kv_num_blocks, 3)
        _expect_int32("kv_starts", self.kv_starts, 4)
        if self.kv_starts.shape[:3] != self.kv_num_blocks.shape:
            raise ValueError(
                f"kv_starts: expected shape {[*self.kv_num_blocks.shape, 'S']}, "
                f"got {list(self.kv_starts.shape)}"
            )
        _expect_block_size(self.block_size)
        if (self.kv_num_columns is None) != (self.kv_columns is None):
            raise ValueError(
                "kv_columns: expected together with kv_num_columns, got one of the two"
            )
        if self.kv_num_columns is not None and self.kv_columns is not None:
            _expect_int32("kv_num_columns", self.kv_num_columns, 3)
            _expect_int32("kv_columns", self.kv_columns, 4)
            if self.kv_num_columns.shape != self.kv_num_blocks.shape:
                raise ValueError(
                    f"kv_num_columns: expected shape {list(self.kv_num_blocks.shape)}, "
                    f"got {list(self.kv_num_columns.shape)}"
                )
            if self.kv_columns.shape[:3] != self.kv_num_blocks.shape:
                raise ValueError(
                    f"kv_columns: expected shape {[*self.kv_num_blocks.shape, 'C']}, "
                    f"got {list(self.kv_columns.shape)}"
                )

    @staticmethod
    def query_blocks(Lq: int, Lk: int, block_q: int) -> tuple[int, int]:
        """First absolute query block and number of query blocks of `Lq` queries ending at `Lk`."""
        first = (Lk - Lq) // block_q
        return first, -(-Lk // block_q) - first

    @property
    def block_q(self) -> int:
        """Queries per block."""
        return self.block_size[0]

    @property
    def block_k(self) -> int:
        """Keys per tile."""
        return self.block_size[1]

    @property
    def device(self) -> torch.device:
        """Device of the index tensors."""
        return self.kv_num_blocks.device

    # -- construction ---------------------------------------------------------------------------

    @classmethod
    def from_blocks(cls, keep: Tensor, block_size: tuple[int, int], limit: int = 0) -> BlockIndex:
        """Builds an index from a mask over grid-aligned key blocks.

        Args:
            keep: bool [B, H, Nq, Nk]; True where query block n reads key block m.
            block_size: `(block_q, block_k)`.
            limit: most blocks kept in any row, if the caller knows it: the width `S` then needs no
                read of `keep` on the host. 0 means `Nk`.

        Returns:
            BlockIndex with S = `limit` or Nk.
        """
        if keep.dtype != torch.bool or keep.dim() != 4:
            raise ValueError(
                f"keep: expected bool [B, H, Nq, Nk], got {keep.dtype} {list(keep.shape)}"
            )
        blocks, counts = compact(keep, min(limit, keep.shape[-1]) if limit else keep.shape[-1])
        return cls(counts, (blocks * block_size[1]).to(torch.int32), block_size)

    @classmethod
    def from_mask(cls, mask: Tensor, block_size: tuple[int, int]) -> BlockIndex:
        """Builds the smallest grid-aligned index that covers a token mask.

        A tile is listed where any query of the block reads any key of the tile, so `to_mask` gives
        back a superset: equal where `mask` is causal and constant on the blocks.

        Args:
            mask: bool [B, H, Lq, Lk], True where query attends to key; future keys are ignored.
            block_size: `(block_q, block_k)`.

        Returns:
            BlockIndex with H heads and S the largest count of any row.

        Raises:
            ValueError: not a bool mask [B, H, Lq, Lk] with 0 < Lq <= Lk, or no block size.
        """
        if mask.dtype != torch.bool or mask.dim() != 4:
            raise ValueError(
                f"mask: expected bool [B, H, Lq, Lk], got {mask.dtype} {list(mask.shape)}"
            )
        _expect_block_size(block_size)
        B, H, Lq, Lk = mask.shape
        if not 0 < Lq <= Lk:
            raise ValueError(f"mask: expected 0 < Lq <= Lk, got Lq={Lq}, Lk={Lk}")
        block_q, block_k = block_size
        first, Nq = cls.query_blocks(Lq, Lk, block_q)
        Nk = -(-Lk // block_k)
        positions = torch.arange(Lk - Lq, Lk, device=mask.device)
        causal = torch.arange(Lk, device=mask.device) <= positions[:, None]
        padded = mask.new_zeros(B, H, Nq * block_q, Nk * block_k)
        row0 = Lk - Lq - first * block_q
        padded[:, :, row0 : row0 + Lq, :Lk] = mask & causal
        keep = padded.view(B, H, Nq, block_q, Nk, block_k).any(dim=5).any(dim=3)
        return cls.from_blocks(keep, block_size, limit=max(1, int(keep.sum(-1).max())))

    # -- reading --------------------------------------------------------------------------------

    def key_mask(self, Lk: int, blocks: slice = slice(None)) -> Tensor:
        """Keys listed for each query block, before the causal mask: bool [B, H, Nq, Lk]."""
        counts, starts = self.kv_num_blocks[:, :, blocks], self.kv_starts[:, :, blocks]
        B, H, Nq, S = starts.shape
        mask = torch.zeros(B, H, Nq, Lk + 1, dtype=torch.bool, device=self.device)
        if S:
            listed = torch.arange(S, device=self.device) < counts[..., None]
            offsets = torch.arange(self.block_k, device=self.device)
            keys = starts.long()[..., None] + offsets
            valid = listed[..., None] & (keys >= 0) & (keys < Lk)
            keys = torch.where(valid, keys, Lk).reshape(B, H, Nq, S * self.block_k)
            mask.scatter_(3, keys, torch.ones_like(keys, dtype=torch.bool))
        if self.kv_columns is not None and self.kv_num_columns is not None:
            counts, keys = self.kv_num_columns[:, :, blocks], self.kv_columns[:, :, blocks].long()
            listed = torch.arange(keys.shape[-1], device=self.device) < counts[..., None]
            keys = torch.where(listed & (keys >= 0) & (keys < Lk), keys, Lk)
            mask.scatter_(3, keys, torch.ones_like(keys, dtype=torch.bool))
        return mask[..., :Lk]

    def to_mask(self, Lq: int, Lk: int, kv_start: Tensor | None = None) -> Tensor:
        """The token mask that attention over this index uses.

        Args:
            Lq: number of queries; Lk: number of keys; the last query sees the last key.
            kv_start: int [B] or None; keys before it do not exist.

        Returns:
            bool [B, H, Lq, Lk]; True where the key is listed, not in the future, not padding.
        """
        self._expect_blocks(Lq, Lk)
        first, _ = self.query_blocks(Lq, Lk, self.block_q)
        positions = torch.arange(Lk - Lq, Lk, device=self.device)
        keys = torch.arange(Lk, device=self.device)
        mask = self.key_mask(Lk)[:, :, positions // self.block_q - first]
        mask = mask & (keys <= positions[:, None])
        if kv_start is not None:
            mask = mask & (keys >= kv_start.to(self.device)[:, None, None, None])
        return mask

    def density(self, Lq: int, Lk: int) -> float:
        """Share of the causal (query, key) pairs that the index reads, averaged over B and H.

        Counted in closed form from the lists, so it is cheap at any length; the index must be
        valid. Reads the result on the host (a synchronisation on a GPU).
        """
        self._expect_blocks(Lq, Lk)
        first, Nq = self.query_blocks(Lq, Lk, self.block_q)
        block = torch.arange(first, first + Nq, device=self.device)
        row0 = (block * self.block_q).clamp(min=Lk - Lq)[:, None]
        row1 = ((block + 1) * self.block_q).clamp(max=Lk)[:, None]  # exclusive

        def pairs_from(key: Tensor) -> Tensor:
            # pairs (p, j) with row0 <= p < row1 and key <= j <= p
            low = torch.maximum(key.clamp(min=0, max=Lk), row0)
            rows = (row1 - low).clamp(min=0)
            return rows * (low - key.clamp(min=0, max=Lk) + 1) + rows * (rows - 1) // 2

        total = torch.zeros((), dtype=torch.int64, device=self.device)
        lists = [(self.kv_num_blocks, self.kv_starts, self.block_k)]
        if self.kv_columns is not None and self.kv_num_columns is not None:
            lists.append((self.kv_num_columns, self.kv_columns, 1))
        for counts, starts, width in lists:
            listed = torch.arange(starts.shape[-1], device=self.device) < counts[..., None]
            pairs = pairs_from(starts.long()) - pairs_from(starts.long() + width)
            total = total + torch.where(listed, pairs, 0).sum()
        causal = Lq * (Lk - Lq) + Lq * (Lq + 1) // 2
        B, H = self.kv_num_blocks.shape[:2]
        return float(total) / (causal * B * H)

    def validate(self, Lq: int, Lk: int) -> None:
        """Checks the contents of the index; kernels stay memory-safe without it, results do not.

        Reads tensors on the host: for tests and for indices built by hand, not for a hot path.

        Raises:
            ValueError: naming the first [b, h, block] that breaks a rule, and the rule.
        """
        self._expect_blocks(Lq, Lk)
        _check_list("kv_starts", self.kv_num_blocks, self.kv_starts, self.block_k, Lk)
        if self.kv_columns is None or self.kv_num_columns is None:
            return
        _check_list("kv_columns", self.kv_num_columns, self.kv_columns, 1, Lk)
        tiles_only = BlockIndex(self.kv_num_blocks, self.kv_starts, self.block_size)
        step = max(1, 2**24 // max(1, Lk * self.kv_starts.shape[0] * self.kv_starts.shape[1]))
        for n in range(0, self.kv_num_blocks.shape[2], step):
            mask = tiles_only.key_mask(Lk, slice(n, n + step))
            columns = self.kv_columns[:, :, n : n + step].long()
            listed = (
                torch.arange(columns.shape[-1], device=self.device)
                < self.kv_num_columns[:, :, n : n + step, None]
            )
            inside = mask.gather(3, columns.clamp(0, Lk - 1)) & listed
            _raise_at("kv_columns", inside, "columns outside every listed tile", columns, n)

    def to_flex(self, Lq: int, Lk: int, Hq: int | None = None) -> BlockMask:
        """The same attention as a torch FlexAttention `BlockMask`, full and partial blocks apart.

        Args:
            Lq: number of queries; Lk: number of keys.
            Hq: query heads; needed where the index has one list per KV head, which FlexAttention
                has no form for and which is then repeated.

        Raises:
            ValueError: the index has columns, or tiles that are not multiples of `block_k`, or the
                first query is not at a multiple of `block_q`: FlexAttention has no form for those.
        """
        from torch.nn.attention.flex_attention import BlockMask

        self._expect_blocks(Lq, Lk)
        if self.kv_num_columns is not None and bool(self.kv_num_columns.any()):
            raise ValueError("to_flex: expected an index without columns, got kv_columns")
        offset = Lk - Lq
        if offset % self.block_q:
            raise ValueError(
                f"to_flex: expected Lk - Lq to be a multiple of {self.block_q}, got {offset}"
            )
        listed = (
            torch.arange(self.kv_starts.shape[-1], device=self.device)
            < self.kv_num_blocks[..., None]
        )
        if bool(((self.kv_starts % self.block_k != 0) & listed).any()):
            raise ValueError(
                f"to_flex: expected tile starts that are multiples of {self.block_k}, got others"
            )
        B, H, Nq, _ = self.kv_starts.shape
        Nk = -(-Lk // self.block_k)
        blocks = torch.where(listed, self.kv_starts // self.block_k, Nk).long()
        keep = torch.zeros(B, H, Nq, Nk + 1, dtype=torch.bool, device=self.device)
        keep = keep.scatter_(3, blocks.clamp(0, Nk), torch.ones_like(blocks, dtype=torch.bool))
        keep = keep[..., :Nk]
        if Hq is not None and H not in (1, Hq):
            keep = keep.repeat_interleave(Hq // H, dim=1)
        row0 = torch.arange(Nq, device=self.device)[:, None] * self.block_q + offset
        last_key = (torch.arange(Nk, device=self.device) + 1) * self.block_k - 1
        full = keep & (last_key <= row0) & (last_key < Lk)
        future = torch.arange(Nk, device=self.device) * self.block_k >= row0 + self.block_q
        partial_blocks, partial_counts = compact(keep & ~full & ~future, Nk)
        full_blocks, full_counts = compact(full, Nk)

        batch, heads = (1 if n > 1 else 0 for n in keep.shape[:2])
        block_q, block_k = self.block_size

        def visible(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            listed = keep[b * batch, h * heads, q_idx // block_q, kv_idx // block_k]
            return listed & (kv_idx <= q_idx + offset)

        return BlockMask.from_kv_blocks(
            partial_counts,
            partial_blocks.to(torch.int32),
            full_counts,
            full_blocks.to(torch.int32),
            BLOCK_SIZE=self.block_size,
            mask_mod=visible,
            seq_lengths=(Lq, Lk),
        )

    def _expect_blocks(self, Lq: int, Lk: int) -> None:
        _, Nq = self.query_blocks(Lq, Lk, self.block_q)
        if self.kv_num_blocks.shape[2] != Nq:
            raise ValueError(
                f"index: expected {Nq} query blocks for Lq={Lq}, Lk={Lk}, block_q={self.block_q}, "
                f"got {self.kv_num_blocks.shape[2]}"
            )


def compact(keep: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Positions of the True entries of each row, ascending, without a host synchronisation.

    Args:
        keep: bool [..., N].
        width: columns of the result; at least the largest number of True entries in a row.

    Returns:
        int64 [..., width] positions (entries beyond the count are 0) and int32 [...] counts.
    """
    rank = keep.to(torch.int32).cumsum(-1)
    slot = torch.where(keep, rank - 1, width).clamp(max=width).long()
    source = torch.arange(keep.shape[-1], device=keep.device).expand(keep.shape)
    out = torch.zeros(*keep.shape[:-1], width + 1, dtype=torch.int64, device=keep.device)
    out = out.scatter_(-1, slot, source)
    counts = rank[..., -1] if keep.shape[-1] else rank.sum(-1)
    return out[..., :width], counts.clamp(max=width).to(torch.int32)


def _expect_block_size(value: tuple[int, int]) -> None:
    fits = isinstance(value, Sequence) and len(value) == 2
    if not fits or not all(isinstance(size, int) and size > 0 for size in value):
        raise ValueError(f"block_size: expected two positive ints, got {value!r}")


def _expect_int32(name: str, value: Tensor, dims: int) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.int32:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected an int32 tensor, got {got}")
    if value.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {list(value.shape)}")


def _check_list(name: str, counts: Tensor, starts: Tensor, width: int, Lk: int) -> None:
    S = starts.shape[-1]
    _raise_at(name, (counts < 0) | (counts > S), f"a count in [0, {S}]", counts)
    listed = torch.arange(S, device=starts.device) < counts[..., None]
    _raise_at(name, listed & (starts < 0), "positions >= 0", starts)
    if width == 1:
        _raise_at(name, listed & (starts >= Lk), f"columns < Lk={Lk}", starts)
    if S > 1:
        gap = starts[..., 1:].long() - starts[..., :-1].long()
        rule = "ascending, disjoint tiles" if width > 1 else "ascending, distinct columns"
        _raise_at(name, listed[..., 1:] & (gap < width), rule, starts[..., 1:])


def _raise_at(name: str, bad: Tensor, rule: str, values: Tensor, first_block: int = 0) -> None:
    if bool(bad.any()):
        where = [int(i) for i in bad.nonzero()[0]]
        value = int(values[tuple(where)])
        where[2] += first_block
        raise ValueError(f"{name}: expected {rule}, got {value} at {where}")
