"""TokenSelect in tiny models: batches, caches, chunks of a prompt, and moved positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FIRST_ID, VOCABULARY, build, greedy, left_padded, logits, prompt, tiny
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

import lowcontext
from lowcontext.eval import NeedleTask, make_sample, write_retrieval_checkpoint
from lowcontext.integrations._rotary import rotary_source
from lowcontext.integrations.cache import SparseCacheLayer
from lowcontext.ops import votes

SMALL: dict[str, Any] = {
    "k": 12,
    "sink": 4,
    "local": 8,
    "chunk": 16,
    "tail": 0,
    "cache_cosine": "layer",
    "cache_steps": 4,
    "scope": "layer",
    "scoring": "exact",
}


def patched(family: str = "llama", **options: Any) -> Any:
    return lowcontext.patch_model(tiny(family), "tokenselect", **{**SMALL, **options})


def distinct(length: int, seed: int) -> Tensor:
    """Different tokens [length]."""
    gen = torch.Generator().manual_seed(seed)
    return FIRST_ID + torch.randperm(VOCABULARY - FIRST_ID, generator=gen)[:length]


@pytest.mark.parametrize("scoring", ["exact", "int8", "int4", "pages"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_left_padded_batch_gives_what_each_row_gives_alone(scoring: str, positions: str) -> None:
    model = patched(scoring=scoring, positions=positions, page=4, cache_threshold=-0.1)
    # No token twice: at one distance the votes for both would tie, up to rounding.
    rows = [distinct(90, 0), distinct(61, 2), distinct(40, 3)]
    ids, mask = left_padded(rows)
    together = greedy(model, ids, new=12, attention_mask=mask)
    for b, row in enumerate(rows):
        assert torch.equal(together[b : b + 1], greedy(model, row[None], new=12))


def test_an_unpadded_batch_gives_what_each_row_gives_alone() -> None:
    model = patched(cache_threshold=0.0)
    ids = prompt(80, batch=3)
    together = greedy(model, ids, new=12)
    for b in range(3):
        assert torch.equal(together[b : b + 1], greedy(model, ids[b : b + 1], new=12))


def test_beam_search_equals_beam_search_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched(cache_threshold=-1.0)
    ids = prompt(60, batch=2)
    expected = greedy(model, ids, num_beams=3)
    update = SparseCacheLayer.update

    def forgetting(self: SparseCacheLayer, *args: Any, **kwargs: Any) -> Any:
        self.drop_memory()
        return update(self, *args, **kwargs)

    monkeypatch.setattr(SparseCacheLayer, "update", forgetting)
    assert torch.equal(greedy(model, ids, num_beams=3), expected)


def test_a_cropped_cache_continues_as_one_that_never_held_more() -> None:
    model = patched(cache_threshold=0.5, scoring="int8")
    ids = prompt(80)
    outs = []
    for extra in (0, 7):
        cache = DynamicCache(config=model.config)
        logits(model, torch.cat([ids, prompt(extra, seed=9)], dim=1), past_key_values=cache)
        if extra:
            cache.crop(80)
            assert cache.get_seq_length() == 80
        steps = []
        for token in prompt(6, seed=4)[0]:
            steps.append(logits(model, token.view(1, 1), past_key_values=cache))
        outs.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_several_turns_on_one_cache_keep_finding_what_fits_the_budget(positions: str) -> None:
    plain = tiny("llama")
    model = patched(k=200, positions=positions)

    def talk(model: Any) -> Tensor:
        cache = DynamicCache(config=model.config)
        ids = torch.zeros(1, 0, dtype=torch.long)
        for turn in range(3):
            ids = torch.cat([ids, prompt(30, seed=turn)], dim=1)
            ids = torch.cat([ids, greedy(model, ids, new=8, past_key_values=cache)], dim=1)
        return ids

    assert torch.equal(talk(plain), talk(model))


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_prompt_in_chunks_equals_the_prompt_at_once(positions: str) -> None:
    model = patched(chunk=40, positions=positions, cache_threshold=None)
    ids = prompt(200)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=80), greedy(model, ids))


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_budget_that_covers_equals_the_unpatched_model_bit_for_bit(positions: str) -> None:
    ids = prompt(100)
    expected = logits(tiny("llama"), ids)
    assert torch.equal(logits(patched(k=100, positions=positions), ids), expected)


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def with_rope(rope: dict[str, Any]) -> Any:
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=256, rope_scaling=rope)
    return build(LlamaForCausalLM, config)


MODELS = ["llama", "qwen2", "qwen3", "phi3", "glm4", "gemma3", "gpt_neox", *ROPES]


@pytest.mark.parametrize("name", MODELS)
def test_moved_positions_equal_a_prompt_without_the_tokens_between(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one layer keys do not depend on other tokens: what is read is a shorter prompt."""
    if name in ROPES:
        model = with_rope(ROPES[name])
    else:
        types = {"layer_types": ["full_attention"]} if name == "gemma3" else {}
        model = tiny(name, num_hidden_layers=1, **types)
    ids = prompt(64)
    short = torch.cat([ids[:, :4], ids[:, -9:]], dim=1)
    expected = logits(model, short)[:, -1]

    def lowest(
        scores: Tensor, k: int, first: int, pages: None, active: None
    ) -> tuple[Tensor, Tensor]:
        shape = scores.shape[:-1]
        return torch.full((*shape, 1), first).int(), torch.ones(shape).int()

    monkeypatch.setattr(votes, "topk", lowest)  # selects the first token behind the sink
    options = {**SMALL, "k": 1, "sink": 3, "local": 9, "chunk": 64}
    lowcontext.patch_model(model, "tokenselect", positions="compact", **options)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :-1], past_key_values=cache)
    got = logits(model, ids[:, -1:], past_key_values=cache)[:, -1]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_frequencies_that_depend_on_the_length_are_refused() -> None:
    model = with_rope({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    with pytest.raises(NotImplementedError, match="rope_type 'dynamic', whose frequencies change"):
        lowcontext.patch_model(model, "tokenselect", positions="compact")
    assert model.config._attn_implementation != "lowcontext"
    lowcontext.patch_model(model, "tokenselect")


def test_the_layout_of_pairs_is_found_by_running_the_model() -> None:
    for family, interleaved, pairs in [("llama", False, 4), ("glm4", True, 2), ("phi3", False, 4)]:
        model = tiny(family)
        attention = model.model.layers[0].self_attn
        source = rotary_source(model, attention)
        assert source.interleaved == interleaved
        assert source.facts().inv_freq.shape == (pairs,)


@pytest.mark.parametrize("times", [8, 32])
def test_compact_positions_run_far_beyond_the_trained_length(times: int) -> None:
    model = tiny("llama", max_position_embeddings=64)
    lowcontext.patch_model(model, "tokenselect", positions="compact", **SMALL)
    ids = prompt(64 * times)
    assert greedy(model, ids, new=6).shape == (1, 6)
    assert logits(model, ids).isfinite().all()


def test_compact_positions_find_a_needle_eight_times_beyond_where_dense_attention_does(
    tmp_path: Path,
) -> None:
    """The retrieval checkpoint with faster content frequencies, as if trained for short texts."""
    write_retrieval_checkpoint(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    model.model.rotary_emb.inv_freq[15:] *= 4096
    budget = {"k": 64, "sink": 16, "local": 64, "chunk": 64}
    right = {}
    for length in (256, 2048):
        sample = make_sample(tokenizer, NeedleTask("multikey"), length=length, depth=25.0, seed=0)
        ids = torch.tensor([sample.input_ids])
        for positions in ("dense", "original", "compact"):
            options = {} if positions == "dense" else {**budget, "positions": positions}
            name = "dense" if positions == "dense" else "tokenselect"
            with lowcontext.patched(model, name, **options):
                out = model.generate(ids, max_new_tokens=16, do_sample=False)
            text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            right[length, positions] = sample.expected in text
    assert right[256, "dense"]
    assert right[256, "compact"]
    assert right[2048, "compact"]
    assert not right[2048, "dense"]
    assert not right[2048, "original"]


def test_statistics_are_measured_and_cost_nothing_outside() -> None:
    model = patched(cache_threshold=-1.0, cache_steps=4)  # one selection, four steps that reuse it
    ids = prompt(80)
    with lowcontext.measure_selection(model) as selection:
        out = greedy(model, ids, new=12)
    assert selection.names == ["cache_hits", "selected_mass"]
    assert selection.count("cache_hits") == 11 * 2
    assert selection.mean("cache_hits") == pytest.approx(8 / 11)
    assert 0 < selection.mean("selected_mass") <= 1
    assert torch.equal(greedy(model, ids, new=12), out)
    assert selection.count("cache_hits") == 11 * 2
    with pytest.raises(ValueError, match="expected a model patched"):  # noqa: SIM117
        with lowcontext.measure_selection(tiny("llama")):
            pass
