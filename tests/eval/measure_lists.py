"""What heads lose by the lists of `hip` in decode: the figures of docs/evaluation.md.

Each prompt is run once, dense, with the answer that dense attention gives. At every token of the
answer, in every layer, the method selects for the dense queries and keys. A line is written for a
head that has most of its softmax mass on one key and does not read it: how far down the key's tile
stands among all tiles between sink and window by the head's own logits, and by the largest of all
heads of its KV head, and the head that has most of those largest, with its largest logit and the
number of tiles where it has them.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowcontext import _cli_parse as parse
from lowcontext.eval.ruler import Sources
from lowcontext.eval.ruler.tasks import TASKS, make_ruler_sample
from lowcontext.integrations._probe import probe
from lowcontext.ops import attention, sparse_attention


@dataclass(frozen=True)
class Decoding:
    """The answer of a prompt, token by token: tokens in all, of the prompt, and as texts."""

    ids: list[int]
    prompt: int
    words: list[str]


def decoding(model: Any, tokenizer: Any, task: str, length: int, seed: int) -> Decoding:
    sample = make_ruler_sample(tokenizer, task, length=length, seed=seed, sources=Sources())
    given = torch.tensor([sample.input_ids])
    found = model.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False,
        max_new_tokens=TASKS[task].answer_room, pad_token_id=tokenizer.eos_token_id,
    )[0].tolist()  # fmt: skip
    return Decoding(found, given.shape[1], [tokenizer.decode([i]) for i in found])


def losses(model: Any, answer: Decoding, method: Any) -> list[str]:
    """A line of the table for every head and step that loses its key."""
    lines = []
    shared: dict[int, dict[str, Any]] = {}

    def look(q: Tensor, k: Tensor, v: Tensor, at: Any, _window: int) -> None:
        at.memory = {}
        group = q.shape[1] // k.shape[1]
        for end in range(answer.prompt + 1, len(answer.ids)):
            at.shared = shared.setdefault(end, {})
            part = q[:, :, end - 1 : end], k[:, :, :end], v[:, :, :end]
            ((_, _, index),) = method.parts(part[0], part[1], at)
            if index is None:
                continue
            dense = attention(*part, scale=at.scale, return_lse=True)[1]
            own = sparse_attention(*part, index, scale=at.scale, return_lse=True)[1]
            mass = (own - dense).exp()[0, :, 0]
            keys = part[1][0].repeat_interleave(group, dim=0)
            logits = (part[0][0] * at.scale * keys).sum(2)  # [Hq, end]
            top, place = (logits - dense[0]).exp().max(1)
            low, high = method.sink, (end - method.window) // method.block_k * method.block_k
            best = logits[:, low:high].unflatten(1, (-1, method.block_k)).amax(2)  # [Hq, tiles]
            for head in range(q.shape[1]):
                if top[head] < 0.5 or mass[head] > 0.5 or not low <= place[head] < high:
                    continue
                tile = (int(place[head]) - low) // method.block_k
                first = head // group * group
                heads = list(range(first, first + group))
                largest, of = best[heads].max(0)
                loudest = heads[int(of.mode().values)]
                wins = int((of == of.mode().values).sum())
                cells = (
                    end - answer.prompt, repr(answer.words[end]), at.layer_idx, head,
                    f"{mass[head]:.2f}", f"{logits[head, place[head]]:.0f}",
                    rank(best[head], tile), rank(largest, tile),
                    f"{loudest}: {best[loudest].max():.0f}, in {wins} of {len(largest)}",
                )  # fmt: skip
                lines.append(" | ".join(map(str, cells)))

    probe(model, torch.tensor([answer.ids]), look)
    return lines


def rank(scores: Tensor, place: int) -> int:
    return int((scores > scores[place]).sum()) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder")
    parser.add_argument("--method", nargs="+", required=True, help="hip:KEY=VALUE,...")
    parser.add_argument("--task", default="niah_multivalue")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102, 103])
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    names = "step | next | layer | head | mass | logit | own | group | loudest"
    for seed in options.seeds:
        answer = decoding(model, tokenizer, options.task, options.length, seed)
        for spec in options.method:
            method = parse.method(spec)
            sys.stdout.write(f"seed {seed}, {method}\n{names}\n")
            sys.stdout.writelines(f"{line}\n" for line in losses(model, answer, method))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
