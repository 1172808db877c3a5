"""Queries and keys on which selections are compared: made with structure, or of a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import lowcontext
from lowcontext import LayerContext, Method
from lowcontext.methods.base import Part
from lowcontext.ops.rotary import rotate_to


@dataclass(frozen=True)
class Steps:
    """Consecutive decode steps of one layer.

    Args:
        name: where they come from.
        q: fp32 [T, Hq, D]; the query of step t is token `Lk - T + t`.
        k: fp32 [Hkv, Lk, D].
        scale: factor of the logits.
    """

    name: str
    q: Tensor
    k: Tensor
    scale: float


def structured(Lk: int, T: int, Hq: int = 8, Hkv: int = 2, D: int = 128, seed: int = 0) -> Steps:
    """Keys and queries with what trained models are known for, and nothing tuned to a method.

    Topics: stretches of 16 to 512 tokens share a direction. Outlier channels: four channels of each
    key head with a large mean. A sink: the first keys score high for every query. RoPE with theta
    500,000. Each query head looks for the topic of a few past stretches, for some single tokens and
    for recent ones, with a sharpness of its own; from step to step it turns slowly, and now and
    then looks for something else.
    """
    gen = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    lengths: list[int] = []
    while sum(lengths) < Lk:
        lengths.append(int(2 ** rng.uniform(4, 9)))
    topic = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[:Lk]
    topics = noise(Hkv, len(lengths), D)
    k = 0.7 * topics[:, topic] + 0.7 * noise(Hkv, Lk, D)
    outliers = torch.randperm(D, generator=gen)[:4]
    k[:, :, outliers] += 6.0
    q = torch.empty(T, Hq, D)
    sharpness = torch.linspace(0.4, 1.6, Hq)
    for h in range(Hq):
        kv = h // (Hq // Hkv)
        wanted = torch.zeros(D)
        for t in range(T):
            if t == 0 or rng.random() < 0.05:
                tokens = torch.randint(0, Lk - T, (8,), generator=gen)
                wanted = topics[kv, topic[tokens[:4]]].mean(0) + 0.5 * k[kv, tokens[4:]].mean(0)
            q[t, h] = sharpness[h] * (wanted + 0.25 * noise(D)) + 0.2 * k[kv, Lk - T + t - 1]
    k[:, :4] += 2.0 * q.mean(0).unflatten(0, (Hkv, -1)).mean(1, keepdim=True)
    inv_freq = 500_000.0 ** -(torch.arange(D // 2) * 2 / D)
    zero = torch.zeros((), dtype=torch.int64)
    positions = torch.arange(Lk)
    k = rotate_to(k, zero, positions, inv_freq)
    q = rotate_to(q, zero, positions[Lk - T :, None], inv_freq)
    return Steps("structured", q, k, D**-0.5)


def uniform(Lk: int, T: int, Hq: int = 8, Hkv: int = 2, D: int = 128, seed: int = 0) -> Steps:
    """Independent normal queries and keys: no structure that a page or a cache could use."""
    gen = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(T, Hq, D, generator=gen)
    return Steps("random", q, torch.randn(Hkv, Lk, D, generator=gen), D**-0.5)


@dataclass(frozen=True)
class _Recorder(Method):
    """Dense attention that keeps the queries of decode steps and the keys, by layer."""

    name: ClassVar[str] = "recorder"

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> None:
        """None: dense."""

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> None:
        """None: dense, after taking what it was given."""
        layer.memory.setdefault("queries", []).append(q[0, :, -1].float())
        layer.memory["keys"], layer.memory["scale"] = k[0].float(), layer.scale

    def parts(self, q: Tensor, k: Tensor, layer: LayerContext) -> Iterator[Part]:
        """One dense part."""
        if q.shape[2] < k.shape[2]:
            self.decode(q, k, layer)
        yield 0, q.shape[2], None


@torch.inference_mode()
def checkpoint(folder: str, Lk: int, T: int, depth: float = 0.4, seed: int = 0) -> list[Steps]:
    """The layers of a checkpoint on a needle prompt, whose last T tokens are decoded one by one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    from lowcontext.eval import NeedleTask, make_sample

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = NeedleTask("multikey")
    sample = make_sample(tokenizer, task, length=Lk, depth=100 * depth, seed=seed)
    ids = torch.tensor([sample.input_ids])
    cache = DynamicCache(config=model.config)
    with lowcontext.patched(model, _Recorder()):
        model(ids[:, :-T], past_key_values=cache, use_cache=True, logits_to_keep=1)
        for t in range(T):
            step = ids[:, ids.shape[1] - T + t :][:, :1]
            model(step, past_key_values=cache, use_cache=True)
    found = []
    for i, layer in enumerate(cache.layers):
        seen = layer._contexts[None].memory
        queries = torch.stack(seen["queries"])
        found.append(Steps(f"checkpoint layer {i}", queries, seen["keys"], seen["scale"]))
    return found
