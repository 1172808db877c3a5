"""Measures the retrieval checkpoint: the table of docs/retrieval-checkpoint.md.

Every prompt is run once with its answer appended. The answer counts if each of its three tokens,
and the end after it, is the argmax at its place: just then greedy decoding gives it. The margin is
the least distance to the second logit over those four places; CPU s is the median of one pass, in
seconds of one core.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from lowcontext.eval import NeedleTask, make_sample, write_retrieval_checkpoint

ROWS = 512


def chunked_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention to the keys that ``module.config.measured`` chooses, a few rows at a time."""
    name, *numbers = module.config.measured
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = torch.empty_like(q)
    columns = torch.arange(k.shape[2], device=k.device)
    for start in range(0, q.shape[2], ROWS):
        rows = torch.arange(start, min(start + ROWS, q.shape[2]), device=k.device)[:, None]
        logits = scaling * q[:, :, rows[:, 0]] @ k.transpose(2, 3)
        logits.masked_fill_(columns > rows, -math.inf)
        if name == "window":
            sink, recent = numbers
            logits.masked_fill_((columns >= sink) & (rows - columns >= recent), -math.inf)
        elif name == "top":
            least = logits.topk(min(numbers[0], logits.shape[-1]), dim=-1).values[..., -1:]
            logits.masked_fill_(logits < least, -math.inf)
        out[:, :, rows[:, 0]] = logits.softmax(-1) @ v
    return out.transpose(1, 2).contiguous(), None


def measure(model: Any, tokenizer: Any, task: NeedleTask, length: int, samples: int) -> str:
    """Returns the figures of one line of the table."""
    depths = (0, 25, 50, 75, 100)
    right, margins, seconds, missed = 0, [], [], []
    cases = [(depth, seed) for depth in depths for seed in range(samples)]
    for depth, seed in cases:
        sample = make_sample(tokenizer, task, length=length, depth=depth, seed=seed)
        answer = tokenizer(sample.expected, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*sample.input_ids, *answer]], device=model.device)
        begin = time.process_time()
        with torch.no_grad():
            logits = model(ids, logits_to_keep=len(answer) + 1).logits[0].float().cpu()
        seconds.append(time.process_time() - begin)
        expected = torch.tensor([*answer, tokenizer.eos_token_id])
        best = logits.topk(2, dim=-1)
        if torch.equal(best.indices[:, 0], expected):
            right += 1
            margins.append(float((best.values[:, 0] - best.values[:, 1]).min()))
        else:
            missed.append(depth)
    middle = sorted(seconds)[len(seconds) // 2]
    least = f"{min(margins):.1f}" if margins else ""
    where = ", ".join(f"{depth}%" for depth in sorted(set(missed)))
    return f"{right}/{len(cases)} | {least} | {where} | {middle:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--samples", type=int, default=4, help="per depth, of which there are 5")
    parser.add_argument("--tasks", nargs="+", default=["single", "multikey"])
    parser.add_argument("--haystacks", nargs="+", default=["words", "noise"])
    parser.add_argument("--attention", nargs="+", default=["dense", "window", "top"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the checkpoint")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    AttentionInterface.register("measured", chunked_attention)
    chosen = {"dense": None, "window": ("window", 4, 512), "top": ("top", 64)}
    with tempfile.TemporaryDirectory() as folder:
        path = write_retrieval_checkpoint(folder, seed=options.seed)
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, options.dtype))
    model.to(options.device).eval()
    sys.stdout.write("| length | task | haystack | attention | right | margin | missed | CPU s |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|---|\n")
    for length in options.lengths:
        for task in options.tasks:
            for haystack in options.haystacks:
                for attention in options.attention:
                    model.config.measured = chosen[attention]
                    name = "measured" if chosen[attention] else "sdpa"
                    model.set_attn_implementation(name)
                    figures = measure(
                        model, tokenizer, NeedleTask(task, haystack), length, options.samples
                    )
                    line = f"| {length} | {task} | {haystack} | {attention} | {figures} |\n"
                    sys.stdout.write(line)
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
