"""Each registered method behind patch_model: a new method gets these tests for free."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budgets import COVERING, options
from tiny_models import greedy, left_padded, logits, prompt, tiny
from transformers import DynamicCache

import lowcontext

METHODS = lowcontext.available_methods()
# Small enough to leave keys out at these lengths.
SMALL: dict[str, Any] = {
    "budget": 128,
    "window": 32,
    "dense_layers": 0,
    "min_length": 0,
    "min_budget": 64,
    "vertical": 32,
    "slash": 64,
    "sink": 4,
    "local": 16,
    "k": 24,
    "chunk": 64,
    "page": 16,
    "block_q": 32,
    "block_k": 16,
    "leaf": 16,
}
EACH = pytest.mark.parametrize("method", METHODS)


MIXED = {
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}


def patched(method: str, values: dict[str, Any], family: str = "llama", **changes: Any) -> Any:
    return lowcontext.patch_model(tiny(family, **changes), method, **options(method, values))


@EACH
@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("gemma2", MIXED)])
def test_a_covering_budget_gives_the_logits_of_the_unpatched_model(
    method: str, family: str, changes: dict[str, Any]
) -> None:
    ids = prompt(300)
    expected = logits(tiny(family, **changes), ids)
    got = logits(patched(method, COVERING, family, **changes), ids)
    assert (got - expected).abs().max() < 1e-5


@EACH
def test_rows_of_a_padded_batch_equal_each_row_alone(method: str) -> None:
    rows = [prompt(300)[0], prompt(211, seed=2)[0], prompt(3, seed=3)[0]]
    ids, mask = left_padded(rows)
    together = greedy(patched(method, SMALL), ids, new=6, attention_mask=mask)
    for row, tokens in zip(rows, together, strict=True):
        assert torch.equal(greedy(patched(method, SMALL), row[None], new=6)[0], tokens)


@EACH
def test_dropped_memory_changes_no_token(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowcontext.integrations.cache import SparseCacheLayer

    # What is kept for several steps depends on the step that made it.
    fresh = {**SMALL, "refresh": 1, "cache_threshold": None, "every": 1}
    model, ids = patched(method, fresh), prompt(300, batch=2)
    expected = greedy(model, ids, new=8)
    update, layers = SparseCacheLayer.update, []

    def forgetting(self: SparseCacheLayer, *args: Any, **kwargs: Any) -> Any:
        layers.append(self)
        # tidaldecode hands its list from layer to layer: there it is lost between steps.
        if method != "tidaldecode" or self is layers[0]:
            self.drop_memory()
        return update(self, *args, **kwargs)

    monkeypatch.setattr(SparseCacheLayer, "update", forgetting)
    assert torch.equal(greedy(model, ids, new=8), expected)


@EACH
def test_a_cropped_cache_goes_on_as_if_the_rest_had_never_been(method: str) -> None:
    model = patched(method, {**SMALL, "refresh": 1, "cache_threshold": None})
    head, tail, other = prompt(260), prompt(40, seed=4), prompt(1, seed=5)
    once, twice = DynamicCache(), DynamicCache()
    logits(model, head, past_key_values=once, use_cache=True)
    logits(model, head, past_key_values=twice, use_cache=True)
    logits(model, tail, past_key_values=twice, use_cache=True)
    twice.crop(head.shape[1])
    expected = logits(model, other, past_key_values=once, use_cache=True)
    got = logits(model, other, past_key_values=twice, use_cache=True)
    assert (got - expected).abs().max() < 1e-5


@EACH
def test_future_tokens_do_not_change_the_logits_of_a_prompt_that_went_before(method: str) -> None:
    """A second prompt on a cache leaves no trace in what the first one computed."""
    model = patched(method, SMALL)
    ids = prompt(300)
    alone = logits(model, ids)
    cache = DynamicCache()
    first = logits(model, ids, past_key_values=cache, use_cache=True)
    logits(model, prompt(90, seed=6), past_key_values=cache, use_cache=True)
    again = logits(model, ids)
    assert torch.equal(alone, first)
    assert torch.equal(alone, again)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_and_close_to_fp32(method: str, dtype: torch.dtype) -> None:
    ids = prompt(300)
    exact = logits(tiny("llama"), ids)
    model = lowcontext.patch_model(tiny("llama", dtype=dtype), method, **options(method, COVERING))
    got = logits(model, ids).float()
    plain = logits(tiny("llama", dtype=dtype), ids).float()
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-3
