"""Settings of the two searches, and the geometry that follows from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

SHARES = ("head", "group", "layer")
REPRESENTATIVES = ("center", "first", "last")
NODE_REPRESENTATIVES = (*REPRESENTATIVES, "spread")
ROWS = ("mean", "last")
CHUNK_SCORES = ("max", "last")


@dataclass(frozen=True)
class Geometry:
    """Tiles of one problem, in numbers of tiles; block m of queries starts at key m * block_q.

    Args:
        sinks: tiles that hold the sink.
        picks: most tiles that the search may list.
        width: most tiles of a list, those written behind its count included.
    """

    sinks: int
    picks: int
    width: int


@dataclass(frozen=True)
class SearchOptions:
    """What both searches share. Tiles lie on a grid of `block_k` keys from position 0.

    Args:
        block_q: queries that share a list.
        block_k: keys per listed tile.
        budget: keys listed by the search, at most; sink and window come on top.
        sink: keys at the start that are always listed, rounded up to whole tiles.
        window: keys up to each query that are always listed, rounded out to whole tiles.
        share: who shares a list: each query "head" has its own, the query heads of a KV head share
            one ("group"), or the whole "layer" does. A shared search ranks by the best head.
        rows: queries are scored in strides; a stride's row is the "mean" of its queries or the
            "last" of them.
    """

    block_q: int = 64
    block_k: int = 64
    budget: int = 4096
    sink: int = 64
    window: int = 1024
    share: str = "group"
    rows: str = "mean"

    def __post_init__(self) -> None:
        for name, low in (("block_q", 1), ("block_k", 1), ("sink", 0), ("window", 1)):
            self._expect_int(name, low)
        self._expect_int("budget", self.block_k)
        self._expect_choice("share", SHARES)
        self._expect_choice("rows", ROWS)

    def lists(self, Hq: int, Hkv: int) -> int:
        """Heads of the index."""
        return {"head": Hq, "group": Hkv, "layer": 1}[self.share]

    def geometry(self, Lk: int, behind: int = 0, ahead: int = 0) -> Geometry:
        """Counts of tiles for `Lk` keys; see `hip_stages` for `behind` and `ahead`."""
        total = -(-(Lk + ahead) // self.block_k)
        sinks = -(-self.sink // self.block_k)
        recent = (self.window + self.block_q + behind + ahead - 3) // self.block_k + 2
        picks = min(self.budget // self.block_k, total)
        return Geometry(sinks, picks, max(1, min(sinks + picks + recent, total)))

    def candidates(self, row0: int, behind: int = 0) -> tuple[int, int]:
        """Tiles [low, high) that the search may list for queries from position `row0` on."""
        low = -(-self.sink // self.block_k)
        return low, max(low, (row0 - behind - self.window + 1) // self.block_k)

    def covers(self, Lk: int) -> bool:
        """Whether the queries of the last block, and so of every block, read all of their past."""
        low, high = self.candidates((Lk - 1) // self.block_q * self.block_q)
        return high - low <= self.budget // self.block_k

    def _expect_int(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {value!r}")
        if value < low:
            raise ValueError(f"{name}: expected at least {low}, got {value}")

    def _expect_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}")


@dataclass(frozen=True)
class TreeOptions(SearchOptions):
    """Settings of `hip_tree`.

    Args:
        leaf: keys of a leaf; `block_k` is a multiple. With `leaf == block_k` the leaves themselves
            are listed, as published; otherwise they vote for the tiles that hold them.
        beam: nodes kept at each level, whatever the budget; a level has at most twice as many.
        row_stride: queries per scored row; every query is scored with 1.
        key_stride: keys of a leaf per scored one.
        representative: keys that stand for a node: the last of each stride in its "center", "first"
            or "last" leaf; or as many, "spread" over all its leaves.
    """

    leaf: int = 64
    beam: int = 512
    row_stride: int = 32
    key_stride: int = 4
    representative: str = "center"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_int("leaf", 1)
        self._expect_int("beam", 1)
        self._expect_int("row_stride", 1)
        self._expect_int("key_stride", 1)
        self._expect_choice("representative", NODE_REPRESENTATIVES)
        if self.block_k % self.leaf:
            raise ValueError(f"leaf: expected a divisor of block_k={self.block_k}, got {self.leaf}")
        if self.key_stride > self.leaf:
            raise ValueError(
                f"key_stride: expected at most leaf={self.leaf}, got {self.key_stride}"
            )


@dataclass(frozen=True)
class Stage:
    """One stage of `hip_stages`.

    Args:
        chunk: keys of a chunk.
        keep: keys in the chunks that the next stage gets; not used by the last stage, which lists
            `budget` keys.
        row_stride: queries per scored row in this stage.
        blocks: blocks of queries, a group of which starts at a multiple of it, that share the
            chunks it keeps; those of the next stage divide it, and the last stage has 1.
    """

    chunk: int
    keep: int = 0
    row_stride: int = 32
    blocks: int = 1


@dataclass(frozen=True)
class StageOptions(SearchOptions):
    """Settings of `hip_stages`.

    Args:
        stages: chunk sizes fall from stage to stage, each a divisor of the one before; the last
            divides `block_k`, and its chunks vote for the tiles that hold them.
        representative: key that stands for half a chunk: its "center", "first" or "last".
        chunk_score: a chunk scores the "max" over the representatives that won on the way to its
            best key, or that of the "last" one.
    """

    stages: tuple[Stage, ...] = (Stage(64, 32768), Stage(2))
    representative: str = "center"
    chunk_score: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_choice("representative", REPRESENTATIVES)
        self._expect_choice("chunk_score", CHUNK_SCORES)
        if not self.stages:
            raise ValueError("stages: expected at least one, got none")
        for i, stage in enumerate(self.stages):
            final = i + 1 == len(self.stages)
            below = self.stages[i + 1].chunk if not final else stage.chunk
            if stage.chunk < 1 or below < 1 or stage.chunk % below:
                raise ValueError(
                    f"stages: expected chunks that divide the ones before, got {self.chunks}"
                )
            if not final and stage.keep < stage.chunk:
                raise ValueError(
                    f"stages: expected keep of at least chunk={stage.chunk}, got {stage.keep}"
                )
            if stage.row_stride < 1:
                raise ValueError(f"stages: row_stride: expected at least 1, got {stage.row_stride}")
            divisor = 1 if final else self.stages[i + 1].blocks
            if stage.blocks < 1 or divisor < 1 or stage.blocks % divisor:
                raise ValueError(
                    "stages: blocks: expected multiples of the next stage's, got "
                    f"{[stage.blocks for stage in self.stages]}"
                )
            if final and stage.blocks != 1:
                raise ValueError(f"stages: blocks: expected 1 in the last, got {stage.blocks}")
            if (stage.blocks - 1) * self.block_q >= self.window:
                raise ValueError(
                    f"window: expected more than the {(stage.blocks - 1) * self.block_q} queries "
                    f"before the last of {stage.blocks} blocks, got {self.window}"
                )
        if self.block_k % self.stages[-1].chunk:
            raise ValueError(
                f"stages: expected a last chunk that divides block_k={self.block_k}, got "
                f"{self.stages[-1].chunk}"
            )

    def kept_width(self, number: int, Lk: int, before: int | None) -> int:
        """Most chunks that a stage, not the last, keeps; `before` as many chunks came to it."""
        stage = self.stages[number]
        if before is None:
            cut = -(-Lk // stage.chunk)
        else:
            cut = before * (self.chunks[number - 1] // stage.chunk)
        return min(cut, stage.keep // stage.chunk)

    def of_stage(self, number: int) -> StageOptions:
        """The settings of one stage, with its blocks of queries.

        Its candidates end where those of the last of the blocks do: the window is shorter, so that
        every key before the window of each block is a candidate.
        """
        blocks = self.stages[number].blocks
        if blocks == 1:
            return self
        return replace(
            self,
            block_q=blocks * self.block_q,
            window=self.window - (blocks - 1) * self.block_q,
            stages=tuple(replace(stage, blocks=1) for stage in self.stages),
        )

    @property
    def chunks(self) -> list[int]:
        """Chunk sizes."""
        return [stage.chunk for stage in self.stages]
