"""Prefill methods end to end: score + select beside attend, against dense attention.

python -m bench.prefill_methods --lengths 16k,32k -m minference

Queries and keys have the structure of `bench.structured` (8 query and 2 KV heads, D = 128).
FlexAttention runs on the same lists; where those have columns or unaligned tiles, on the smallest
index of aligned tiles that covers them, the only form it has.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import lowcontext
from bench.dense import flex_call
from bench.structured import structured
from bench.timing import environment, interleave
from lowcontext import BlockIndex, LayerContext, Method
from lowcontext import _cli_parse as parse

console = Console()
app = typer.Typer(add_completion=False)
Parts = list[tuple[int, int, BlockIndex | None]]


@app.command()
def main(
    method: Annotated[list[str], typer.Option("--method", "-m", help="NAME:key=value,...")],
    lengths: Annotated[str, typer.Option(help="Comma-separated, in tokens.")] = "16k",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Rounds per length.")] = 3,
    flex: Annotated[bool, typer.Option(help="Time FlexAttention too (it compiles first).")] = True,
    dense: Annotated[bool, typer.Option(help="Time the dense baselines too.")] = True,
    cpu_time: Annotated[
        bool, typer.Option(help="One thread, CPU time: for machines with other work.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the JSONL file.")] = Path("bench/results"),
) -> None:
    """Checks each method's output, times it, prints a line and appends a JSONL row."""
    try:
        chosen, sizes = [parse.method(m) for m in method], parse.lengths(lengths)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"prefill-methods-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    if cpu_time:
        torch.set_num_threads(1)
    where = environment()
    with path.open("a") as file:
        for N in sizes:
            for row in run_length(N, dtype, chosen, rounds, flex, dense, cpu_time):
                row["cpu_time"] = cpu_time
                file.write(json.dumps({"suite": "prefill-methods", **row, **where}) + "\n")
                file.flush()
    console.print(f"wrote {path}")


