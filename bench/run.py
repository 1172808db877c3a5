"""Runs benchmark suites: checks every case against the reference, then times it.

python -m bench.run --suite cpu-prefill --suite cpu-decode
python -m bench.run --suite gpu
python -m bench.run --suite gpu --dry-run      its code on the CPU, at sizes without meaning
TRITON_INTERPRET=1 python -m bench.run --suite tune --dry-run
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import lowcontext
from bench.cases import SUITES, Case, as_cached
from bench.dense import flex_call
from bench.device import Device
from bench.gpu_suite import SUITES as GPU_SUITES
from bench.gpu_suite import Run, suite_cases
from bench.timing import Times, environment, interleave, matmul_rate, read_bandwidth
from lowcontext import BlockIndex
from lowcontext.ops.triton import interpreted

console = Console()
app = typer.Typer(add_completion=False)

NAMES = [*SUITES, *GPU_SUITES]
Call = Callable[[], Tensor]
# Lists of a decode step are far smaller than the cache; so many different ones are used in turn
# that no list is still in a cache of this size when it comes up again.
LAST_LEVEL_CACHE = 2**28


@app.command()
def main(
    suite: Annotated[list[str], typer.Option(help=f"One of {', '.join(NAMES)}; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder of the JSONL file.")] = Path("bench/results"),
    only: Annotated[str, typer.Option(help="Run the cases whose name contains this.")] = "",
    rounds: Annotated[int, typer.Option(help="cpu: most rounds per case.")] = 30,
    seconds: Annotated[float, typer.Option(help="cpu: time budget per case.")] = 20.0,
    flex: Annotated[bool, typer.Option(help="cpu: time FlexAttention; it compiles first.")] = True,
    limit: Annotated[float, typer.Option(help="gpu: seconds; no case goes on longer.")] = 600.0,
    tests: Annotated[Path | None, typer.Option(help="gpu: file of bench.outcomes.")] = None,
    commit: Annotated[str | None, typer.Option(help="gpu: commit, where there is no git.")] = None,
    resume: Annotated[Path | None, typer.Option(help="gpu: JSONL file to go on with.")] = None,
    dry_run: Annotated[bool, typer.Option(help="gpu: run all code on the CPU, tiny.")] = False,
) -> None:
    """Checks each case against the reference, times it, prints a line and appends a JSONL row."""
    for name in suite:
        if name not in NAMES:
            raise typer.BadParameter(f"--suite: expected one of {NAMES}, got {name!r}")
        if name in GPU_SUITES and not dry_run and not torch.cuda.is_available():
            raise typer.BadParameter(f"--suite {name}: expected a CUDA device; try --dry-run")
        if name == "tune" and dry_run and not interpreted():
            raise typer.BadParameter("--suite tune: expected TRITON_INTERPRET=1 for --dry-run")
    out.mkdir(parents=True, exist_ok=True)
    green = True
    for name in suite:
        path = resume or out / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
        if name in GPU_SUITES:
            device = Device("cpu" if dry_run else "cuda")
            measured = Run(device, path, time.time() + limit, only, tests, commit, name)
            green &= measured.all(list(suite_cases(name)))
        else:
            cpu_suite(name, path, only, rounds, seconds, flex)
        console.print(f"wrote {path}")
    raise typer.Exit(not green)


def cpu_suite(name: str, path: Path, only: str, rounds: int, seconds: float, flex: bool) -> None:
    """Appends the rows of a CPU suite to a file."""
    where = environment()
    rate = matmul_rate() if name == "cpu-prefill" else None
    with path.open("a") as file:
        for case in SUITES[name]():
            if only in case.name:
                for row in run_case(case, rounds, seconds, flex, rate):
                    file.write(json.dumps({"suite": name, **row, **where}) + "\n")
                    file.flush()


@torch.inference_mode()
def run_case(
    case: Case, rounds: int, seconds: float, flex: bool, rate: float | None
) -> list[dict[str, Any]]:
    """Rows of one case: ours and every baseline, with ratios."""
    gc.collect()
    q, k, v = case.qkv()
    indices = _indices(case, k)
    error = check(case, q, k, v, indices[0])
    calls = _candidates(case, q, k, v, indices, flex)
    prefill = case.Lq > 1
    if not prefill:
        # As many bytes as the dense case reads, but not the same ones.
        calls["read"] = read_bandwidth(as_cached(torch.cat([k.flatten(), v.flatten()]).float()))
    times = interleave(calls, rounds=rounds, budget_s=seconds)
    density = 1.0 if indices[0] is None else indices[0].density(case.Lq, case.Lk)
    rows = []
    for name, t in times.items():
        if name != "read":
            rows.append(_row(case, name, t, times, density, error, rate))
            console.print(_line(rows[-1]), soft_wrap=True, highlight=False)
    return rows


def _indices(case: Case, k: Tensor) -> list[BlockIndex | None]:
    first = case.index()
    if first is None or case.Lq > 1:
        return [first]
    # Decode: see LAST_LEVEL_CACHE.
    listed = case.B * case.Hkv * case.tokens * case.D * 2 * k.element_size()
    return [case.index(seed) for seed in range(2 + LAST_LEVEL_CACHE // listed)]


def _candidates(
    case: Case, q: Tensor, k: Tensor, v: Tensor, indices: list[BlockIndex | None], flex: bool
) -> dict[str, Call]:
    G = case.Hq // case.Hkv
    turn = iter(range(10**9))

    def ours() -> Tensor:
        index = indices[next(turn) % len(indices)]
        if index is None:
            return lowcontext.attention(q, k, v)
        return lowcontext.sparse_attention(q, k, v, index)

    def repeated() -> Tensor:
        kk, vv = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)
        return sdpa(q, kk, vv, is_causal=case.Lq > 1)

    calls: dict[str, Call] = {"ours": ours}
    calls["sdpa"] = lambda: sdpa(q, k, v, is_causal=case.Lq > 1, enable_gqa=True)
    if case.Lq > 1:
        # Two ways to give SDPA grouped heads; the ratio is to the faster one.
        calls["sdpa-repeated"] = repeated
    if case.pattern != "dense":
        calls["ours-dense"] = lambda: lowcontext.attention(q, k, v)
    first = indices[0]
    if flex and case.Lq > 1 and first is not None:
        calls["flex"] = flex_call(q, k, v, first, case.D**-0.5)
    return calls


def check(case: Case, q: Tensor, k: Tensor, v: Tensor, index: BlockIndex | None) -> float:
    """Largest error of our output on the heads of the first KV head, against fp32 on the same data.

    Raises:
        RuntimeError: it exceeds twice the error of the reference rounded to the dtype, plus 1e-5.
    """
    G = case.Hq // case.Hkv
    if index is None:
        out = lowcontext.attention(q, k, v)
    else:
        out = lowcontext.sparse_attention(q, k, v, index)
    head = [x[:1, : G if x is q else 1].float() for x in (q, k, v)]
    if index is None:
        exact = lowcontext.attention(*head, backend="reference")
    else:
        heads = G if index.kv_starts.shape[1] == case.Hq else 1
        exact = lowcontext.sparse_attention(*head, _first_heads(index, heads), backend="reference")
    error = float((out[:1, :G].float() - exact).abs().max())
    rounding = float((exact.to(q.dtype).float() - exact).abs().max())
    if not error <= 2 * rounding + 1e-5:
        raise RuntimeError(f"{case.name}: error {error:.2e} against the reference; not timed")
    return error


def _first_heads(index: BlockIndex, heads: int) -> BlockIndex:
    columns = index.kv_columns, index.kv_num_columns
    return BlockIndex(
        index.kv_num_blocks[:1, :heads],
        index.kv_starts[:1, :heads],
        index.block_size,
        None if columns[1] is None else columns[1][:1, :heads],
        None if columns[0] is None else columns[0][:1, :heads],
    )


def _row(
    case: Case,
    name: str,
    t: Times,
    times: dict[str, Times],
    density: float,
    error: float,
    rate: float | None,
) -> dict[str, Any]:
    share = density if name in ("ours", "flex") else 1.0
    pairs = case.Lq * (case.Lk - case.Lq) + case.Lq * (case.Lq + 1) / 2
    flops = 4 * case.B * case.Hq * case.D * pairs * share
    element = torch.empty((), dtype=getattr(torch, case.dtype)).element_size()
    keys = case.Lk * share if case.Lq == 1 else case.Lk
    read = 2 * case.B * case.Hkv * keys * case.D * element
    row: dict[str, Any] = {
        "op": "attention" if case.pattern == "dense" else "sparse_attention",
        "case": case.name,
        "candidate": name,
        "shape": {k: v for k, v in asdict(case).items() if k not in ("name", "dtype")},
        "dtype": case.dtype,
        "density": share,
        "p20_ms": t.p20,
        "p50_ms": t.p50,
        "p80_ms": t.p80,
        "first_ms": t.first,
        "tflops": flops / t.p50 / 1e9,
        "gb_per_s": read / t.p50 / 1e6,
        "max_error": error if name == "ours" else None,
    }
    baseline = min(times[n].p50 for n in times if n.startswith("sdpa"))
    row["speedup_over_sdpa"] = baseline / t.p50
    row["efficiency"] = baseline / t.p50 * share if case.Lq > 1 else None
    for other in ("flex", "ours-dense"):
        if other in times and other != name:
            row[f"speedup_over_{other}"] = times[other].p50 / t.p50
    if "read" in times:
        size = 2 * case.B * case.Hkv * case.Lk * case.D * 4
        row["read_bandwidth_gb_per_s"] = size / times["read"].p50 / 1e6
        row["bandwidth_share"] = row["gb_per_s"] / row["read_bandwidth_gb_per_s"]
    if rate:
        row["matmul_share"] = row["tflops"] / rate
    return row


def _line(row: dict[str, Any]) -> str:
    text = f"{row['case']:38s} {row['candidate']:14s} {row['p50_ms']:10.2f} ms"
    text += f"  density {row['density']:.3f}  x{row['speedup_over_sdpa']:.2f} sdpa"
    if row["efficiency"] is not None and not math.isnan(row["efficiency"]):
        text += f"  efficiency {row['efficiency']:.2f}"
    if "bandwidth_share" in row:
        text += f"  {row['gb_per_s']:.1f} GB/s = {row['bandwidth_share']:.2f} of read bandwidth"
    return text


def rows_of(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All rows of JSONL files."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines() if line]


if __name__ == "__main__":
    app()
