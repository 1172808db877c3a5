"""Attention mass that rules of choice keep: by budget, by reuse, by the layers that select."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.selection_inputs import Steps
from lowcontext import BlockIndex, LayerContext
from lowcontext.methods.tokenselect import TokenSelect

SINK, LOCAL = 128, 512
BASE = TokenSelect(sink=SINK, local=LOCAL, scope="layer", scoring="exact", cache_threshold=None)
RULES: dict[str, TokenSelect] = {
    "soft vote": BASE,
    "soft vote, unscaled": replace(BASE, vote_scale=1),
    "soft vote per KV head": replace(BASE, scope="kv_head"),
    "soft vote per KV head, unscaled": replace(BASE, scope="kv_head", vote_scale=1),
    "int8": replace(BASE, scoring="int8"),
    "int8 per KV head": replace(BASE, scope="kv_head", scoring="int8"),
    "int4 per KV head": replace(BASE, scope="kv_head", scoring="int4"),
    "pages, coarse=2": replace(BASE, scoring="pages", coarse=2),
    "pages, coarse=4": replace(BASE, scoring="pages", coarse=4),
    "pages, coarse=8": replace(BASE, scoring="pages", coarse=8),
    "pages per KV head, coarse=4": replace(BASE, scope="kv_head", scoring="pages", coarse=4),
}


def hard_vote(logits: Tensor, k: int) -> Tensor:
    """Candidates [n] by how many heads have them in their own top k; ties to the lower index."""
    own = logits.topk(min(k, logits.shape[1]), dim=1).indices
    count = torch.zeros(logits.shape[1]).index_add_(0, own.flatten(), torch.ones(own.numel()))
    return count.sort(descending=True, stable=True).indices[:k]


def summed_logits(logits: Tensor, k: int) -> Tensor:
    """Candidates [n] by the sum of their logits over the heads."""
    return logits.sum(0).sort(descending=True, stable=True).indices[:k]


def best_per_head(logits: Tensor, k: int) -> Tensor:
    """The most that any choice can keep: each head its own top k."""
    return logits.topk(min(k, logits.shape[1]), dim=1).indices


LOGIT_RULES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "hard vote": hard_vote,
    "summed logits": summed_logits,
    "own list per query head": best_per_head,
}


def attended(index: BlockIndex | None, Lk: int) -> Tensor:
    """bool [1 or Hkv, Lk]."""
    if index is None:
        return torch.ones(1, Lk, dtype=torch.bool)
    return index.to_mask(1, Lk)[0, :, 0]


def kept_mass(weights: Tensor, mask: Tensor) -> float:
    """Mean over the heads of the attention weights [Hq, Lk] under the mask [H, Lk]."""
    return float(
        (weights * mask.repeat_interleave(weights.shape[0] // mask.shape[0], 0)).sum(1).mean()
    )


def step_inputs(steps: Steps, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, Hq, 1, D], k [1, Hkv, Lk_t, D] and logits [Hq, Lk_t] of step t."""
    T = steps.q.shape[0]
    k = steps.k[:, : steps.k.shape[1] - T + t + 1]
    G = steps.q.shape[1] // k.shape[0]
    logits = torch.einsum("hgd,hnd->hgn", steps.q[t].unflatten(0, (-1, G)), k).flatten(0, 1)
    return steps.q[t][None, :, None], k[None], steps.scale * logits


def mass_rows(steps: Steps, budgets: Iterable[int]) -> list[dict[str, Any]]:
    """Mean attention mass over the steps, for every rule and budget."""
    sums: dict[tuple[str, int], float] = {}
    T = steps.q.shape[0]
    # Options first, so that their state (8-bit keys, page bounds) is carried from step to step.
    contexts = {name: LayerContext(scale=steps.scale) for name in RULES}
    for t in range(T):
        q, k, logits = step_inputs(steps, t)
        weights, Lk = logits.softmax(-1), k.shape[2]
        forced = torch.zeros(1, Lk, dtype=torch.bool)
        forced[:, :SINK], forced[:, Lk - LOCAL :] = True, True
        for budget in budgets:
            for name, method in RULES.items():
                index = replace(method, k=budget).decode(q, k, contexts[name])
                key = (name, budget)
                sums[key] = sums.get(key, 0.0) + kept_mass(weights, attended(index, Lk)) / T
            for name, rule in LOGIT_RULES.items():
                ids = rule(logits[:, SINK : Lk - LOCAL], budget) + SINK
                mask = forced.expand(ids.shape[0] if ids.dim() == 2 else 1, Lk).clone()
                mask.scatter_(1, ids if ids.dim() == 2 else ids[None], True)
                sums[name, budget] = sums.get((name, budget), 0.0) + kept_mass(weights, mask) / T
    rows = []
    for (name, budget), mass in sums.items():
        share = mass / sums["soft vote", budget]
        row = {"input": steps.name, "rule": name, "k": budget, "mass": mass, "of_exact": share}
        rows.append(row)
    return rows


def cache_rows(
    steps: Steps, k: int, cosine: str, thresholds: Iterable[float | None]
) -> list[dict[str, Any]]:
    """Mass and hit rate over consecutive steps, by threshold."""
    rows, T = [], steps.q.shape[0]
    for threshold in thresholds:
        method = replace(BASE, k=k, cache_threshold=threshold, cache_cosine=cosine)
        hits: list[float] = []
        layer = LayerContext(scale=steps.scale)
        layer.observe = lambda seen, hits=hits: hits.extend(
            seen.get("cache_hits", torch.empty(0)).tolist()
        )
        mass = 0.0
        for t in range(T):
            q, keys, logits = step_inputs(steps, t)
            index = method.decode(q, keys, layer)
            mass += kept_mass(logits.softmax(-1), attended(index, keys.shape[2])) / T
        row = {"input": steps.name, "rule": f"cache by {cosine}", "k": k, "mass": mass}
        row["threshold"] = threshold
        rows.append({**row, "hit_rate": sum(hits) / len(hits) if hits else 0.0})
    return rows


def shared_rows(
    layers: list[Steps], k: int, choices: Iterable[tuple[int, ...] | None]
) -> list[Any]:
    """Mass of each layer where only some select, and the others take the list before them."""
    rows, T = [], layers[0].q.shape[0]
    for chosen in choices:
        method = replace(BASE, k=k, scope="kv_head", select_layers=chosen)
        sums = [0.0] * len(layers)
        shared: dict[str, Any] = {}
        contexts = [
            LayerContext(i, len(layers), each.scale, shared=shared) for i, each in enumerate(layers)
        ]
        for t in range(T):
            for i, each in enumerate(layers):
                q, keys, logits = step_inputs(each, t)
                index = method.decode(q, keys, contexts[i])
                sums[i] += kept_mass(logits.softmax(-1), attended(index, keys.shape[2])) / T
        rows.append({"rule": f"select_layers={chosen}", "k": k, "mass": sums})
    return rows
