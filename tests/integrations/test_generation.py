"""The ways transformers runs a model: generate's modes, existing caches, pipelines."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from tiny_models import FIRST_ID, VOCABULARY, build, greedy, left_padded, logits, prompt, tiny
from torch import Tensor
from transformers import DynamicCache

import lowcontext

FAMILIES = ["llama", "gemma3"]
SPARSE: dict[str, dict[str, Any]] = {
    "streaming_llm": {"sink": 2, "window": 8, "block_q": 1, "block_k": 8},
    "quest": {"budget": 8, "page": 4, "dense_layers": 0},
}


def both(family: str, method: str = "dense", **options: Any) -> tuple[Any, Any]:
    """The same model unpatched and patched."""
    return tiny(family), lowcontext.patch_model(tiny(family), method, **options)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("method", sorted(SPARSE))
def test_autocast_runs_in_its_dtype_and_gives_what_it_gives_unpatched(
    family: str, method: str
) -> None:
    plain, covering = both(family, "block_topk", budget=4096)
    sparse = lowcontext.patch_model(tiny(family), method, **SPARSE[method])
    ids = prompt(60)
    exact = logits(plain, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = (logits(plain, ids) - exact).abs().max()
        assert (logits(covering, ids) - exact).abs().max() <= 2 * error + 1e-5
        cache = DynamicCache(config=sparse.config)
        logits(sparse, ids, past_key_values=cache)
        assert greedy(sparse, ids).shape == (1, 8)
    full = cache.layers[1]
    assert full.keys.dtype == full.values.dtype == torch.bfloat16


@pytest.mark.parametrize("returned", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_equals_the_unpatched_model(family: str, returned: int) -> None:
    plain, patched = both(family)
    rows = [prompt(20)[0], prompt(13, seed=2)[0]]
    ids, mask = left_padded(rows)
    arguments = {"num_beams": 3, "num_return_sequences": returned, "attention_mask": mask}
    assert torch.equal(greedy(plain, ids, **arguments), greedy(patched, ids, **arguments))


@pytest.mark.parametrize("method", sorted(SPARSE))
def test_beam_search_with_a_sparse_method_equals_beam_search_without_memory(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reordering drops memory; a method that is given none at all must find the same beams."""
    _, model = both("llama", method, **SPARSE[method])
    ids = prompt(20, batch=2)
    arguments = {"num_beams": 3, "num_return_sequences": 2}
    expected = greedy(model, ids, **arguments)
    from lowcontext.integrations.cache import SparseCacheLayer

    update = SparseCacheLayer.update

    def forgetting(self: SparseCacheLayer, *args: Any, **kwargs: Any) -> Any:
        self.drop_memory()
        return update(self, *args, **kwargs)

    monkeypatch.setattr(SparseCacheLayer, "update", forgetting)
    assert torch.equal(greedy(model, ids, **arguments), expected)


