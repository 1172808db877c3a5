"""What cannot be honoured is refused with an error that says what to do, never swallowed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from tiny_models import COMMON, MOE, build, greedy, left_padded, logits, prompt, tiny
from transformers import StaticCache

import lowcontext
from lowcontext.integrations import _verify

SPARSE = {"sink": 2, "window": 8, "block_q": 8, "block_k": 8}


@pytest.fixture
def patched() -> Any:
    return lowcontext.patch_model(tiny("llama"), "streaming_llm", **SPARSE)


# -- at the patch ------------------------------------------------------------------------------


def expect_refused(model: Any, match: str) -> None:
    implementation = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=match):
        lowcontext.patch_model(model, "streaming_llm")
    assert model.config._attn_implementation == implementation
    assert not [m for m in model.modules() if m._forward_pre_hooks]


def test_learned_attention_sinks_are_refused() -> None:
    config = transformers.GptOssConfig(**{**COMMON, **MOE, "head_dim": 8, "sliding_window": 8})
    expect_refused(build(transformers.GptOssForCausalLM, config), "sinks")


def test_chunked_attention_is_refused() -> None:
    config = transformers.Llama4TextConfig(
        **{**COMMON, **MOE, "head_dim": 8, "attention_chunk_size": 8, "intermediate_size_mlp": 32}
    )
    expect_refused(build(transformers.Llama4ForCausalLM, config), "chunked")


def test_an_encoder_decoder_model_is_refused() -> None:
    config = transformers.BartConfig(
        vocab_size=99,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    expect_refused(build(transformers.BartForConditionalGeneration, config), "encoder-decoder")


def test_a_bidirectional_encoder_is_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    expect_refused(
        build(transformers.BertModel, config), "no causal self-attention|AttentionInterface"
    )


def test_a_model_with_an_indexer_of_its_own_is_refused() -> None:
    model = tiny("llama")
    model.config.index_topk = 4
    expect_refused(model, "indexer")


def test_bidirectional_attention_is_refused(patched: Any) -> None:
    model = tiny("llama")
    model.config.is_causal = False
    expect_refused(model, "is_causal")
    with pytest.raises(NotImplementedError, match="is_causal"):
        logits(patched, prompt(20), is_causal=False)


def test_a_window_that_the_model_does_not_mask_with_is_refused() -> None:
    """As left in the configuration of a Mistral checkpoint that was converted to Llama."""
    model = tiny("llama", sliding_window=8)
    whole = logits(tiny("llama"), prompt(40))
    torch.testing.assert_close(logits(model, prompt(40)), whole)
    expect_refused(model, "never masks with a window")
    model.config.sliding_window = None
    lowcontext.patch_model(model, "block_topk", budget=4096)
    torch.testing.assert_close(logits(model, prompt(40)), whole)
    assert torch.equal(greedy(model, prompt(40)), greedy(tiny("llama"), prompt(40)))


def test_something_that_is_not_a_transformers_model_is_refused() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel"):
        lowcontext.patch_model(torch.nn.Linear(2, 2), "dense")


def test_a_config_shared_with_a_patched_model_is_refused() -> None:
    first = tiny("llama")
    second = transformers.LlamaForCausalLM(first.config).eval()
    second.config = first.config
    lowcontext.patch_model(first, "dense")
    if second.model.layers[0].self_attn.config is first.config:
        with pytest.raises(RuntimeError, match="shares its config"):
            logits(second, prompt(10))
    with pytest.raises(ValueError, match="shares it"):
        lowcontext.patch_model(second, "dense")


def test_a_model_loaded_with_the_implementation_but_not_patched_says_so() -> None:
    model = tiny("llama")
    model.set_attn_implementation("lowcontext")
    with pytest.raises(RuntimeError, match="patch_model"):
        logits(model, prompt(10))


# -- at the forward ----------------------------------------------------------------------------


def test_output_attentions_is_refused(patched: Any) -> None:
    with pytest.raises(NotImplementedError, match="output_attentions"):
        logits(patched, prompt(20), output_attentions=True)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        greedy(patched, prompt(20), output_attentions=True, return_dict_in_generate=True)


def test_a_custom_4d_mask_is_refused(patched: Any) -> None:
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    with pytest.raises(NotImplementedError, match="4-D"), torch.no_grad():
        patched(input_ids=prompt(20), attention_mask=mask)


def test_packed_sequences_are_refused(patched: Any) -> None:
    """Without a cache; with one, transformers itself does not look for restarting positions."""
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    with pytest.raises(NotImplementedError, match="packed"), torch.no_grad():
        patched(input_ids=prompt(20), position_ids=positions, use_cache=False)


def test_packed_sequences_by_lengths_are_refused(patched: Any) -> None:
    lengths = torch.tensor([0, 12, 20], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="packed"), torch.no_grad():
        patched(
            input_ids=prompt(20),
            cu_seq_lens_q=lengths,
            cu_seq_lens_k=lengths,
            max_length_q=12,
            max_length_k=12,
        )


def test_padding_inside_a_row_is_refused(patched: Any) -> None:
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[:, 7] = 0
    with pytest.raises(NotImplementedError, match="one run"):
        logits(patched, prompt(20), mask)


def test_generating_behind_right_padding_is_refused(patched: Any) -> None:
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    with pytest.raises(NotImplementedError, match="pad on the left"):
        greedy(patched, prompt(20, batch=2), attention_mask=mask)


def test_a_right_padded_forward_equals_each_row_alone(patched: Any) -> None:
    ids = prompt(40, batch=2)
    mask = torch.ones_like(ids)
    mask[1, 27:] = 0
    got = logits(patched, ids, mask)
    torch.testing.assert_close(got[0], logits(patched, ids[:1])[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(got[1, :27], logits(patched, ids[1:, :27])[0], rtol=0, atol=2e-6)


def test_a_row_of_padding_alone_is_harmless(patched: Any) -> None:
    ids = prompt(20, batch=2)
    mask = torch.ones_like(ids)
    mask[1] = 0
    got = logits(patched, ids, mask)
    assert got.isfinite().all()
    torch.testing.assert_close(got[0], logits(patched, ids[:1])[0], rtol=0, atol=2e-6)


def test_a_mask_shorter_than_the_cache_is_refused(patched: Any) -> None:
    with torch.no_grad():
        cache = patched(input_ids=prompt(20), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="expected 21 columns"):
            patched(
                input_ids=prompt(1),
                past_key_values=cache,
                attention_mask=torch.ones(1, 1, dtype=torch.long),
            )


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_static_cache_is_refused(family: str) -> None:
    model = lowcontext.patch_model(tiny(family), "dense")
    with pytest.raises(NotImplementedError, match="cache"):
        greedy(model, prompt(20), cache_implementation="static")
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(NotImplementedError, match="cache"), torch.no_grad():
        model(input_ids=prompt(20), past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.filterwarnings("ignore:every layer")
def test_a_static_cache_with_padding_is_refused(family: str) -> None:
    model = lowcontext.patch_model(tiny(family), "streaming_llm", **SPARSE)
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    with pytest.raises((NotImplementedError, ValueError), match="leave cache_implementation out"):
        greedy(model, ids, attention_mask=mask, cache_implementation="static")


@pytest.mark.parametrize(("family", "dense"), [("mistral", 0), ("llama", 2), ("gemma2", 2)])
def test_a_model_that_stays_dense_is_warned_of(family: str, dense: int) -> None:
    with pytest.warns(UserWarning, match=f"dense_layers={dense}, and stays dense: quest"):
        lowcontext.patch_model(tiny(family), "quest", dense_layers=dense)


def test_a_method_that_does_not_fit_the_layers_leaves_the_model_as_it_was() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="select_layers: expected layers with full attention"):
        lowcontext.patch_model(model, decode="tidaldecode")
    lowcontext.patch_model(model, decode="tidaldecode", select_layers=[0])


def test_generating_on_after_a_row_ended_early_says_what_to_do(patched: Any) -> None:
    ids = prompt(20, batch=2)
    first = greedy(patched, ids, new=2)
    out = patched.generate(
        ids,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=int(first[1, 1]),
        return_dict_in_generate=True,
    )
    assert (out.sequences[1, 23:] == 0).all()
    longer = torch.cat([out.sequences, prompt(4, batch=2, seed=3)], dim=1)
    with pytest.raises(NotImplementedError, match="without past_key_values"):
        greedy(patched, longer, past_key_values=out.past_key_values)


def test_training_a_sparse_model_is_refused_and_works_once_unpatched(patched: Any) -> None:
    ids = prompt(20)
    with pytest.raises(NotImplementedError, match="no_grad"):
        patched(input_ids=ids)  # gradients are required
    patched.train()
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, pytest.raises(NotImplementedError, match=r"eval\(\)"):
            patched(input_ids=ids, labels=ids)
    lowcontext.unpatch_model(patched)
    patched(input_ids=ids, labels=ids).loss.backward()
    assert patched.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_dropout_on_a_window_is_refused() -> None:
    model = lowcontext.patch_model(tiny("mistral", attention_dropout=0.5), "dense").train()
    with pytest.raises(NotImplementedError, match="dropout"):
        model(input_ids=prompt(20))


def test_attention_kwargs_that_change_the_result_are_refused(patched: Any) -> None:
    module = patched.model.layers[0].self_attn
    function = transformers.AttentionInterface()["lowcontext"]
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    for name in ("s_aux", "position_bias"):
        with pytest.raises(NotImplementedError, match=name):
            function(module, q, k, k, None, **{name: torch.zeros(4)})


def test_keys_and_values_of_different_sizes_stay_dense() -> None:
    config = transformers.DeepseekV3Config(
        **{
            **COMMON,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 2,
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 1,
        }
    )
    model = build(transformers.DeepseekV3ForCausalLM, config)
    ids = prompt(40)
    before, tokens = logits(model, ids), greedy(model, ids)
    lowcontext.patch_model(model, "streaming_llm", **SPARSE)
    with pytest.warns(UserWarning, match="stays dense"):
        torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-5)
    assert torch.equal(greedy(model, ids), tokens)


def test_a_method_that_changes_nothing_says_so() -> None:
    with pytest.warns(UserWarning, match="sliding window"):
        lowcontext.patch_model(tiny("mistral"), "streaming_llm", **SPARSE)


# -- verify ------------------------------------------------------------------------------------


def test_verify_names_the_difference_and_leaves_the_model_unpatched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = tiny("llama"), prompt(20)
    before = logits(model, ids)
    # A family whose attention scales its logits after the call to the interface.
    from lowcontext.integrations import _attention

    run = _attention._Call.run
    monkeypatch.setattr(_attention._Call, "run", lambda self, *args: 1.001 * run(self, *args))
    with pytest.raises(RuntimeError, match=r"difference of .* at position"):
        lowcontext.patch_model(model, "streaming_llm", verify=True)
    monkeypatch.undo()
    assert torch.equal(logits(model, ids), before)
    with pytest.raises(ValueError, match="unpatched"):
        lowcontext.unpatch_model(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_verify_accepts_rounding_and_rejects_more(dtype: torch.dtype) -> None:
    reference = torch.linspace(-4, 4, 300).view(1, 50, 6).to(dtype)
    tolerance = _verify._TOLERANCE[dtype]
    _verify.compare(reference, reference)
    _verify.compare(reference, reference.float() + 4 * 0.9 * tolerance)
    for wrong in (reference.float() + 4 * 1.2 * tolerance, reference.float() * torch.nan):
        with pytest.raises(RuntimeError, match="verify"):
            _verify.compare(reference, wrong)


def test_verify_keeps_the_mode_of_the_model() -> None:
    for training in (True, False):
        model = tiny("llama").train(training)
        lowcontext.patch_model(model, "dense", verify=True)
        assert model.training is training


# -- errors of patch_model itself --------------------------------------------------------------


def test_unknown_methods_and_options_leave_the_model_unpatched() -> None:
    model = tiny("llama")
    for error, arguments in (
        (ValueError, {"method": "no_such_method"}),
        (TypeError, {"method": "quest", "no_such_option": 1}),
        (TypeError, {}),
    ):
        with pytest.raises(error):
            lowcontext.patch_model(model, **arguments)
    assert model.config._attn_implementation == "sdpa"
    copy.deepcopy(model)


def test_two_rows_and_a_mask_of_three_are_refused(patched: Any) -> None:
    ids, _ = left_padded([prompt(20)[0], prompt(10)[0]])
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[:, 0] = 0
    with pytest.raises(ValueError, match="expected 2 rows of 20 keys"), torch.no_grad():
        patched(input_ids=ids, attention_mask=mask)
