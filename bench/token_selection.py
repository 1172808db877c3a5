"""What token selection keeps of attention, what it costs in decode, and what a prompt needs.

python -m bench.token_selection mass CHECKPOINT     attention mass against budget, by rule of choice
python -m bench.token_selection decode              time per step on 128K keys, against SDPA
python -m bench.token_selection memory              peak memory of a 64K prompt, whole and in chunks
python -m bench.token_selection tokens              share of greedy tokens equal to dense
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import lowcontext
from bench.selection_inputs import checkpoint, structured, uniform
from bench.selection_mass import (
    LOCAL,
    LOGIT_RULES,
    RULES,
    SINK,
    cache_rows,
    mass_rows,
    shared_rows,
)
from bench.timing import environment, interleave, read_bandwidth
from lowcontext import LayerContext
from lowcontext.methods.base import Moved, Rotary
from lowcontext.methods.tokenselect import TokenSelect
from lowcontext.ops.rotary import gather_moved

console = Console(width=160)
app = typer.Typer(add_completion=False)
Out = Annotated[Path, typer.Option(help="Folder of the JSONL file.")]
RESULTS = Path("bench/results")


@app.command()
@torch.inference_mode()
def mass(
    folder: Annotated[str, typer.Argument(help="A checkpoint; see `lowcontext checkpoint`.")],
    length: Annotated[int, typer.Option(help="Keys.")] = 32768,
    steps: Annotated[int, typer.Option(help="Decode steps.")] = 8,
    cache_steps: Annotated[int, typer.Option(help="Decode steps for the cache.")] = 48,
    out: Out = RESULTS,
) -> None:
    """Attention mass against budget, and against the threshold of the Selection Cache."""
    budgets = [b for b in (128, 256, 512, 1024, 2048, 4096, 8192, 16384) if b < length]
    longer = checkpoint(folder, length, cache_steps)
    inputs = [structured(length, cache_steps), uniform(length, steps), *longer]
    rows: list[dict[str, Any]] = []
    for each in inputs:
        few = replace(each, q=each.q[-steps:])
        found = mass_rows(few, budgets)
        rows += found
        table = Table(f"{each.name}", *(str(b) for b in budgets), box=MARKDOWN)
        for name in [*RULES, *LOGIT_RULES]:
            line = [r["mass"] for r in found if r["rule"] == name]
            table.add_row(name, *(f"{x:.4f}" for x in line))
        console.print(table)
    table = Table("cache, k = 2048", "cosine", "threshold", "hit rate", "mass", box=MARKDOWN)
    for each in [inputs[0], *longer]:
        for cosine in ("head", "layer"):
            found = cache_rows(each, 2048, cosine, (None, 1.0, 0.95, 0.9, 0.85, 0.8))
            rows += found
            for row in found:
                threshold = "off" if row["threshold"] is None else f"{row['threshold']:g}"
                figures = f"{row['hit_rate']:.3f}", f"{row['mass']:.4f}"
                table.add_row(each.name, cosine, threshold, *figures)
    console.print(table)
    few = [replace(each, q=each.q[-steps:]) for each in longer]
    table = Table("layers that select, k = 512", *(x.name for x in few), box=MARKDOWN)
    last = len(few) - 1
    for row in shared_rows(few, 512, (None, (0, last), (0,))):
        rows.append(row)
        table.add_row(row["rule"], *(f"{x:.4f}" for x in row["mass"]))
    console.print(table)
    _write(out, "mass", rows)


@app.command()
@torch.inference_mode()
def decode(
    heads: Annotated[str, typer.Option(help="Hq/Hkv.")] = "8/2",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    length: Annotated[int, typer.Option(help="Keys.")] = 131072,
    rounds: Annotated[int, typer.Option(help="Most rounds.")] = 8,
    seconds: Annotated[float, typer.Option(help="No round starts later.")] = 40.0,
    threads: Annotated[int, typer.Option(help="0: as torch has them.")] = 0,
    out: Out = RESULTS,
) -> None:
    """Time of one step, selection included, against SDPA and dense attention in the same run."""
    if threads:
        torch.set_num_threads(threads)
    Hq, Hkv = (int(x) for x in heads.split("/"))
    gen, kind, D = torch.Generator().manual_seed(0), getattr(torch, dtype), 128
    k, v = (torch.randn(1, Hkv, length, D, generator=gen).to(kind) for _ in "kv")
    # As many queries and lists in turn that none is still in a cache when its turn comes again.
    queries = [torch.randn(1, Hq, 1, D, generator=gen).to(kind) for _ in range(24)]
    options: dict[str, dict[str, Any]] = {
        "exact": {"cache_threshold": None, "scoring": "exact"},
        "int8": {"cache_threshold": None, "scoring": "int8"},
        "int4": {"cache_threshold": None, "scoring": "int4"},
        "pages": {"cache_threshold": None, "scoring": "pages"},
        "hit": {"cache_threshold": 0.9, "cache_steps": 10**6},
        "compact": {"positions": "compact"},
    }
    calls: dict[str, Callable[[], Tensor]] = {
        "sdpa": lambda: sdpa(queries[0], k, v, enable_gqa=True),
        "dense": lambda: lowcontext.attention(queries[0], k, v),  # type: ignore[dict-item,return-value]
        "read": read_bandwidth(torch.randn(2 * Hkv * length * D)),
    }
    for name, values in options.items():
        calls[name] = _stepper(TokenSelect(**values), queries, k, v)
    times = interleave(calls, rounds=rounds, budget_s=seconds)
    item = k.element_size()
    full, listed = Hkv * length * D * item, 2 * Hkv * (2048 + SINK + LOCAL) * D * item
    candidates = 8 * 2048 * Hkv * D * item
    sizes = {
        "sdpa": 2 * full,
        "dense": 2 * full,
        "exact": full + listed,
        "int8": Hkv * length * (D + 4) + listed,
        "int4": Hkv * length * (D // 2 + 4) + listed,
        "pages": 2 * full // 16 + candidates + listed,
        "hit": listed,
        # The listed keys and values are copied, and the copy read.
        "compact": 2 * full // 16 + candidates + 2 * listed,
    }
    bandwidth = 2 * Hkv * length * D * 4 / times["read"].p50 / 1e6
    table = Table(
        "step",
        "p20 ms",
        "p50 ms",
        "p80 ms",
        "x SDPA",
        "x dense",
        "MB read",
        "GB/s",
        "of bandwidth",
        box=MARKDOWN,
    )
    rows = []
    for name, size in sizes.items():
        t, rate = times[name], size / times[name].p50 / 1e6
        speed = {"x_sdpa": times["sdpa"].p50 / t.p50, "x_dense": times["dense"].p50 / t.p50}
        rows.append(
            {"case": f"decode-{heads}-{dtype}-{length}", "step": name, "p20_ms": t.p20}
            | {"p50_ms": t.p50, "p80_ms": t.p80, **speed, "bytes": size, "gb_per_s": rate}
            | {"read_bandwidth_gb_per_s": bandwidth}
        )
        figures = (t.p20, t.p50, t.p80, *speed.values(), size / 1e6, rate, rate / bandwidth)
        table.add_row(name, *(f"{x:.3g}" for x in figures))
    console.print(table)
    where = environment()
    console.print(
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, "
        f"commit {where['commit']}; a sum reads {bandwidth:.1f} GB/s"
    )
    _write(out, "decode", rows)


def _stepper(
    method: TokenSelect, queries: list[Tensor], k: Tensor, v: Tensor
) -> Callable[[], Tensor]:
    """A step with the next query; each has its own memory, and they share the state of the keys."""
    scale = float(k.shape[3]) ** -0.5
    pairs = k.shape[3] // 2
    rotary = Rotary(5e5 ** -(torch.arange(pairs) / pairs))
    state = LayerContext(scale=scale, rotary=rotary)
    contexts = []
    for q in queries:
        memory = {x: y for x, y in state.memory.items() if x != "kept"}
        layer = LayerContext(scale=scale, memory=memory, rotary=rotary)
        part = _selected(method, q, k, layer)
        out = _attended(part, q, k, v, "auto")
        if q is queries[0]:
            expected = _attended(part, q.float(), k.float(), v.float(), "reference")
            atol = 2e-2 if k.dtype != torch.float32 else 1e-4
            torch.testing.assert_close(out.float(), expected, atol=atol, rtol=2e-2)
        state.memory.update(layer.memory)
        contexts.append(layer)
    turn = 0

    def step() -> Tensor:
        nonlocal turn
        turn = (turn + 1) % len(queries)
        part = _selected(method, queries[turn], k, contexts[turn])
        return _attended(part, queries[turn], k, v, "auto")

    return step


def _selected(
    method: TokenSelect, q: Tensor, k: Tensor, layer: LayerContext
) -> lowcontext.BlockIndex | Moved:
    ((_, _, part),) = method.parts(q, k, layer)
    if part is None:
        raise ValueError(f"length: expected more keys than the budget, got {k.shape[2]}")
    return part


def _attended(
    part: lowcontext.BlockIndex | Moved, q: Tensor, k: Tensor, v: Tensor, backend: str
) -> Tensor:
    if not isinstance(part, Moved):
        return lowcontext.sparse_attention(q, k, v, part, backend=backend)  # type: ignore[return-value]
    f, interleaved = part.rotary.inv_freq, part.rotary.interleaved
    moved = gather_moved(k, v, part.keys, part.first, f, interleaved=interleaved, backend=backend)
    return lowcontext.attention(q, *moved, kv_start=part.first, backend=backend)  # type: ignore[return-value]


def _random_model(layers: int, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": layers}
    config = LlamaConfig(**{**sizes, **heads, "max_position_embeddings": 131072, **changes})
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


@app.command()
@torch.inference_mode()
def prompt(
    length: Annotated[int, typer.Option(help="Tokens.")] = 65536,
    chunk: Annotated[int, typer.Option(help="Tokens of a piece; 0: the whole prompt.")] = 0,
) -> None:
    """Runs one prompt through a random two-layer model and prints its memory; see `memory`."""
    model = lowcontext.patch_model(_random_model(2), "tokenselect")
    ids = torch.randint(0, 1024, (1, length), generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=1, do_sample=False, prefill_chunk_size=chunk or None)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    config = model.config
    size = 2 * config.num_key_value_heads * length * config.head_dim * 4 * config.num_hidden_layers
    row = {"length": length, "chunk": chunk, "peak_mib": peak - before, "seconds": seconds}
    console.print(json.dumps({**row, "kv_cache_mib": size / 2**20}), soft_wrap=True)


@app.command()
def memory(
    length: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 65536, out: Out = RESULTS
) -> None:
    """Peak memory above the loaded model of a prompt at once and in pieces, each in a process."""
    rows = []
    table = Table("prompt in pieces of", "peak MiB", "of it KV cache", "seconds", box=MARKDOWN)
    for chunk in (0, 8192, 2048, 512):
        command = [sys.executable, "-m", "bench.token_selection", "prompt"]
        command += ["--length", str(length), "--chunk", str(chunk)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.strip().splitlines()[-1])
        rows.append(row)
        figures = (f"{row[x]:.0f}" for x in ("peak_mib", "kv_cache_mib", "seconds"))
        table.add_row(str(chunk or "the whole"), *figures)
    console.print(table)
    _write(out, "memory", rows)


@app.command()
@torch.inference_mode()
def tokens(
    length: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 2048,
    new: Annotated[int, typer.Option(help="Tokens to generate.")] = 256,
    out: Out = RESULTS,
) -> None:
    """Greedy tokens of a random four-layer model that equal those of dense attention.

    Equal until the first that differs, and equal one by one when each step is given the dense run's
    tokens: after a first difference a free run is another text.
    """
    model = _random_model(4)
    ids = torch.randint(0, 1024, (1, length), generator=torch.Generator().manual_seed(0))
    dense = model.generate(ids, max_new_tokens=new, do_sample=False)
    table = Table("method", "equal until", "equal given the dense text", box=MARKDOWN)
    rows = []
    budgets: list[dict[str, Any]] = [{"k": length + new}, {"k": 1024}, {"k": 512}]
    budgets.append({"k": 128, "local": 128})
    choices = [b | {"positions": p} for b in budgets for p in ("original", "compact")]
    choices += [{"k": 1024, "select_layers": layers} for layers in ((0, 2), (0,))]
    for options in choices:
        method = TokenSelect(**options)
        with lowcontext.patched(model, method):
            free = model.generate(ids, max_new_tokens=new, do_sample=False)
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
            forced = []
            for token in dense[0, length:-1]:
                step = model(token.view(1, 1), past_key_values=cache)
                forced.append(int(step.logits[0, -1].argmax()))
        equal = (free == dense)[0, length:]
        until = int(equal.long().cumprod(0).sum())
        share = sum(a == int(b) for a, b in zip(forced, dense[0, length + 1 :], strict=True))
        rows.append({"method": str(method), "until": until, "share": share / len(forced)})
        table.add_row(str(method), f"{until} of {new}", f"{share / len(forced):.3f}")
    console.print(table)
    _write(out, "tokens", rows)


def _write(out: Path, name: str, rows: list[dict[str, Any]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    where = environment()
    with (out / f"token-selection-{name}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl").open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, **where}) + "\n")


if __name__ == "__main__":
    app()
