"""Registers, spills and shared memory of the Triton kernels, compiled ahead of time without a GPU.

python -m bench.kernels_report [--all] [--arch 90] [--json]

`rows` are the loads of queries, keys and values, `loads` all loads from global memory: instructions
times the bytes that each thread gets. `ahead` are the copies in flight where a loop waits for one.

Exits with 1 if a kernel spills registers, needs more shared memory than its architecture has, or
has wgmma instructions that the assembler serializes.
Default: a handful of configurations in about a minute; `--all`: every tile size with every feature.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import score_kernels
from bench.score_kernels import AnyScoreConfig
from lowcontext import BlockIndex
from lowcontext.ops.triton.launch import Launch, Problem, Target, Tiles, plan
from lowcontext.ops.triton.resources import SHARED_LIMIT, Resources, compile_launch

app = typer.Typer(add_completion=False)
ARCHITECTURES = (80, 90, 100)
_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}


@dataclass(frozen=True)
class Config:
    """One kernel configuration: a problem on tensors without memory.

    Keys and values are the first part of a longer cache, and odd in number: what is known of
    strides and addresses is what a decode step knows.

    Args:
        phase: "prefill" (4096 queries) or "decode" (1 query), over 64K - 1 keys.
        dtype, D: of q, k, v.
        keys: "tiles" of 64, "blocks" of 128, "pages" of 16, "columns" (tiles and columns) or
            "dense".
        rows: queries per block in prefill; query heads per KV head in decode.
        extras: also softcap, kv_start, and for "dense" a window.
    """

    phase: str
    dtype: str
    D: int
    keys: str = "columns"
    rows: int = 128
    extras: bool = False

    @property
    def name(self) -> str:
        """Short label."""
        parts = [self.phase, self.dtype, f"D={self.D}", self.keys, f"rows={self.rows}"]
        return " ".join([*parts, "extras"] if self.extras else parts)

    def launches(self, capability: int, tiles: Tiles | None = None) -> list[Launch]:
        """The launches of this problem on a device with 132 multiprocessors.

        Args:
            capability: of the device.
            tiles: in place of those of the tables.
        """
        decode = self.phase == "decode"
        Hkv, Lk, dtype = 8, 65535, getattr(torch, self.dtype)
        Hq, Lq, block_q = (Hkv * self.rows, 1, 1) if decode else (4 * Hkv, 4096, self.rows)
        q = torch.empty((1, Hq, Lq, self.D), dtype=dtype, device="meta")
        cache = torch.empty((2, 1, Hkv, Lk + 1, self.D), dtype=dtype, device="meta")
        k, v = cache[:, :, :, :Lk]
        index = None
        if self.keys != "dense":
            _, Nq = BlockIndex.query_blocks(Lq, Lk, block_q)
            columns = self.keys == "columns"
            index = BlockIndex(
                _int32(1, Hkv, Nq),
                _int32(1, Hkv, Nq, 64),
                (block_q, {"pages": 16, "blocks": 128}.get(self.keys, 64)),
                _int32(1, Hkv, Nq) if columns else None,
                _int32(1, Hkv, Nq, 1024) if columns else None,
            )
        softcap, window, kv_start = 0.0, 0, None
        if self.extras:
            softcap, kv_start = 50.0, _int32(1)
            window = 4096 if index is None else 0
        problem = Problem(q, k, v, index, self.D**-0.5, softcap, window, kv_start)
        return plan(problem, Target(capability, 132), tiles)[0]


AnyConfig = Config | AnyScoreConfig

REPRESENTATIVE = (
    Config("prefill", "bfloat16", 64, keys="tiles"),
    Config("prefill", "bfloat16", 128),
    Config("prefill", "bfloat16", 256, keys="tiles"),
    Config("prefill", "float32", 128, keys="tiles"),
    Config("decode", "bfloat16", 64, keys="pages", rows=4),
    Config("decode", "bfloat16", 128, rows=4),
    *score_kernels.REPRESENTATIVE,
)


def everything() -> Iterator[AnyConfig]:
    """Every tile size of the tables, with the lists and features that change the code."""
    kinds = [("tiles", False), ("columns", True), ("pages", True), ("dense", True)]
    for keys, extras in kinds:
        for D in (64, 80, 128, 256):
            for rows in (16, 64, 128):
                yield Config("prefill", "bfloat16", D, keys, rows, extras)
            for rows in (1, 64):
                yield Config("decode", "bfloat16", D, keys, rows, extras)
        for D in (64, 128, 256):
            yield Config("prefill", "float32", D, keys, 64, extras)
            yield Config("decode", "float32", D, keys, 4, extras)
    yield from score_kernels.everything()


def row(config: AnyConfig, launch: Launch, capability: int) -> dict[str, str | int]:
    """Compiles one launch and describes it."""
    resources = compile_launch(launch, capability)
    sizes = (launch.args.get(size) for size in ("BLOCK_M", "BLOCK_N", "BLOCK_S"))
    return {
        "arch": f"sm_{capability}",
        "kernel": launch.kernel.__name__.removesuffix("_kernel"),
        "config": config.name,
        "tile": "x".join(str(size) for size in sizes if size is not None),
        "warps": launch.num_warps,
        "stages": launch.num_stages,
        "registers": resources.registers,
        "spilled": resources.spilled,
        "shared": resources.shared,
        "limit": SHARED_LIMIT[capability],
        "blocks": blocks_per_multiprocessor(resources, capability),
        "rows": _widths(resources.row_loads),
        "loads": _widths(resources.loads),
        "ahead": "" if resources.in_flight is None else resources.in_flight,
        "products": "+".join(name for name, op in _INSTRUCTIONS.items() if op in resources.ptx)
        + (" serialized" if resources.serialized else ""),
    }


def _widths(loads: Counter[int]) -> str:
    """Loads by their bytes per thread, the widest first: "24x16 4x4"."""
    return " ".join(f"{count}x{width}" for width, count in sorted(loads.items(), reverse=True))


def blocks_per_multiprocessor(resources: Resources, capability: int) -> int:
    """Blocks that fit by registers (65536) and shared memory (the limit plus 1 KB per block)."""
    registers = -(-resources.registers // 8) * 8 * 32 * resources.warps
    shared = (SHARED_LIMIT[capability] + 1024) // (resources.shared + 1024)
    return min(65536 // registers, shared)


def failed(line: dict[str, str | int]) -> bool:
    """Whether a kernel spills, does not fit, or has matrix products that wait for each other."""
    fits = int(line["spilled"]) == 0 and int(line["shared"]) <= int(line["limit"])
    return not fits or str(line["products"]).endswith("serialized")


@app.command()
def main(
    every: Annotated[bool, typer.Option("--all", help="Every configuration; minutes.")] = False,
    arch: Annotated[list[int], typer.Option(help="80, 86, 89, 90, 100, 120; repeatable.")] = list(  # noqa: B006
        ARCHITECTURES
    ),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
    only: Annotated[str, typer.Option(help="Configurations whose name contains this.")] = "",
) -> None:
    """Compiles the kernels and prints what each needs of a multiprocessor."""
    lines = []
    for capability in arch:
        if capability not in SHARED_LIMIT:
            raise typer.BadParameter(f"--arch: expected one of {list(SHARED_LIMIT)}")
        for config in everything() if every else REPRESENTATIVE:
            if only in config.name:
                for launch in config.launches(capability):
                    lines.append(row(config, launch, capability))
                    if as_json:
                        print(json.dumps(lines[-1]), flush=True)
    if not as_json:
        Console(width=150).print(_table(lines))
    raise typer.Exit(any(failed(line) for line in lines))


def _table(lines: list[dict[str, str | int]]) -> Table:
    table = Table(title="Triton kernels, ahead of time")
    for name in lines[0] if lines else ():
        table.add_column(name, justify="left" if isinstance(lines[0][name], str) else "right")
    for line in lines:
        style = "red" if failed(line) else None
        table.add_row(*(str(value) for value in line.values()), style=style)
    return table


def _int32(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")


if __name__ == "__main__":
    app()
