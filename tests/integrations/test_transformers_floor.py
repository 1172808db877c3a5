"""The core of the integration; these tests also pass with the oldest supported transformers."""

from __future__ import annotations

import copy
import doctest
import importlib
import io
import pickle
from typing import Any

import pytest
import torch
import transformers
from tiny_models import SPECS, greedy, left_padded, logits, prompt, tiny
from torch import Tensor
from transformers import DynamicCache

import lowcontext
from lowcontext.integrations import SparseCacheLayer

# PhiMoE has an attention of its own before transformers 5.
FAMILIES = sorted(SPECS)
if int(transformers.__version__.split(".")[0]) < 5:
    FAMILIES.remove("phimoe")
# Small enough that prompts of 40 tokens are read sparsely.
SPARSE: dict[str, dict[str, Any]] = {
    "streaming_llm": {"sink": 2, "window": 8, "block_q": 8, "block_k": 8},
    "block_topk": {"budget": 16, "sink": 0, "local": 0, "block_q": 8, "block_k": 4},
    "quest": {"budget": 8, "page": 4, "dense_layers": 0},
}
COVERING: dict[str, dict[str, Any]] = {
    "streaming_llm": {"window": 4096},
    "block_topk": {"budget": 4096},
    "quest": {"budget": 4096, "dense_layers": 0},
}


def sparse(family: str, method: str, **changes: Any) -> Any:
    return lowcontext.patch_model(tiny(family, **changes), method, **SPARSE[method])


