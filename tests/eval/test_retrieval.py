"""The retrieval checkpoint: a standard Llama, solved by dense attention, unsolved by a window."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowcontext.eval import NeedleTask, make_sample
from lowcontext.eval import retrieval_weights as weights
from lowcontext.eval.retrieval import write_retrieval_checkpoint
from lowcontext.eval.retrieval_tokenizer import build_vocabulary, topic_tokens
from lowcontext.eval.words import PREAMBLE, key_words, split_words

DEPTHS = (0.0, 12.5, 25.0, 37.5, 50.0, 62.5, 75.0, 87.5, 100.0)
SINK, WINDOW = 4, 256


def answer_logits(model: Any, ids: list[int], answer: list[int], mask: Tensor | None) -> Tensor:
    """Logits [4, V] at the last prompt token and each answer token, the answer being given."""
    tokens = torch.tensor([[*ids, *answer]])
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, logits_to_keep=len(answer) + 1).logits
    return logits[0].float()


def greedy_answer(model: Any, ids: list[int], answer: list[int], mask: Tensor | None) -> list[int]:
    """Argmax at each place: equal to ``answer`` just where greedy decoding would give it."""
    return answer_logits(model, ids, answer, mask)[:-1].argmax(dim=-1).tolist()


def sink_window_mask(length: int) -> Tensor:
    """Additive mask [1, 1, L, L] that shows the first 4 keys and the last 256."""
    rows, columns = torch.arange(length)[:, None], torch.arange(length)[None]
    visible = (columns <= rows) & ((columns < SINK) | (rows - columns < WINDOW))
    return torch.zeros(length, length).masked_fill(~visible, torch.finfo(torch.float32).min)[
        None, None
    ]


def top_k_mask(model: Any, ids: list[int], budget: int) -> Tensor:
    """Additive mask [1, H, L, L] of the last layer's own top keys per row (the oracle)."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        probabilities = model(torch.tensor([ids]), output_attentions=True).attentions[-1]
    model.set_attn_implementation("sdpa")
    best = probabilities.topk(budget, dim=-1).indices
    mask = torch.full_like(probabilities, torch.finfo(torch.float32).min).scatter(-1, best, 0.0)
    future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    return mask.masked_fill(future, torch.finfo(torch.float32).min)


def answer_tokens(tokenizer: Any, answer: str) -> list[int]:
    return tokenizer(answer, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("haystack", ["words", "noise"])
@pytest.mark.parametrize("task", ["single", "multikey"])
def test_dense_attention_answers_at_every_depth(
    model: Any, tokenizer: Any, task: str, haystack: str
) -> None:
    for depth in DEPTHS:
        kind = NeedleTask(task, haystack)
        sample = make_sample(tokenizer, kind, length=1024, depth=depth, seed=100)
        answer = answer_tokens(tokenizer, sample.expected)
        assert len(answer) == 3
        logits = answer_logits(model, sample.input_ids, answer, None)
        # The three tokens of the answer, then the end, each well ahead of any other token.
        expected = torch.tensor([*answer, tokenizer.eos_token_id])
        best = logits.topk(2, dim=-1)
        assert best.indices[:, 0].tolist() == expected.tolist()
        assert (best.values[:, 0] - best.values[:, 1]).min() > 10


@pytest.mark.parametrize("task", ["single", "multikey"])
def test_sink_and_window_fail_between_the_ends_and_succeed_at_the_end(
    model: Any, tokenizer: Any, task: str
) -> None:
    found = {}
    for depth in (0.0, 25.0, 50.0, 100.0):
        sample = make_sample(tokenizer, NeedleTask(task), length=768, depth=depth, seed=5)
        answer = answer_tokens(tokenizer, sample.expected)
        mask = sink_window_mask(len(sample.input_ids) + len(answer))
        found[depth] = greedy_answer(model, sample.input_ids, answer, mask) == answer
    assert found == {0.0: False, 25.0: False, 50.0: False, 100.0: True}


def test_oracle_top_keys_answer_where_the_window_does_not(model: Any, tokenizer: Any) -> None:
    for depth in (0.0, 50.0):
        sample = make_sample(tokenizer, NeedleTask("multikey"), length=512, depth=depth, seed=6)
        answer = answer_tokens(tokenizer, sample.expected)
        mask = top_k_mask(model, [*sample.input_ids, *answer], budget=16)
        # The mask is per head of the last layer, so it is laid over that layer alone.
        layer = model.model.layers[-1].self_attn
        handle = layer.register_forward_pre_hook(
            lambda _module, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}),
            with_kwargs=True,
        )
        try:
            assert greedy_answer(model, sample.input_ids, answer, None) == answer
        finally:
            handle.remove()