@pytest.mark.parametrize("mode", ["assistant", "prompt lookup"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_speculative_decoding_equals_the_unpatched_model(family: str, mode: str) -> None:
    plain, patched = both(family)
    ids = prompt(20).repeat(1, 2)  # repeats itself, so that lookup proposes tokens
    expected = greedy(plain, ids, new=12)
    arguments: dict[str, Any] = (
        {"assistant_model": tiny(family, seed=5, num_hidden_layers=1)}
        if mode == "assistant"
        else {"prompt_lookup_num_tokens": 4}
    )
    mask = torch.ones_like(ids)
    assert torch.equal(greedy(patched, ids, new=12, attention_mask=mask, **arguments), expected)


@pytest.mark.parametrize("method", ["quest", "streaming_llm"])
def test_speculative_decoding_with_a_sparse_method_equals_decoding_one_by_one(method: str) -> None:
    _, model = both("llama", method, **SPARSE[method])
    ids = prompt(20).repeat(1, 2)
    expected = greedy(model, ids, new=12)
    mask = torch.ones_like(ids)
    for arguments in (
        {"assistant_model": tiny("llama", seed=5, num_hidden_layers=1)},
        {"prompt_lookup_num_tokens": 4},
    ):
        got = greedy(model, ids, new=12, attention_mask=mask, **arguments)
        assert torch.equal(got, expected)


def test_an_assistant_may_be_patched_as_well() -> None:
    plain, patched = both("llama", "streaming_llm", sink=2, window=8, block_q=1, block_k=8)
    ids = prompt(40)
    expected = greedy(patched, ids, new=12)
    assistant = lowcontext.patch_model(tiny("llama", seed=5, num_hidden_layers=1), "dense")
    tokens = greedy(
        patched, ids, new=12, attention_mask=torch.ones_like(ids), assistant_model=assistant
    )
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, greedy(plain, ids, new=12))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_prompt_on_an_existing_cache_equals_the_unpatched_model(family: str) -> None:
    plain, patched = both(family)
    first, second = prompt(20), prompt(9, seed=3)

    def talk(model: Any) -> Tensor:
        cache = DynamicCache(config=model.config)
        ids = first
        for turn in (None, second, first):
            ids = ids if turn is None else torch.cat([ids, turn], dim=1)
            new = greedy(model, ids, new=5, past_key_values=cache)
            ids = torch.cat([ids, new], dim=1)
        return ids

    assert torch.equal(talk(plain), talk(patched))


def test_a_prompt_cache_is_copied_and_continued_twice() -> None:
    plain, patched = both("llama")
    head, tails = prompt(20), [prompt(5, seed=s) for s in (4, 5)]
    cache = DynamicCache()
    logits(patched, head, past_key_values=cache, use_cache=True)
    for tail in tails:
        ids = torch.cat([head, tail], dim=1)
        tokens = greedy(patched, ids, past_key_values=copy.deepcopy(cache))
        assert torch.equal(tokens, greedy(plain, ids))
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "glm4"])
def test_prefill_in_chunks_equals_prefill_at_once(family: str) -> None:
    plain, patched = both(family)
    ids = prompt(40)
    expected = greedy(plain, ids)
    assert torch.equal(greedy(patched, ids, prefill_chunk_size=16), expected)


def test_prefill_in_chunks_selects_what_one_prefill_selects() -> None:
    # Chunks of more than 32 queries, which would count as decoding.
    options = {"budget": 32, "sink": 0, "local": 0, "block_q": 8, "block_k": 8}
    _, model = both("llama", "block_topk", **options)
    ids = prompt(120)
    cache = DynamicCache()
    parts = [
        logits(model, ids[:, start : start + 40], past_key_values=cache, use_cache=True)
        for start in (0, 40, 80)
    ]
    got = torch.cat(parts, dim=1)
    torch.testing.assert_close(got, logits(model, ids), rtol=0, atol=2e-6)
    plain = tiny("llama")
    assert (got - logits(plain, ids)).abs().max() > 1e-3


def test_sampling_with_a_seed_equals_the_unpatched_model() -> None:
    plain, patched = both("qwen2")
    tokens = []
    for model in (plain, patched):
        torch.manual_seed(3)
        tokens.append(model.generate(prompt(20), do_sample=True, max_new_tokens=8, top_k=0))
    assert torch.equal(*tokens)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(FIRST_ID, VOCABULARY)}
    words.update({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3})
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def test_a_pipeline_with_a_batch_equals_the_unpatched_model(tokenizer: Any) -> None:
    texts = [" ".join(f"w{10 + i % 40}" for i in range(n)) for n in (30, 11)]
    outputs = []
    for model in both("llama"):
        pipe = transformers.pipeline(
            "text-generation", model=model, tokenizer=tokenizer, batch_size=2, device="cpu"
        )
        outputs.append(pipe(texts, max_new_tokens=6, do_sample=False, return_full_text=False))
    assert outputs[0] == outputs[1]
    assert outputs[0][0][0]["generated_text"]


