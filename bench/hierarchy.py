"""Times of hip and infinitehip on the CPU: search beside attend, and against torch's SDPA.

    python -m bench.hierarchy growth
    python -m bench.hierarchy prefill
    python -m bench.hierarchy decode

`growth` searches prompts of rising length, some chunks of each, and fits laws of their growth.
`prefill` and `decode` run what a patched model runs, search and attend, interleaved with SDPA on
the same tensors. Selected lists are checked by attending over them: the kernel against the
reference on the last block of queries.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import lowcontext
from bench.selection_study import loads
from bench.timing import environment, interleave
from lowcontext import BlockIndex, LayerContext, Method, get_method, sparse_attention
from lowcontext.methods._hierarchy import HierarchicalMethod
from lowcontext.ops.hierarchy import StageOptions, TreeOptions
from lowcontext.ops.native import prefer_huge_pages

app = typer.Typer(add_completion=False)
METHODS = ("hip", "infinitehip")
# A layer behind those with settings of their own.
LAYER = 99
Out = Annotated[Path, typer.Option(help="Folder of the JSONL file.")]
Heads = Annotated[str, typer.Option(help="Query and KV heads.")]
Lengths = Annotated[str, typer.Option(help="Comma-separated, k is 1024.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]


@app.command()
def growth(
    lengths: Lengths = "8k,16k,32k,64k,128k,256k,512k",
    heads: Heads = "4/1",
    dtype: Dtype = "float32",
    only: Annotated[str, typer.Option(help="One method.")] = "",
    out: Out = Path("bench/results"),
) -> None:
    """CPU time of one thread: search of a prompt; search and attend of its last blocks."""
    if only and only not in METHODS:
        raise typer.BadParameter(f"--only: expected one of {METHODS}, got {only}")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for T in map(tokens, lengths.split(",")):
        Hq, Hkv = map(int, heads.split("/"))
        gen = torch.Generator().manual_seed(0)
        k = torch.empty(1, Hkv, T, 128, dtype=getattr(torch, dtype))
        prefer_huge_pages(k)  # as the cache of a patched model
        k.normal_(generator=gen)
        # The same queries everywhere: the time of a search does not depend on them.
        q = torch.randn(1, Hq, Method.query_chunk, 128, generator=gen).to(k.dtype)
        for name in [only] if only else METHODS:
            method = get_method(name, dense_last=0)
            if not isinstance(method, HierarchicalMethod):
                raise TypeError(f"expected a method that searches, got {name}")
            prompt = searched(method, q, k)
            last = q[:, :, : min(q.shape[2], T // 8)]
            search, attend = (ms * 64 / last.shape[2] for ms in last_blocks(method, last, k))
            row = {"method": name, "length": T, "heads": heads, "dtype": dtype}
            row |= {"search_ms": prompt, "search_block_ms": search}
            row |= {"attend_block_ms": attend, "search_over_attend": search / attend}
            row |= {"scored_keys": scored_keys(method, T)}
            rows.append(row)
            print(
                f"{name:12s} {T:7d}  prompt: search {prompt:9.0f} ms, "
                f"{1e6 * prompt / (T * math.log2(T)):7.1f} ns / (T log2 T);  last block: "
                f"search {search:6.3f}, attend {attend:6.3f} ms, ratio {search / attend:.2f}",
                flush=True,
            )
    write(out, "growth", rows)
    for name in [only] if only else METHODS:
        laws([row for row in rows if row["method"] == name])
    # Up to 64K the default beam holds every tile: nothing is pruned, all are scored.
    laws([row for row in rows if row["method"] == "hip" and row["length"] >= 2**16])


# Chunks of a prompt that are searched, at most.
PLACES = 8


def searched(method: HierarchicalMethod, q: Tensor, k: Tensor) -> float:
    """CPU time in ms of searching a prompt in chunks of `q`, some of which run."""
    chunks = k.shape[2] // q.shape[2]
    places = min(chunks, PLACES)
    context = LayerContext(layer_idx=LAYER)
    times = []
    for i in range(places):
        end = (round((i + 0.5) * chunks / places - 0.5) + 1) * q.shape[2]
        began = time.process_time()
        method.prefill(q, k[:, :, :end], context)
        times.append((time.process_time() - began) * 1e3)
    return sum(times) / places * chunks


def scored_keys(method: HierarchicalMethod, T: int) -> float:
    """Keys that the search of the last block of T reads."""
    options = method._options(LAYER, method.block_q)
    if not isinstance(options, TreeOptions | StageOptions):
        raise TypeError(f"expected options of a search, got {options}")
    low, high = options.candidates(T - options.block_q)
    return loads(options, (high - low) * options.block_k)


def laws(rows: list[dict[str, Any]]) -> None:
    """Prints how well straight lines fit: time or scored keys of the last block, time of a prompt.

    R2 is that of the line; after each point, the line's value over the measured one.
    """
    T = [row["length"] for row in rows]
    log, product = [math.log2(t) for t in T], [t * math.log2(t) for t in T]
    block, keys = [row["search_block_ms"] for row in rows], [row["scored_keys"] for row in rows]
    prompt = [row["search_ms"] for row in rows]
    if len(rows) < 3:
        return
    print(f"{rows[0]['method']}, {min(T)} to {max(T)} tokens:")
    for what, y, laws in (
        ("time of a prompt", prompt, (("T log2 T", product), ("T^2", [t * t for t in T]))),
        ("time of the last block", block, (("log2 T", log), ("T", T), ("its scored keys", keys))),
        ("scored keys of the last block", keys, (("log2 T", log), ("T", T))),
    ):
        for law, x in laws:
            line, r2 = fit(x, y)
            ratios = " ".join(f"{a / b:.2f}" for a, b in zip(line, y, strict=True))
            print(f"  {what} = a + b {law}: R2 {r2:.3f}; {ratios}")


def fit(x: list[float], y: list[float]) -> tuple[list[float], float]:
    """Values of the straight line of least squares through the points, and its R2."""
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    a = a - a.mean()
    line = b.mean() + (a @ (b - b.mean())) / (a @ a) * a
    return line.tolist(), float(1 - ((b - line) ** 2).sum() / ((b - b.mean()) ** 2).sum())


def last_blocks(method: Method, q: Tensor, k: Tensor) -> tuple[float, float]:
    """CPU times in ms of search and of attend for the last queries, the best of three."""
    context = LayerContext(layer_idx=LAYER)
    index = method.prefill(q, k, context)
    search = cpu_time(lambda: method.prefill(q, k, context))
    if index is None:
        return search, cpu_time(lambda: lowcontext.attention(q, k, k))
    return search, cpu_time(lambda: sparse_attention(q, k, k, index))


def cpu_time(call: Callable[[], Any]) -> float:
    """Least CPU time of three calls, in ms."""
    times = []
    for _ in range(3):
        began = time.process_time()
        call()
        times.append((time.process_time() - began) * 1e3)
    return min(times)


@app.command()
def prefill(
    lengths: Lengths = "32k", heads: Heads = "8/2", dtype: Dtype = "float32",
    out: Out = Path("bench/results"),
) -> None:  # fmt: skip
    """A whole prompt through `Method.parts` and attend, against SDPA."""
    rows: list[dict[str, Any]] = []
    for T in map(tokens, lengths.split(",")):
        times = timed(prompt_calls(*qkv(T, T, heads, dtype)), rounds=3)
        rows += report("prefill", T, heads, dtype, times)
    write(out, "prefill", rows)


@app.command()
def decode(
    lengths: Lengths = "128k,512k", heads: Heads = "8/2", dtype: Dtype = "float32",
    refresh: Annotated[int, typer.Option(help="Steps for which a list is kept.")] = 8,
    out: Out = Path("bench/results"),
) -> None:  # fmt: skip
    """One token of a sequence, mean over as many steps as a list is kept, against SDPA."""
    rows: list[dict[str, Any]] = []
    for T in map(tokens, lengths.split(",")):
        calls = decode_calls(*qkv(refresh, T, heads, dtype))
        times = {name: ms / refresh for name, ms in timed(calls, rounds=7).items()}
        rows += report(f"decode, refresh {refresh}", T, heads, dtype, times)
    write(out, "decode", rows)


def prompt_calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Any]]:
    """A prompt, by each candidate."""
    calls: dict[str, Callable[[], Any]] = {}
    for name in METHODS:
        method = get_method(name, dense_layers=0)
        check(method, q, k, v)
        calls[name] = partial(run, method, q, k, v)
    calls["sdpa"] = partial(sdpa, q, k, v, is_causal=True, enable_gqa=True)
    calls["dense"] = partial(lowcontext.attention, q, k, v)
    return calls


def decode_calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Any]]:
    """As many decode steps as there are queries, by each candidate."""
    calls: dict[str, Callable[[], Any]] = {}
    for name in METHODS:
        method = get_method(name, dense_layers=0, refresh=q.shape[2])
        check(method, q[:, :, -1:], k, v)
        calls[name] = partial(steps, method, q, k, v)
    each = q.split(1, dim=2)
    calls["sdpa"] = lambda: [sdpa(row, k, v, enable_gqa=True) for row in each]
    calls["dense"] = lambda: [lowcontext.attention(row, k, v) for row in each]
    return calls


def run(method: Method, q: Tensor, k: Tensor, v: Tensor, layer: LayerContext | None = None) -> None:
    """What the integration does with one call of the attention function."""
    offset = k.shape[2] - q.shape[2]
    for row0, row1, index in method.parts(q, k, layer or LayerContext(layer_idx=LAYER)):
        end = offset + row1
        part = q[:, :, row0:row1], k[:, :, :end], v[:, :, :end]
        if isinstance(index, BlockIndex):
            sparse_attention(*part, index)
        else:
            lowcontext.attention(*part)


def steps(method: Method, q: Tensor, k: Tensor, v: Tensor) -> None:
    """As many decode steps as there are queries: one search, then the list that it left."""
    layer = LayerContext(layer_idx=LAYER)
    Lq, Lk = q.shape[2], k.shape[2]
    for r in range(Lq):
        end = Lk - Lq + r + 1
        run(method, q[:, :, r : r + 1], k[:, :, :end], v[:, :, :end], layer)


def check(method: Method, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless attend over the list of the last queries equals the reference."""
    q = q[:, :, -64:]
    phase = method.decode if q.shape[2] == 1 else method.prefill
    index = phase(q, k, LayerContext(layer_idx=LAYER))
    if index is None:
        return  # dense: nothing was selected
    ours, exact = (
        torch.as_tensor(sparse_attention(q, k, v, index, backend=backend)).float()
        for backend in ("auto", "reference")
    )
    error = float((ours - exact).abs().max())
    if not error <= (1e-5 if q.dtype == torch.float32 else 1e-2):
        raise RuntimeError(f"{method}: error {error:.2e} against the reference; not timed")