@torch.inference_mode()
def run_length(
    N: int,
    dtype: str,
    methods: list[Method],
    rounds: int,
    flex: bool,
    dense: bool,
    cpu_time: bool,
) -> list[dict[str, Any]]:
    """Rows of one length: select, attend and the whole of each method, and the baselines."""
    q, k = (x.to(getattr(torch, dtype)) for x in structured(N))
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(1)).to(k.dtype)
    layer = LayerContext(scale=1.0)
    calls: dict[str, Any] = {}
    density: dict[str, float] = {}
    if dense:
        calls["sdpa"] = lambda: sdpa(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
        calls["ours-dense"] = lambda: lowcontext.attention(q, k, v, scale=1.0)
        if not passes(f"dense {N}", calls["ours-dense"](), [(0, N, None)], q, k, v):
            del calls["ours-dense"]
    for m in methods:
        parts: Parts = list(m.parts(q, k, layer))
        name = str(m)
        density[name] = mean_density(parts, N)
        if not passes(f"{name} {N}", attend(parts, q, k, v), parts, q, k, v):
            continue
        calls[f"{name} select"] = lambda m=m: list(m.parts(q, k, layer))
        calls[f"{name} attend"] = lambda parts=parts: attend(parts, q, k, v)
        calls[f"{name} total"] = lambda m=m: attend(list(m.parts(q, k, layer)), q, k, v)
        if flex:
            index = aligned(parts, N)
            density[f"{name} flex"] = index.density(N, N)
            calls[f"{name} flex"] = flex_call(q, k, v, index, 1.0)
    if cpu_time:
        times = cpu_times(calls, rounds)
    else:
        times = {
            name: (t.p20, t.p50, t.p80)
            for name, t in interleave(calls, rounds=rounds, budget_s=600.0).items()
        }
    rows = []
    for name, t in times.items():
        label, _, kind = name.rpartition(" ")
        row: dict[str, Any] = {
            "N": N,
            "dtype": dtype,
            "candidate": name,
            "p20_ms": t[0],
            "p50_ms": t[1],
            "p80_ms": t[2],
        }
        share = density.get(name if kind == "flex" else label)
        if share is not None:
            row["density"] = share
        if dense:
            row["speedup_over_sdpa"] = times["sdpa"][1] / t[1]
        if "ours-dense" in times:
            row["speedup_over_ours_dense"] = times["ours-dense"][1] / t[1]
        if kind == "select":
            row["share_of_total"] = t[1] / times[f"{label} total"][1]
        rows.append(row)
        text = f"{N:6d} {name:32s} {t[1]:10.1f} ms"
        text += f"  density {share:.3f}" if share is not None else ""
        if dense:
            text += f"  x{row['speedup_over_sdpa']:.2f} sdpa"
        if "ours-dense" in times:
            text += f"  x{row['speedup_over_ours_dense']:.2f} dense"
        if kind == "select":
            text += f"  {row['share_of_total']:.1%} of the total"
        if kind == "total" and dense and share:
            text += f"  {row['speedup_over_sdpa'] * share:.2f} of 1 / density over sdpa"
        console.print(text, soft_wrap=True, highlight=False)
    return rows


def cpu_times(calls: dict[str, Any], rounds: int) -> dict[str, tuple[float, float, float]]:
    """20th, 50th and 80th percentile of each call's CPU time in ms, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if done:
                times[name].append((time.process_time() - start) * 1e3)
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    found = {}
    for name, each in times.items():
        low, middle, high = torch.tensor(each, dtype=torch.float64).quantile(shares).tolist()
        found[name] = low, middle, high
    return found


def attend(parts: Parts, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over the parts of a prompt without a cache."""
    out = torch.empty_like(q)
    for row, end, index in parts:
        args = q[:, :, row:end], k[:, :, :end], v[:, :, :end]
        if index is None:
            out[:, :, row:end] = lowcontext.attention(*args, scale=1.0)
        else:
            out[:, :, row:end] = lowcontext.sparse_attention(*args, index, scale=1.0)
    return out


def mean_density(parts: Parts, N: int) -> float:
    """Share of the causal pairs that the parts read."""
    pairs = 0.0
    for row, end, index in parts:
        causal = (end - row) * row + (end - row) * (end - row + 1) / 2
        pairs += causal * (1.0 if index is None else index.density(end - row, end))
    return pairs / (N * (N + 1) / 2)


def passes(name: str, out: Tensor, parts: Parts, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether rows of `out` are as near to fp64 attention over the keys listed for them as plain
    fp32 attention is, within a factor of 2 and 1e-5; says so where not: it is then not timed.

    One block of queries in sixteen is checked, for every head.
    """
    G = q.shape[1] // k.shape[1]
    worst = plain_worst = 0.0
    for row, end, index in parts:
        block = 64 if index is None else index.block_q
        for at in range(row, end, 16 * block):
            stop = min(at + block, end)
            rows = torch.arange(at, stop)
            visible = torch.arange(stop) <= rows[:, None]
            mask = visible.expand(q.shape[1], -1, -1)
            if index is not None:
                n = (at - row) // block
                listed = index.key_mask(stop, slice(n, n + 1))[0]
                mask = (listed & visible).expand(q.shape[1], -1, -1)
            for h in range(q.shape[1]):
                args = q[0, h, at:stop], k[0, h // G, :stop], v[0, h // G, :stop], mask[h]
                exact = plain_attention(*args, torch.float64)
                plain = plain_attention(*args, torch.float32).to(q.dtype)
                worst = max(worst, float((out[0, h, at:stop].double() - exact).abs().max()))
                plain_worst = max(plain_worst, float((plain.double() - exact).abs().max()))
    if worst <= 2 * plain_worst + 1e-5:
        return True
    console.print(
        f"{name}: error {worst:.2e} against fp64, plain fp32 has {plain_worst:.2e}; not timed",
        highlight=False,
    )
    return False


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention of one head over a mask, computed in `dtype`."""
    logits = q.to(dtype) @ k.to(dtype).T
    return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v.to(dtype)


def aligned(parts: Parts, N: int, block: int = 128) -> BlockIndex:
    """The smallest index of aligned tiles that covers the parts."""
    keeps = []
    blocks = -(-N // block)
    for row, end, index in parts:
        rows = range(row // block, -(-end // block))
        if index is None:
            keep = torch.ones(1, 1, len(rows), blocks, dtype=torch.bool)
        else:
            ratio = block // index.block_q
            lists = []
            for n in range(index.kv_starts.shape[2]):
                keys = torch.nn.functional.pad(
                    index.key_mask(N, slice(n, n + 1)), (0, blocks * block - N)
                )
                lists.append(keys.unflatten(-1, (blocks, block)).any(-1))
            keep = torch.cat(lists, dim=2)
            keep = torch.nn.functional.pad(keep, (0, 0, 0, -keep.shape[2] % ratio))
            keep = keep.unflatten(2, (-1, ratio)).any(3)
        keeps.append(keep)
    heads = max(keep.shape[1] for keep in keeps)
    keep = torch.cat([keep.expand(-1, heads, -1, -1) for keep in keeps], dim=2)
    causal = torch.arange(blocks) <= torch.arange(blocks)[:, None]
    return BlockIndex.from_blocks(keep & causal, (block, block))


if __name__ == "__main__":
    app()
