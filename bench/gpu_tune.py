"""Tile sizes of the attend kernels, each compiled, checked and timed beside those of the table.

    python -m bench.gpu --only tune --out bench/results
    python -m bench.compare bench/results/tune-TIME.jsonl

The second command prints every tile size with its measurement, the fastest first. Compiling takes
longer than running, so processes of this module, one for each core, do it first: they leave the
kernels in triton's cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

from torch import Tensor

import lowcontext.ops.triton as backend
from bench.cases import Case as Lists
from bench.device import Device
from bench.gpu_cases import DTYPE, Call, Case, Row, refused, timed, wrong
from bench.kernels_report import Config, row
from bench.oracle import sampled_error
from lowcontext.ops.triton.launch import Problem, Target, Tiles, decode_tiles, plan, prefill_tiles

ROOT = Path(__file__).parent.parent
# The share of its time that a case compiles.
_COMPILING = 0.6
# Distance of two outputs of a row, relative to its length. Weights and outputs rounded to 16 bits
# put two right ones 2^-8 apart; without one of 2000 keys they are 2^-5.5 apart.
_APART = 2.0**-6
# Registers of a thread. A kernel whose sums and logits take more spills, and takes the compiler a
# minute.
_REGISTERS = 255
_REPORTED = ("registers", "spilled", "shared", "blocks", "ahead", "products")


@dataclass(frozen=True)
class Sweep(Case):
    """Every tile size of one kernel on the problems of one shape.

    Args:
        D: head dimension.
    """

    D: int = 128
    seconds: float = 90.0

    @property
    def name(self) -> str:
        """Section and shape."""
        return f"{super().name} D={self.D}"

    @property
    @abstractmethod
    def config(self) -> Config:
        """A problem without memory whose kernels are those of `problems`."""

    @abstractmethod
    def table(self, capability: int) -> Tiles:
        """The tile sizes of a call on such a device."""

    @abstractmethod
    def sizes(self) -> list[Tiles]:
        """All tile sizes, apart from those that cannot but spill."""

    @abstractmethod
    def problems(self, device: Device) -> dict[str, list[Problem]]:
        """By name, problems that are solved one after the other."""

    @abstractmethod
    def work(self, problem: Problem, ms: float) -> Row:
        """Density and rate of a problem solved in so long."""

    def call(self, device: Device, run: Call) -> Call:
        """What is timed."""
        return run

    def rows(self, device: Device) -> Iterator[Row]:
        """The sizes on each problem, the fastest first."""
        problems = self.problems(device)
        target = backend.target(next(iter(problems.values()))[0].q)
        table = self.table(target.capability)
        sizes = [table, *(tiles for tiles in self.sizes() if tiles != table)]
        if device.tiny:
            sizes = sizes[:: len(sizes) // 2]
        reports = compiled(self.config, sizes, target.capability, _COMPILING * self.seconds)
        for label, group in problems.items():
            for line in self._problem(device, group, target, reports):
                yield {**line, "candidate": f"{label}, {line['candidate']}"}

    def _problem(
        self, device: Device, group: list[Problem], target: Target, reports: dict[Tiles, Row]
    ) -> Iterator[Row]:
        """The sizes on one problem; the first of `reports` is the table's."""
        first, table = group[0], next(iter(reports))
        expected = solve(group[:1], target, table)
        part = (0, first.q.shape[2], first.index)
        found = sampled_error(first.q, first.k, first.v, expected, part, first.scale)
        calls: dict[str, Call] = {}
        for tiles, report in reports.items():
            if "failed" in report:
                yield refused(_label(tiles), report["failed"])
                continue
            apart = _apart(solve(group[:1], target, tiles), expected)
            if reason := wrong(*found) or wrong(apart, _APART):
                yield refused(_label(tiles), reason, red=True)
                continue
            calls[_label(tiles)] = self.call(device, partial(solve, group, target, tiles))
        times = device.times(calls, seconds=self.timing)
        for tiles in sorted(
            (tiles for tiles in reports if _label(tiles) in times),
            key=lambda tiles: times[_label(tiles)].p50,
        ):
            t = times[_label(tiles)]
            more = self.work(first, t.p50 / len(group)) | reports[tiles]
            if _label(table) in times:
                more["speedup_over_table"] = times[_label(table)].p50 / t.p50
            each = t.divided(len(group))
            yield timed(_label(tiles), each, ("attend",), tiles=asdict(tiles), **more)