def greedy_by_recomputation(model: Any, ids: Tensor, new: int) -> Tensor:
    """Greedy tokens where every step reads the whole sequence again, without a cache."""
    start = ids.shape[1]
    for _ in range(new):
        last = logits(model, ids, use_cache=False)[:, -1]
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
    return ids[:, start:]


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_through_the_patch_equals_the_unpatched_model(family: str) -> None:
    model, ids = tiny(family), prompt(40)
    before, tokens = logits(model, ids), greedy(model, ids)
    lowcontext.patch_model(model, "dense")
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-5)
    assert torch.equal(greedy(model, ids), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_that_covers_the_context_equals_dense(family: str) -> None:
    model, ids = tiny(family), prompt(40)
    before, tokens = logits(model, ids), greedy(model, ids)
    for method, options in COVERING.items():
        with lowcontext.patched(model, method, **options):
            torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-5)
            assert torch.equal(greedy(model, ids), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_accepts_the_family(family: str) -> None:
    model = tiny(family)
    assert lowcontext.patch_model(model, "streaming_llm", verify=True) is model
    assert greedy(model, prompt(20)).shape == (1, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatched_model_is_bit_identical_to_before(family: str) -> None:
    model, ids = tiny(family), prompt(40)
    implementation = model.config._attn_implementation
    names = set(model.state_dict())
    before = logits(model, ids)
    lowcontext.patch_model(model, "streaming_llm", window=8)
    logits(model, ids)
    assert lowcontext.unpatch_model(model) is model
    assert torch.equal(logits(model, ids), before)
    assert model.config._attn_implementation == implementation
    assert set(model.state_dict()) == names
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not [name for name in vars(module) if "lowcontext" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_row_equals_the_row_alone_when_dense(family: str) -> None:
    model = lowcontext.patch_model(tiny(family), "dense")
    rows = [prompt(40)[0], prompt(23, seed=2)[0], prompt(5, seed=3)[0]]
    ids, mask = left_padded(rows)
    got = logits(model, ids, mask)
    for b, row in enumerate(rows):
        alone = logits(model, row[None])[0]
        torch.testing.assert_close(got[b, -len(row) :], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", sorted(SPARSE))
@pytest.mark.parametrize("family", ["llama", "gemma3", "glm4"])
def test_a_left_padded_row_equals_the_row_alone_when_sparse(family: str, method: str) -> None:
    model = sparse(family, method)
    rows = [prompt(40)[0], prompt(23, seed=2)[0]]
    ids, mask = left_padded(rows)
    got, tokens = logits(model, ids, mask), greedy(model, ids, attention_mask=mask)
    for b, row in enumerate(rows):
        torch.testing.assert_close(
            got[b, -len(row) :], logits(model, row[None])[0], rtol=0, atol=2e-6
        )
        assert torch.equal(tokens[b], greedy(model, row[None])[0])


@pytest.mark.parametrize("method", sorted(SPARSE))
def test_batch_rows_do_not_influence_each_other(method: str) -> None:
    model = sparse("llama", method)
    ids = prompt(40, batch=3)
    together, tokens = logits(model, ids), greedy(model, ids)
    for b in range(3):
        torch.testing.assert_close(together[b], logits(model, ids[b : b + 1])[0], rtol=0, atol=2e-6)
        assert torch.equal(tokens[b], greedy(model, ids[b : b + 1])[0])


def test_sparse_methods_change_the_outputs_of_these_models() -> None:
    """Guards the tests above: with these settings sparse is not dense."""
    ids = prompt(40)
    dense = tiny("llama")
    with torch.no_grad():
        cache = dense(input_ids=ids, use_cache=True).past_key_values
        expected = dense(input_ids=ids[:, -1:], past_key_values=cache).logits
    for method in SPARSE:
        model = sparse("llama", method)
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
            got = model(input_ids=ids[:, -1:], past_key_values=cache).logits
        assert (got - expected).abs().max() > 1e-3, method


@pytest.mark.parametrize("family", ["llama", "glm4", "gemma2"])
def test_streaming_decode_behind_a_prefill_equals_reading_its_window(family: str) -> None:
    """block_q = 1 reads the same keys in prefill and in decode, so recomputation is exact."""
    model = lowcontext.patch_model(
        tiny(family), "streaming_llm", sink=2, window=8, block_q=1, block_k=4
    )
    ids = prompt(40)
    assert torch.equal(greedy(model, ids), greedy_by_recomputation(model, ids, 8))


def test_forward_without_a_cache_equals_forward_with_one() -> None:
    for method in SPARSE:
        model = sparse("qwen3", method)
        ids = prompt(40)
        with_cache = logits(model, ids, use_cache=True)
        torch.testing.assert_close(logits(model, ids, use_cache=False), with_cache, rtol=0, atol=0)


def test_an_all_ones_mask_changes_nothing() -> None:
    model, ids = sparse("llama", "block_topk"), prompt(40, batch=2)
    assert torch.equal(logits(model, ids), logits(model, ids, torch.ones_like(ids)))


def test_the_cache_gets_sparse_layers_where_attention_is_full() -> None:
    model = lowcontext.patch_model(tiny("gemma3"), "streaming_llm")
    with torch.no_grad():
        cache = model(input_ids=prompt(20), use_cache=True).past_key_values
    kinds = [type(layer) for layer in cache.layers]
    assert kinds.count(SparseCacheLayer) == 1
    assert cache.layers[kinds.index(SparseCacheLayer)].get_seq_length() == 20


@pytest.mark.parametrize("configured", [True, False])
def test_a_cache_of_the_user_is_filled_and_reused(configured: bool) -> None:
    model, ids = tiny("mistral"), prompt(40)
    expected = logits(model, ids)
    lowcontext.patch_model(model, "dense")
    cache = DynamicCache(config=model.config) if configured else DynamicCache()
    parts = [
        logits(model, part, past_key_values=cache, use_cache=True)
        for part in (ids[:, :17], ids[:, 17:39], ids[:, 39:])
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)
    assert cache.get_seq_length() == 40


def test_a_cache_filled_before_patching_is_taken_over_and_one_after_is_left_usable() -> None:
    model, ids = tiny("llama"), prompt(40)
    expected = logits(model, ids)
    cache = DynamicCache()
    parts = [logits(model, ids[:, :15], past_key_values=cache, use_cache=True)]
    with lowcontext.patched(model, "dense"):
        parts.append(logits(model, ids[:, 15:30], past_key_values=cache, use_cache=True))
        assert all(type(layer) is SparseCacheLayer for layer in cache.layers)
    parts.append(logits(model, ids[:, 30:], past_key_values=cache, use_cache=True))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", sorted(SPARSE))
def test_memory_dropped_between_steps_changes_nothing(method: str) -> None:
    model, ids = sparse("llama", method), prompt(40)

    def steps(drop: bool) -> Tensor:
        cache = DynamicCache()
        parts = [logits(model, ids[:, :30], past_key_values=cache, use_cache=True)]
        for step in range(30, 40):
            if drop:
                for layer in cache.layers:
                    layer.drop_memory()
            new = ids[:, step : step + 1]
            parts.append(logits(model, new, past_key_values=cache, use_cache=True))
        return torch.cat(parts, dim=1)

    assert torch.equal(steps(drop=False), steps(drop=True))


@pytest.mark.parametrize("method", sorted(SPARSE))
def test_nothing_is_remembered_between_two_generations(method: str) -> None:
    model = sparse("llama", method)
    first, second = prompt(40), prompt(40, seed=9)
    expected = greedy(model, first)
    greedy(model, second)
    assert torch.equal(greedy(model, first), expected)


def test_a_cache_used_with_another_method_forgets_what_the_first_kept() -> None:
    model, ids = tiny("llama"), prompt(40)
    other = {"budget": 16, "page": 8, "dense_layers": 0}

    def decode(first: str) -> Tensor:
        cache = DynamicCache()
        with lowcontext.patched(model, first, **SPARSE[first]):
            logits(model, ids[:, :30], past_key_values=cache, use_cache=True)
            logits(model, ids[:, 30:31], past_key_values=cache, use_cache=True)
        # Both methods prefill differently: give the second the same keys.
        for layer, source in zip(cache.layers, plain.layers, strict=True):
            layer._buffer = (source.keys.clone(), source.values.clone())
        with lowcontext.patched(model, "quest", **other):
            return logits(model, ids[:, 31:32], past_key_values=cache, use_cache=True)

    plain = DynamicCache()
    logits(model, ids[:, :31], past_key_values=plain, use_cache=True)
    assert torch.equal(decode("quest"), decode("streaming_llm"))


def test_patching_twice_is_refused() -> None:
    model = lowcontext.patch_model(tiny("llama"), "dense")
    with pytest.raises(ValueError, match="unpatch_model"):
        lowcontext.patch_model(model, "streaming_llm")
    with pytest.raises(ValueError, match="unpatch_model"):
        lowcontext.patch_model(model.model, "streaming_llm")


def test_a_class_that_ignores_the_interface_is_refused_and_left_as_it_was() -> None:
    config = transformers.FalconConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.FalconForCausalLM(config).eval()
    before = logits(model, prompt(20))
    with pytest.raises(NotImplementedError, match="AttentionInterface"):
        lowcontext.patch_model(model, "streaming_llm")
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, prompt(20)), before)


def test_unpatching_an_unpatched_model_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a model patched"):
        lowcontext.unpatch_model(tiny("llama"))


def test_patched_restores_the_model_after_an_error() -> None:
    model = tiny("llama")
    with pytest.raises(KeyError), lowcontext.patched(model, "dense"):
        raise KeyError
    assert model.config._attn_implementation != "lowcontext"


def test_two_phases_take_two_methods() -> None:
    model, ids = tiny("llama"), prompt(40)
    expected = logits(model, ids)
    quest = lowcontext.get_method("quest", **SPARSE["quest"])
    lowcontext.patch_model(model, decode=quest)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)
    with lowcontext.measure_density(model) as density:
        greedy(model, ids)
    assert density.prefill == 1.0
    assert density.decode < 0.5


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_copied_and_pickled_models_stay_patched_and_can_be_unpatched(family: str) -> None:
    model, ids = tiny(family), prompt(40)
    before = logits(model, ids)
    lowcontext.patch_model(model, "block_topk", **SPARSE["block_topk"])
    expected = logits(model, ids)
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.load(buffer)):
        assert torch.equal(logits(twin, ids), expected)
        lowcontext.unpatch_model(twin)
        assert torch.equal(logits(twin, ids), before)
        assert torch.equal(logits(model, ids), expected)