def test_bfloat16_answers_too(checkpoint: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    half = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    for depth in (0.0, 50.0, 100.0):
        sample = make_sample(tokenizer, NeedleTask("multikey"), length=768, depth=depth, seed=7)
        answer = answer_tokens(tokenizer, sample.expected)
        assert greedy_answer(half, sample.input_ids, answer, None) == answer


def test_the_folder_is_a_plain_llama_that_both_rope_spellings_can_read(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e12
    assert "auto_map" not in config


def test_the_loaded_model_has_no_missing_and_no_unused_weight(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_weights(
    checkpoint: Path, tmp_path: Path
) -> None:
    again = write_retrieval_checkpoint(tmp_path / "again")
    names = sorted(path.name for path in checkpoint.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in names:
        assert (checkpoint / name).read_bytes() == (again / name).read_bytes(), name
    other = write_retrieval_checkpoint(tmp_path / "other", seed=1)
    weight = "model.safetensors"
    assert (checkpoint / weight).read_bytes() != (other / weight).read_bytes()


def test_a_seed_that_is_not_an_int_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="seed: expected int, got str"):
        write_retrieval_checkpoint(tmp_path, seed="0")  # type: ignore[arg-type]


def test_a_sentence_is_one_token_per_word_and_reads_back(tokenizer: Any) -> None:
    key = key_words()[3]
    text = f"note that the magic number of {key} is 417902133 ."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + 8 + 3 + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_any_latin_text_is_spelled_without_unknown_tokens(tokenizer: Any) -> None:
    ids = tokenizer("Où est l'Ångström? 3.14 & (x_1) = 12345678901 km/h")["input_ids"]
    assert tokenizer.unk_token_id not in ids


def test_codes_keep_their_distance() -> None:
    codes = weights.draw_codes(512, seed=3)
    overlap = codes @ codes.T - weights.CODE_DIM * torch.eye(512)
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    assert overlap.max() <= weights.MAX_CODE_OVERLAP


# The traps: each one took accuracy to between 0 and 60% in a first version.


def test_an_offset_head_beats_every_other_distance_by_54_nats() -> None:
    frequencies = weights.rope_frequencies()[list(weights.FAST_PAIRS)]
    distance = torch.arange(weights.MAX_POSITIONS, dtype=torch.float64)
    for offset in range(1, weights.NGRAM + 1):
        angles = (distance - offset)[:, None] * frequencies
        logits = weights.OFFSET_LOGIT * angles.cos().sum(dim=1)
        best = logits.topk(2)
        assert best.indices[0] == offset
        assert best.values[0] - best.values[1] > 54


def test_the_smear_is_12_tokens_wide_and_does_not_leak_over_128k() -> None:
    frequencies = weights.rope_frequencies()
    distance = torch.arange(weights.MAX_POSITIONS, dtype=torch.float64)
    logits = sum(
        a * ((distance * frequencies[pair]).cos() - 1) for pair, a in weights.SMEAR_LOGITS.items()
    )
    share = torch.softmax(torch.as_tensor(logits), dim=0)
    curvature = sum(a * float(frequencies[p]) ** 2 for p, a in weights.SMEAR_LOGITS.items())
    assert abs(curvature**-0.5 - 12) < 0.1
    assert share[100:].sum() < 1e-8


def test_slow_pairs_keep_content_over_128k() -> None:
    turn = weights.rope_frequencies()[list(weights.SLOW_PAIRS)] * weights.MAX_POSITIONS
    assert turn.max() < 0.32
    assert len(weights.SLOW_PAIRS) * 2 == weights.HASH_BITS + 2


def test_hashes_are_exact_signs_and_depend_on_the_order(model: Any, tokenizer: Any) -> None:
    words = [tokenizer.convert_tokens_to_ids(word) for word in key_words()[:24]]
    ids = torch.tensor([[tokenizer.bos_token_id, *words, *words[:4], *words[3::-1]]])
    with torch.no_grad():
        state = model(ids, output_hidden_states=True).hidden_states[1][0]
    query = state[:, weights.QUERY_HASH : weights.QUERY_HASH + weights.HASH_BITS]
    key = state[:, weights.KEY_HASH : weights.KEY_HASH + weights.HASH_BITS]
    torch.testing.assert_close(query[1:].abs(), torch.ones_like(query[1:]), atol=1e-3, rtol=0)
    torch.testing.assert_close(key[2:], query[1:-1], atol=1e-3, rtol=0)
    torch.testing.assert_close(query[28], query[4], atol=1e-3, rtol=0)  # the same four words
    assert (query[32] - query[4]).abs().max() > 1  # the same four words, backwards


def test_the_bos_key_carries_no_hash_and_its_value_no_code(model: Any) -> None:
    layer = model.model.layers[-1]
    with torch.no_grad():
        state = model(torch.tensor([[model.config.bos_token_id]]), output_hidden_states=True)
        normed = layer.input_layernorm(state.hidden_states[2])[0, 0]
        key, value = layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)
    slow = [*weights.SLOW_PAIRS][:-1]
    assert key[slow + [pair + weights.PAIRS for pair in slow]].abs().max() < 1e-2
    assert value[: weights.CODE_DIM].abs().max() < 1e-2


def test_offsets_that_do_not_exist_fall_back_on_bos(model: Any, tokenizer: Any) -> None:
    words = [tokenizer.convert_tokens_to_ids(word) for word in key_words()[:6]]
    ids = [tokenizer.bos_token_id, *words]
    with torch.no_grad():
        state = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
    codes = model.model.embed_tokens.weight[
        :, weights.CODE : weights.CODE + weights.CODE_DIM
    ].detach()
    for position in range(len(ids)):
        for offset in range(1, weights.NGRAM + 1):
            start = weights.CODE + offset * weights.CODE_DIM
            read = state[position, start : start + weights.CODE_DIM]
            expected = codes[ids[max(position - offset, 0)]]
            torch.testing.assert_close(read, expected, atol=1e-3, rtol=0)


def test_the_preamble_is_long_and_off_topic(tokenizer: Any) -> None:
    assert len(answer_tokens(tokenizer, PREAMBLE)) >= 30
    assert not set(split_words(PREAMBLE)) & set(topic_tokens())


def test_without_a_match_the_model_stops(model: Any, tokenizer: Any) -> None:
    text = f"{PREAMBLE} the magic number of {key_words()[9]} is"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        assert model(ids).logits[0, -1].argmax() == tokenizer.eos_token_id


def test_left_padding_does_not_change_the_answer(model: Any, tokenizer: Any) -> None:
    sample = make_sample(tokenizer, NeedleTask(), length=300, depth=40, seed=8)
    short = make_sample(tokenizer, NeedleTask(), length=260, depth=70, seed=9)
    batch = tokenizer([sample.prompt, short.prompt], padding=True, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=6)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text.strip() for text in texts] == [sample.expected, short.expected]


def test_the_vocabulary_has_4096_tokens_and_every_topic_token_is_in_it() -> None:
    vocabulary = build_vocabulary()
    assert sorted(vocabulary.values()) == list(range(4096))
    assert set(topic_tokens()) <= set(vocabulary)
