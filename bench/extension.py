"""Needles beyond the trained length: the retrieval checkpoint with a shorter one.

    lowcontext checkpoint demo/retrieval
    python -m bench.extension demo/retrieval --factors 64,1024

The slow pairs of the checkpoint, which hold content, turn less than 0.6 rad over its 131,072
positions. Turning them `factor` times as fast makes that bound hold over 131,072 / factor positions
only; beyond, content is compared at angles for which no weight was made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer

import lowcontext
from bench.hierarchy import tokens
from lowcontext.eval import NeedleTask, make_sample

TRAINED, SLOW_TURN = 131_072, 0.6
# Lists of 1.2K and of 0.5K keys, with sink and whole tiles.
SETTINGS = (
    {"budget": 512, "window": 512},
    {"budget": 256, "window": 128},
)


def main(
    folder: Annotated[str, typer.Argument(help="The checkpoint.")],
    factors: Annotated[str, typer.Option(help="Comma-separated.")] = "64,1024",
    length: Annotated[str, typer.Option(help="Tokens of a prompt, k is 1024.")] = "8k",
) -> None:
    """Prints the answers to five prompts, the needle at 0 to 100%, by dense and both positions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples = [
        make_sample(tokenizer, NeedleTask("single"), length=tokens(length), depth=depth, seed=0)
        for depth in (0, 25, 50, 75, 100)
    ]
    for factor in map(int, factors.split(",")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        inv_freq = model.model.rotary_emb.inv_freq
        inv_freq[inv_freq * TRAINED < SLOW_TURN] *= factor
        print(f"trained length {TRAINED // factor}, prompts of {tokens(length)}:")
        print(f"  dense: {''.join(answers(model, tokenizer, samples))}", flush=True)
        for settings in SETTINGS:
            for positions in ("original", "streaming"):
                options = {"share": "layer", "wide_layers": 0, "dense_last": 0, **settings}
                with lowcontext.patched(model, "infinitehip", positions=positions, **options):
                    marks = "".join(answers(model, tokenizer, samples))
                print(f"  infinitehip, {settings}, {positions}: {marks}", flush=True)


def answers(model: Any, tokenizer: Any, samples: list[Any]) -> Iterator[str]:
    """x for a right answer, . for a wrong one."""
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=16, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        yield "x" if sample.expected in text else "."


if __name__ == "__main__":
    typer.run(main)