def test_models_patched_differently_do_not_disturb_each_other() -> None:
    ids = prompt(40)
    methods = sorted(SPARSE)
    alone = [greedy(sparse("llama", method), ids) for method in methods]
    models = [sparse("llama", method) for method in methods]
    untouched = tiny("llama")
    expected = greedy(untouched, ids)
    for _ in range(2):
        for model, tokens in zip(models, alone, strict=True):
            assert torch.equal(greedy(model, ids), tokens)
        assert torch.equal(greedy(untouched, ids), expected)


def test_saving_a_patched_model_leaves_no_trace(tmp_path: Any) -> None:
    model, ids = tiny("llama"), prompt(40)
    before = logits(model, ids)
    lowcontext.patch_model(model, "streaming_llm", window=8)
    model.save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        assert b"lowcontext" not in file.read_bytes(), file
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(logits(loaded.eval(), ids), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_prompts_are_bit_equal_when_dense(dtype: torch.dtype) -> None:
    model, ids = tiny("llama", dtype=dtype), prompt(40)
    before = logits(model, ids)
    lowcontext.patch_model(model, "dense", verify=True)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("module", ["transformers", "_density"])
def test_docstring_examples_run_and_there_are_some(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"lowcontext.integrations.{module}"))
    assert result.failed == 0
    assert result.attempted > 5