def test_compiled_forward_without_padding_is_one_graph_and_exact() -> None:
    ids = prompt(40)
    for method in ("dense", "streaming_llm"):
        options = {} if method == "dense" else SPARSE["streaming_llm"]
        _, model = both("llama", method, **options)
        expected = logits(model, ids)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(logits(compiled, ids), expected, rtol=0, atol=1e-6)


def test_compiled_decode_steps_are_exact() -> None:
    _, model = both("llama", "streaming_llm", **SPARSE["streaming_llm"])
    ids = prompt(40)

    def steps(run: Any) -> Tensor:
        cache = DynamicCache()
        parts = [logits(model, ids[:, :36], past_key_values=cache, use_cache=True)]
        for step in range(36, 40):
            new = ids[:, step : step + 1]
            parts.append(logits(run, new, past_key_values=cache, use_cache=True))
        return torch.cat(parts, dim=1)

    expected = steps(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    torch.testing.assert_close(steps(compiled), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_dense_forward_with_padding_is_exact(family: str) -> None:
    _, model = both(family)
    ids, mask = left_padded([prompt(30)[0], prompt(12, seed=2)[0]])
    expected = logits(model, ids, mask)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    got = logits(compiled, ids, mask)
    for b, start in enumerate((0, 18)):
        torch.testing.assert_close(got[b, start:], expected[b, start:], rtol=0, atol=1e-5)


def test_the_text_tower_of_a_vision_language_model_is_patched_alone() -> None:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        ),
        image_token_index=4,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    model = build(transformers.LlavaForConditionalGeneration, config)
    ids = prompt(30)
    ids[:, 3:7] = 4
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 8, 8, generator=generator)

    def run() -> tuple[Tensor, Tensor]:
        return logits(model, ids, pixel_values=pixels), greedy(model, ids, pixel_values=pixels)

    before, tokens = run()
    lowcontext.patch_model(model, "dense", verify=True)
    assert model.config.text_config._attn_implementation == "lowcontext"
    assert model.config.vision_config._attn_implementation == "sdpa"
    got, got_tokens = run()
    torch.testing.assert_close(got, before, rtol=0, atol=1e-5)
    assert torch.equal(got_tokens, tokens)
    lowcontext.unpatch_model(model)
    with lowcontext.patched(model, "streaming_llm", sink=2, window=8, block_q=8, block_k=8):
        assert (run()[0] - before).abs().max() > 1e-3
    assert torch.equal(run()[0], before)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mistral"])
def test_without_a_compiled_backend_dense_layers_are_exact(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowcontext.integrations import _dense

    plain, patched = both(family)
    ids, mask = left_padded([prompt(30)[0], prompt(12, seed=2)[0]])
    expected = logits(plain, ids[:1])
    modes: list[dict[str, Any]] = [{}, {"prefill_chunk_size": 7}]
    tokens = [greedy(plain, ids, attention_mask=mask, **mode) for mode in modes]
    monkeypatch.setattr(_dense, "_kernel", lambda *_: None)
    monkeypatch.setattr(_dense, "_MASK_ELEMENTS", 256)  # several chunks of rows
    torch.testing.assert_close(logits(patched, ids[:1]), expected, rtol=0, atol=1e-5)
    for mode, want in zip(modes, tokens, strict=True):
        assert torch.equal(greedy(patched, ids, attention_mask=mask, **mode), want)


@pytest.mark.parametrize("method", ["streaming_llm", "block_topk"])
def test_a_prompt_cut_into_query_chunks_equals_the_prompt_at_once(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "streaming_llm": {"sink": 2, "window": 16, "block_q": 8, "block_k": 8},
        "block_topk": {"budget": 32, "sink": 0, "local": 0, "block_q": 8, "block_k": 8},
    }[method]
    plain, model = both("llama", method, **options)
    ids = prompt(90)
    expected = logits(model, ids)
    monkeypatch.setattr(lowcontext.methods.method_class(method), "query_chunk", 16)
    with lowcontext.measure_density(model) as density:
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=2e-6)
    assert density.prefill < 0.7
    assert (expected - logits(plain, ids)).abs().max() > 1e-3
