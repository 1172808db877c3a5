"""Lists that hip and infinitehip keep while decoding, behind the cache and its events."""

from __future__ import annotations

import pytest
import torch
from tiny_models import greedy, left_padded, logits, prompt, tiny

import lowcontext

SMALL = {"budget": 32, "window": 24, "sink": 8, "block_q": 16, "block_k": 8, "dense_last": 0}
METHODS = [
    ("hip", {**SMALL, "dense_layers": 0, "beam": 8, "leaf": 4, "key_stride": 2, "refresh": 4}),
    ("infinitehip", {**SMALL, "stages": "32:128 8/1", "refresh": "8/4"}),
]
EACH = pytest.mark.parametrize(("name", "options"), METHODS)


@EACH
def test_a_padded_row_is_what_it_is_alone(name: str, options: dict) -> None:
    # Rows differ in length, so their lists are made and remade at different tiles.
    rows = [prompt(n, seed=n)[0] for n in (300, 231, 177)]
    ids, mask = left_padded(rows)
    model = lowcontext.patch_model(tiny("llama"), method=name, **options)
    together = greedy(model, ids, new=12, attention_mask=mask)
    for row, got in zip(rows, together, strict=True):
        assert torch.equal(greedy(model, row[None], new=12)[0], got)


@EACH
def test_beams_that_change_places_do_not_keep_each_others_lists(name: str, options: dict) -> None:
    # With a budget that covers the prompt lists cannot matter; with a small one they must be made
    # again after each reorder: both runs go through the same events as single steps would.
    ids = prompt(300)
    model = lowcontext.patch_model(tiny("llama"), method=name, **options)
    kept = greedy(model, ids, new=10, num_beams=3)
    every = {**options, "refresh": 1}
    fresh = lowcontext.patch_model(tiny("llama"), method=name, **every)
    assert torch.equal(kept, greedy(fresh, ids, new=10, num_beams=3))


@EACH
def test_a_cropped_cache_is_searched_anew(name: str, options: dict) -> None:
    ids = prompt(320)
    model = lowcontext.patch_model(tiny("llama"), method=name, **options)

    def decoded(crop: bool) -> torch.Tensor:
        with torch.no_grad():
            cache = model(input_ids=ids[:, :300], use_cache=True).past_key_values
            if crop:  # four steps, taken back
                for n in range(310, 314):
                    model(input_ids=ids[:, n : n + 1], past_key_values=cache)
                cache.crop(300)
            steps = [
                model(input_ids=ids[:, n : n + 1], past_key_values=cache).logits
                for n in range(300, 310)
            ]
        return torch.cat(steps, dim=1)

    assert torch.equal(decoded(crop=True), decoded(crop=False))


@EACH
def test_a_budget_that_covers_the_context_equals_the_plain_model(name: str, options: dict) -> None:
    ids = prompt(300)
    model = tiny("llama")
    plain, plain_tokens = logits(model, ids), greedy(model, ids, new=12)
    lowcontext.patch_model(model, method=name, **{**options, "budget": 1024})
    torch.testing.assert_close(logits(model, ids), plain, atol=1e-4, rtol=1e-4)
    assert torch.equal(greedy(model, ids, new=12), plain_tokens)


STREAMING = pytest.mark.parametrize(
    ("name", "options"),
    [(name, {**o, "share": "layer", "positions": "streaming"}) for name, o in METHODS],
)


@STREAMING
def test_streaming_positions_run_at_four_times_the_trained_length(name: str, options: dict) -> None:
    model = tiny("llama", max_position_embeddings=128)
    lowcontext.patch_model(model, name, **options)
    rows = [prompt(n, seed=n)[0] for n in (512, 430)]
    ids, mask = left_padded(rows)
    together = greedy(model, ids, new=8, attention_mask=mask)
    for i, row in enumerate(rows):
        assert logits(model, row[None]).isfinite().all()
        # In a batch of two as well: equal tokens have equal keys at one position, and how the
        # model's products of two rows round decides between their tiles.
        both = [row, row]
        both[1 - i] = prompt(len(row), seed=1)[0]
        assert torch.equal(greedy(model, torch.stack(both), new=8)[i], together[i])


@STREAMING
def test_streaming_positions_of_a_covered_context_equal_the_plain_model(
    name: str, options: dict
) -> None:
    ids = prompt(300)
    model = tiny("llama")
    plain, tokens = logits(model, ids), greedy(model, ids, new=12)
    lowcontext.patch_model(model, name, **{**options, "budget": 1024})
    torch.testing.assert_close(logits(model, ids), plain, atol=1e-4, rtol=1e-4)
    assert torch.equal(greedy(model, ids, new=12), tokens)
