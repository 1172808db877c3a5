"""The cases of the GPU suite, each a problem that checks and times several candidates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

import lowcontext
from bench.cases import Case as Lists
from bench.dense import best, dense_calls, flex_call
from bench.device import Device
from bench.oracle import sampled_error
from bench.timing import Times
from lowcontext.ops.triton import interpreted

Row = dict[str, Any]
Call = Callable[[], Any]
DTYPE, D = torch.bfloat16, 128
# Sizes that exercise the code of a case on a CPU.
TINY = {"L": 512, "B": 2, "Hkv": 2}


@dataclass(frozen=True)
class Case(ABC):
    """One problem in bf16, D = 128.

    Args:
        L: tokens; B: sequences; Hq, Hkv: heads.
        seconds: after which it is given up. Most of it is for kernels that have to be compiled.
    """

    section: ClassVar[str]

    L: int = 131072
    Hq: int = 32
    Hkv: int = 8
    B: int = 1
    seconds: float = 30.0

    @property
    def name(self) -> str:
        """Section and shape."""
        length = f"{self.L // 1048576}M" if self.L % 1048576 == 0 else f"{self.L // 1024}K"
        return f"{self.section} {length} {self.Hq}/{self.Hkv} B={self.B}"

    @property
    def timing(self) -> float:
        """Seconds after which no round of timing starts."""
        return min(8.0, self.seconds / 3)

    @property
    def bytes(self) -> int:
        """Memory that it takes at its largest, estimated."""
        return self.B * self.L * D * DTYPE.itemsize * (3 * self.Hq + 2 * self.Hkv) + 2**31

    def shrunk(self) -> Case:
        """The same case at a size for a CPU."""
        sizes = {name: min(size, getattr(self, name)) for name, size in TINY.items()}
        return replace(self, **sizes, Hq=self.Hq // self.Hkv * sizes["Hkv"])

    @abstractmethod
    def rows(self, device: Device) -> Iterator[Row]:
        """Checks and times its candidates."""

    def qkv(self, device: Device, Lq: int, D: int = D) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k, v; in fp16 where triton's interpreter runs, which has no bf16."""
        dtype = torch.float16 if interpreted() else DTYPE
        shapes = [(self.Hq, Lq), (self.Hkv, self.L), (self.Hkv, self.L)]
        q, k, v = (
            device.randn(self.B, h, n, D, dtype=dtype, seed=i) for i, (h, n) in enumerate(shapes)
        )
        return q, k, v


def timed(candidate: str, t: Times, needs: tuple[str, ...] = (), **more: Any) -> Row:
    """The row of a candidate; `needs` names the tests that must have passed."""
    times = {"p20_ms": t.p20, "p50_ms": t.p50, "p80_ms": t.p80}
    return {"candidate": candidate, "needs": needs, **times, **more}


def refused(candidate: str, reason: str, red: bool = False) -> Row:
    """The row of a candidate that has no figures; `red` where that is an error of ours."""
    return {"candidate": candidate, "skipped": reason} | ({"red": True} if red else {})


def wrong(error: float, allowed: float) -> str:
    """Why a candidate whose check failed is not timed; empty where it passed."""
    return "" if error <= allowed else f"error {error:.2e}, allowed {allowed:.2e}; not timed"


@dataclass(frozen=True)
class Ceilings(Case):
    """What the device copies and multiplies."""

    section: ClassVar[str] = "ceilings"

    @property
    def name(self) -> str:
        """The section."""
        return self.section

    @property
    def bytes(self) -> int:
        """Two buffers of 2 GiB, and the products."""
        return 5 * 2**30

    def rows(self, device: Device) -> Iterator[Row]:
        """Bandwidth (bytes read and written) and bf16 matrix products of random numbers."""
        size, n = (2**20, 256) if device.tiny else (2**31, 8192)
        source = torch.empty(size, dtype=torch.uint8, device=device.kind).fill_(1)
        target = torch.empty_like(source)
        a, b = (device.randn(n, n, dtype=DTYPE, seed=i) for i in range(2))
        calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
        times = device.times(calls, seconds=self.timing)
        yield timed("copy", times["copy"], gb_per_s=2 * size / times["copy"].p50 / 1e6)
        yield timed("matmul", times["matmul"], tflops=2 * n**3 / times["matmul"].p50 / 1e9)


