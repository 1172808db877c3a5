"""Needles beyond the trained length: the retrieval checkpoint with a shorter one.

    lowcontext checkpoint demo/retrieval
    python -m bench.extension demo/retrieval --factors 64,1024

The slow pairs of the checkpoint, which hold content, turn less than 0.6 rad over its 131,072
positions. Turning them `factor` times as fast makes that bound hold over 131,072 / factor positions
only; beyond, content is compared at angles for which no weight was made.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import lowcontext
from bench.hierarchy import tokens
from lowcontext.eval import NeedleTask, make_sample

TRAINED, SLOW_TURN = 131_072, 0.6
# Every layer and every query sparse; lists of 1.2K, 0.5K and 0.6K keys, with sink and whole tiles.
HIERARCHY: dict[str, Any] = {"share": "layer", "dense_last": 0}
BUDGETS = ({"budget": 512, "window": 512}, {"budget": 256, "window": 128})
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    # A needle of this checkpoint is one key wide: hip with a stride of 4 scores it by chance.
    "hip": tuple(
        HIERARCHY | BUDGETS[0] | {"dense_layers": 0, "key_stride": stride} for stride in (4, 1)
    ),
    "infinitehip": tuple(HIERARCHY | budget | {"wide_layers": 0} for budget in BUDGETS),
    "tokenselect": ({"k": 256, "sink": 64, "local": 256},),
}
MOVED = {"hip": "streaming", "infinitehip": "streaming", "tokenselect": "compact"}
app = typer.Typer(add_completion=False)


@app.command()
def main(
    folder: Annotated[str, typer.Argument(help="The checkpoint.")],
    factors: Annotated[str, typer.Option(help="Comma-separated.")] = "64,1024",
    lengths: Annotated[str, typer.Option(help="Tokens of a prompt; k is 1024.")] = "8k",
    task: Annotated[str, typer.Option(help="single or multikey.")] = "single",
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(SETTINGS),
) -> None:
    """Prints the answers to five prompts, the needle at 0 to 100%, by dense and both positions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = methods.split(",")
    if not set(names) <= set(SETTINGS):
        raise typer.BadParameter(f"--methods: expected some of {list(SETTINGS)}, got {methods}")
    if not Path(folder).is_dir():
        raise typer.BadParameter(f"folder: expected a checkpoint, got {folder}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for factor in map(int, factors.split(",")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        inv_freq = model.model.rotary_emb.inv_freq
        inv_freq[inv_freq * TRAINED < SLOW_TURN] *= factor
        for length in map(tokens, lengths.split(",")):
            samples = [
                make_sample(tokenizer, NeedleTask(task), length=length, depth=depth, seed=0)
                for depth in (0, 25, 50, 75, 100)
            ]
            print(f"trained length {TRAINED // factor}, {task} prompts of {length}:")
            print(f"  dense: {''.join(answers(model, tokenizer, samples))}", flush=True)
            for name in names:
                for settings in SETTINGS[name]:
                    for positions in ("original", MOVED[name]):
                        with lowcontext.patched(model, name, positions=positions, **settings):
                            marks = "".join(answers(model, tokenizer, samples))
                        print(f"  {name}, {settings}, {positions}: {marks}", flush=True)


def answers(model: Any, tokenizer: Any, samples: list[Any]) -> Iterator[str]:
    """x for a right answer, . for a wrong one."""
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=16, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        yield "x" if sample.expected in text else "."


if __name__ == "__main__":
    app()
