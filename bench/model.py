"""What the integration costs: appending to the cache, and a patched dense model's overhead.

python -m bench.model
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

import lowcontext
from bench.timing import environment, interleave
from lowcontext.integrations import SparseCacheLayer

console = Console()
app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of the JSONL file.")] = Path("bench/results"),
    rounds: Annotated[int, typer.Option(help="Rounds of the overhead measurement.")] = 200,
) -> None:
    """Prints cache append times and the overhead of a patched dense model; appends JSONL rows."""
    out.mkdir(parents=True, exist_ok=True)
    where = environment()
    with (out / f"model-{time.strftime('%Y%m%d-%H%M%S')}.jsonl").open("a") as file:
        for row in [*append_rows(), *overhead_rows(rounds)]:
            file.write(json.dumps({**row, **where}) + "\n")
            text = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float))
            console.print(f"{row['case']:34s} {text}", soft_wrap=True, highlight=False)


@torch.inference_mode()
def append_rows(length: int = 65536, heads: int = 8, D: int = 128) -> list[dict[str, Any]]:
    """Median time of one token's append behind `length` tokens, ours and transformers'."""
    rows = []
    for name, layer in (("ours", SparseCacheLayer()), ("DynamicLayer", DynamicLayer())):
        prompt = torch.randn(1, heads, length, D, dtype=torch.bfloat16)
        token = torch.randn(1, heads, 1, D, dtype=torch.bfloat16)
        layer.update(prompt, prompt)
        steps = 400 if name == "ours" else 8
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            layer.update(token, token)
            times.append((time.perf_counter() - start) * 1e3)
        ordered = torch.tensor(times, dtype=torch.float64)
        row = {"case": f"append-{length // 1024}k-{name}", "p50_ms": float(ordered.median())}
        rows.append({**row, "mean_ms": float(ordered.mean()), "max_ms": float(ordered.max())})
    return rows


@torch.inference_mode()
def overhead_rows(rounds: int, length: int = 128) -> list[dict[str, Any]]:
    """Time of a prefill and of a decode step at `length` tokens, patched dense over unpatched."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    plain = LlamaForCausalLM(config).eval()
    patched = LlamaForCausalLM(LlamaConfig.from_dict(config.to_dict())).eval()
    patched.load_state_dict(plain.state_dict())
    lowcontext.patch_model(patched, method="dense")
    ids = torch.randint(0, 1024, (1, length))
    rows = []
    for phase, make in (("prefill", _prefill), ("decode", _decode)):
        calls = {"patched": make(patched, ids), "unpatched": make(plain, ids)}
        times = interleave(calls, rounds=rounds, budget_s=60)
        ours, theirs = times["patched"], times["unpatched"]
        rows.append(
            {
                "case": f"overhead-{phase}-{length}",
                "patched_ms": ours.p50,
                "unpatched_ms": theirs.p50,
                "overhead_percent": 100 * (ours.p50 / theirs.p50 - 1),
                "overhead_p20_percent": 100 * (ours.p20 / theirs.p20 - 1),
            }
        )
    return rows


def _prefill(model: LlamaForCausalLM, ids: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)


def _decode(model: LlamaForCausalLM, ids: torch.Tensor) -> Callable[[], Any]:
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    length = ids.shape[1]

    def step() -> None:
        model(ids[:, -1:], past_key_values=cache)
        if cache.get_seq_length() > length + 16:
            cache.crop(length - cache.get_seq_length())

    return step


if __name__ == "__main__":
    app()