def qkv(Lq: int, Lk: int, heads: str, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v."""
    Hq, Hkv = map(int, heads.split("/"))
    gen = torch.Generator().manual_seed(0)
    shapes = [(Hq, Lq), (Hkv, Lk), (Hkv, Lk)]
    q, k, v = (torch.randn(1, h, n, 128, generator=gen) for h, n in shapes)
    return q.to(getattr(torch, dtype)), k.to(getattr(torch, dtype)), v.to(getattr(torch, dtype))


def timed(calls: dict[str, Callable[[], Any]], rounds: int = 5) -> dict[str, float]:
    """Medians in ms, candidates in turn."""
    with torch.inference_mode():
        times = interleave(calls, rounds=rounds, budget_s=60.0)
    return {name: t.p50 for name, t in times.items()}


def report(
    phase: str, T: int, heads: str, dtype: str, times: dict[str, float]
) -> list[dict[str, Any]]:
    """Rows, and a printed line, for each candidate."""
    rows = []
    for name, ms in times.items():
        ratio = times["sdpa"] / ms
        rows.append({"phase": phase, "length": T, "heads": heads, "dtype": dtype})
        rows[-1] |= {"candidate": name, "p50_ms": ms, "speedup_over_sdpa": ratio}
        print(f"{phase}, {T} keys, {heads}, {dtype}: {name:12s} {ms:10.2f} ms  x{ratio:.2f} SDPA")
    return rows


def tokens(text: str) -> int:
    """4096 or 4k."""
    return int(text.removesuffix("k")) * (1024 if text.endswith("k") else 1)


def write(out: Path, what: str, rows: list[dict[str, Any]]) -> None:
    """Appends the rows with what they were measured on."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"hierarchy-{what}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    where = environment()
    lines = [json.dumps({"suite": f"hierarchy-{what}", **row, **where}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    app()