@dataclass(frozen=True)
class PrefillSweep(Sweep):
    """Lists of random tiles of 128 x 128."""

    section: ClassVar[str] = "tune prefill"

    L: int = 32768
    densities: tuple[float, ...] = (0.05, 0.2)

    @property
    def config(self) -> Config:
        """See `Sweep`."""
        return Config("prefill", "bfloat16", self.D, "blocks")

    def table(self, capability: int) -> Tiles:
        """See `Sweep`."""
        return prefill_tiles(self.D, DTYPE.itemsize, 128, capability)

    def sizes(self) -> list[Tiles]:
        """64 or 128 rows, 32 to 128 keys, 4 or 8 warps, 2 to 4 stages."""
        found = []
        for rows, keys, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
            if rows * (self.D + keys) <= _REGISTERS * 32 * warps:
                found.append(Tiles(rows, keys, warps, stages))
        return found

    def problems(self, device: Device) -> dict[str, list[Problem]]:
        """One for each density."""
        q, k, v = self.qkv(device, self.L, self.D)
        lists = Lists("", self.Hq, self.Hkv, self.L, self.L, "", "blocks", B=self.B)
        lists = replace(lists, block=(128, 128), device=device.kind)
        found = {}
        for density in self.densities[:1] if device.tiny else self.densities:
            index = replace(lists, density=density).index()
            found[f"{density:.0%}"] = [Problem(q, k, v, index, self.D**-0.5, 0.0, 0, None)]
        return found

    def work(self, problem: Problem, ms: float) -> Row:
        """Matrix products of the listed pairs."""
        assert problem.index is not None
        density = problem.index.density(self.L, self.L)
        flops = 4 * self.B * self.Hq * self.D * self.L * (self.L + 1) / 2 * density
        return {"density": density, "tflops": flops / ms / 1e9}