@dataclass(frozen=True)
class Prefill(Case):
    """Attention over lists of random tiles of 128 x 64, beside dense attention.

    Args:
        densities: shares of the causal pairs.
        flex: time FlexAttention over the second of the lists too; it compiles for tens of seconds.
    """

    section: ClassVar[str] = "prefill"

    densities: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    flex: bool = False

    @property
    def name(self) -> str:
        """Section and shape."""
        return super().name + (" flex" if self.flex else "")

    @property
    def bytes(self) -> int:
        """Scores of all tiles and their two orders come on top of queries, keys and outputs."""
        return super().bytes + self.B * self.Hq * (self.L // 128) * (self.L // 64) * 32

    def rows(self, device: Device) -> Iterator[Row]:
        """Dense candidates, and ours at each density."""
        q, k, v = self.qkv(device, self.L)
        scale = D**-0.5
        calls, missing = dense_calls(q, k, v)
        for name, reason in missing.items():
            yield refused(name, reason)
        share, errors = dict.fromkeys(calls, 1.0), {}
        lists = Lists("", self.Hq, self.Hkv, self.L, self.L, "", "blocks", B=self.B)
        for density in (1.0, *self.densities):
            name = "ours-dense" if density == 1.0 else f"ours {density:.0%}"
            index = None
            if density < 1.0:
                index = replace(lists, density=density, device=device.kind).index()
                calls[name] = partial(lowcontext.sparse_attention, q, k, v, index)
            found = sampled_error(q, k, v, calls[name](), (0, self.L, index), scale)
            if wrong(*found):
                yield refused(name, wrong(*found), red=True)
                del calls[name]
                continue
            errors[name] = found[0]
            share[name] = 1.0 if index is None else index.density(self.L, self.L)
            if self.flex and index is not None and density == self.densities[1]:
                flex = f"flex {density:.0%}"
                calls[flex], share[flex] = flex_call(q, k, v, index, scale), share[name]
        times = device.times(calls, seconds=self.timing)
        dense = best({name: t.p50 for name, t in times.items()})
        pairs = self.L * (self.L + 1) / 2
        for name, t in times.items():
            flops = 4 * self.B * self.Hq * D * pairs * share[name]
            ratio = times[dense].p50 / t.p50
            yield timed(
                name,
                t,
                ("attend",) if name.startswith("ours") else (),
                density=share[name],
                tflops=flops / t.p50 / 1e9,
                best_dense=dense,
                speedup_over_dense=ratio,
                efficiency=ratio * share[name],
                max_error=errors.get(name),
            )


@dataclass(frozen=True)
class DecodeLists(Case):
    """One query for each head over lists of random pages and columns, in a CUDA graph.

    Each replay reads several lists, so that none is in a cache when it is read.
    """

    section: ClassVar[str] = "decode lists"
    TOKENS: ClassVar[tuple[int, ...]] = (2048, 4096, 8192, 16384)
    LISTS: ClassVar[int] = 4

    def rows(self, device: Device) -> Iterator[Row]:
        """Bytes of the listed keys and values per second, beside what a copy moves."""
        q, k, v = self.qkv(device, 1)
        size = 2**20 if device.tiny else 2**30
        source = torch.zeros(size, dtype=torch.uint8, device=device.kind)
        target = torch.empty_like(source)
        calls: dict[str, Call] = {"copy": lambda: target.copy_(source)}
        moved, errors = {"copy": 2.0 * size}, {}
        for tokens in (64, 128) if device.tiny else self.TOKENS:
            for kind, width in (("pages", 64), ("pages", 16), ("columns", 1)):
                name = f"{tokens} keys, " + (f"pages of {width}" if width > 1 else "columns")
                lists = Lists(
                    "", self.Hq, self.Hkv, 1, self.L, "", kind, B=self.B, tokens=tokens,
                    block=(1, width), device=device.kind,
                )  # fmt: skip
                indices = [lists.index(seed) for seed in range(self.LISTS)]
                out = lowcontext.sparse_attention(q, k, v, indices[0])
                found = sampled_error(q, k, v, out, (0, 1, indices[0]), D**-0.5)
                if wrong(*found):
                    yield refused(name, wrong(*found), red=True)
                    continue
                calls[name] = device.captured(partial(_each, q, k, v, indices))
                moved[name] = 2.0 * self.B * self.Hkv * tokens * D * DTYPE.itemsize
                errors[name] = found[0]
        times = device.times(calls, seconds=self.timing)
        copied = moved["copy"] / times["copy"].p50
        for name, t in times.items():
            if name != "copy":
                each = t.divided(self.LISTS)
                rate = moved[name] / each.p50
                more = {"gb_per_s": rate / 1e6, "bandwidth_share": rate / copied}
                yield timed(name, each, ("attend",), max_error=errors[name], **more)


def _each(q: Tensor, k: Tensor, v: Tensor, indices: list[lowcontext.BlockIndex]) -> None:
    for index in indices:
        lowcontext.sparse_attention(q, k, v, index)