@dataclass(frozen=True)
class DecodeSweep(Sweep):
    """One query for each head over random pages; each call reads several lists.

    Args:
        page: keys of a page.
        tokens: keys of a list.
    """

    section: ClassVar[str] = "tune decode"
    LISTS: ClassVar[int] = 4

    B: int = 4
    page: int = 16
    tokens: int = 4096

    @property
    def name(self) -> str:
        """Section, shape and page."""
        return f"{super().name} page={self.page}"

    @property
    def config(self) -> Config:
        """See `Sweep`."""
        kind = "pages" if self.page == 16 else "tiles"
        return Config("decode", "bfloat16", self.D, kind, self.Hq // self.Hkv)

    def table(self, capability: int) -> Tiles:
        """See `Sweep`."""
        return decode_tiles(self.D, DTYPE.itemsize, self.Hq // self.Hkv, capability)

    def sizes(self) -> list[Tiles]:
        """32 to 128 keys, 2 to 8 warps, 2 to 5 stages; 1 to 4 programs per multiprocessor."""
        rows = self.table(80).BLOCK_M
        shapes = product((32, 64, 128), (2, 4, 8), (2, 3, 4, 5), (1, 2, 4))
        return [Tiles(rows, n, warps, stages, 255, parts) for n, warps, stages, parts in shapes]

    def problems(self, device: Device) -> dict[str, list[Problem]]:
        """Lists of one length."""
        q, k, v = self.qkv(device, 1, self.D)
        tokens = min(self.tokens, self.L)
        lists = Lists(
            "", self.Hq, self.Hkv, 1, self.L, "", "pages", B=self.B, tokens=tokens,
            block=(1, self.page), device=device.kind,
        )  # fmt: skip
        indices = [lists.index(seed) for seed in range(self.LISTS)]
        name = f"{tokens} keys"
        return {name: [Problem(q, k, v, index, self.D**-0.5, 0.0, 0, None) for index in indices]}

    def work(self, problem: Problem, ms: float) -> Row:
        """Listed keys and values read."""
        assert problem.index is not None
        listed = problem.index.kv_starts.shape[3] * self.page
        size = 2 * self.B * self.Hkv * listed * self.D * DTYPE.itemsize
        return {"gb_per_s": size / ms / 1e6}

    def call(self, device: Device, run: Call) -> Call:
        """A CUDA graph: launches from Python take longer than the kernels."""
        return device.captured(run)


def cases() -> Iterator[Case]:
    """Every sweep, the weightiest first."""
    yield PrefillSweep()
    yield DecodeSweep()
    yield DecodeSweep(page=64)
    yield PrefillSweep(D=64)
    yield PrefillSweep(D=256)
    yield DecodeSweep(D=64)
    yield DecodeSweep(D=256)


def solve(group: list[Problem], target: Target, tiles: Tiles) -> Tensor:
    """Solves the problems with these tiles; the output of the last one."""
    for problem in group:
        launches, out, _ = plan(problem, target, tiles)
        backend.execute(launches, problem.q.device)
    return out


def compiled(
    config: Config, sizes: list[Tiles], capability: int, seconds: float
) -> dict[Tiles, Row]:
    """What the compiler says of each size, or why there is no kernel of it, as "failed".

    Args:
        config: of the kernel.
        sizes: its tiles.
        capability: of the device.
        seconds: after which what is not compiled is given up.
    """
    kernels = list(dict.fromkeys(map(_kernel, sizes)))
    workers = min(len(kernels), os.cpu_count() or 1)
    # Where the kernels of this process are interpreted, those of the others must not be.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    processes = []
    for first in range(workers):
        shapes = [asdict(tiles) for tiles in kernels[first::workers]]
        request = json.dumps([asdict(config), capability, shapes])
        command = [sys.executable, "-m", "bench.gpu_tune", request]
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        )
    reports: dict[Tiles, Row] = {}
    until = time.monotonic() + seconds
    for process in processes:
        try:
            lines, _ = process.communicate(timeout=max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            lines, _ = process.communicate()
        for line in lines.splitlines():
            shape, report = json.loads(line)
            reports[Tiles(**shape)] = report
    missing = {"failed": "not compiled in time"}
    return {tiles: reports.get(_kernel(tiles), missing) for tiles in sizes}


def _compile(config: Config, capability: int, tiles: Tiles) -> Row:
    """Compiles a kernel and what is launched with it; what `compiled` says of it."""
    try:
        report, *_ = [row(config, x, capability) for x in config.launches(capability, tiles)]
    except Exception as error:
        # The compiler raises what it likes at a tile that it cannot lay out.
        return {"failed": f"not compiled: {type(error).__name__}"}
    if int(report["shared"]) > int(report["limit"]):
        return {"failed": f"{report['shared']} bytes of shared memory"}
    return {key: report[key] for key in _REPORTED}


def _kernel(tiles: Tiles) -> Tiles:
    """Tiles that are compiled to the same kernel are the same here."""
    return replace(tiles, programs=1)


def _label(tiles: Tiles) -> str:
    """Rows x keys, warps, stages, programs."""
    size = f"{tiles.BLOCK_M}x{tiles.BLOCK_N}"
    return f"{size} w{tiles.num_warps} s{tiles.num_stages} p{tiles.programs}"


def _apart(out: Tensor, expected: Tensor) -> float:
    """The largest distance of two rows relative to the expected one's length; NaN with a NaN."""
    lengths = expected.float().norm(dim=-1).clamp(min=1e-6)
    return float(((out.float() - expected.float()).norm(dim=-1) / lengths).max())


def main(request: str) -> None:
    """Compiles what `compiled` asks for and writes a line for each kernel."""
    fields, capability, shapes = json.loads(request)
    for shape in shapes:
        report = _compile(Config(**fields), capability, Tiles(**shape))
        sys.stdout.write(json.dumps([shape, report]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
