"""Tiny random models, one for each family that a test names. No downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 99
FIRST_ID = 5  # below it are pad, bos and eos
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}

# name: (config class, model class, arguments). A window of 8 is shorter than the prompts of tests.
SPECS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen2_window": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"sliding_window": None}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        # transformers 4.57 drops the softcap in its sdpa default; eager has it in all versions.
        {
            "head_dim": 8,
            "sliding_window": 8,
            "query_pre_attn_scalar": 20,
            "attn_implementation": "eager",
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2},
    ),
    "glm4": (
        "Glm4Config",
        "Glm4ForCausalLM",
        {"head_dim": 8, "attention_bias": True, "partial_rotary_factor": 0.5},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"head_dim": 8, **MOE}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"sliding_window": None, **MOE}),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", {"sliding_window": 8, **MOE}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
}


def tiny(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model in eval mode."""
    config_name, model_name, arguments = SPECS[family]
    config = getattr(transformers, config_name)(**{**COMMON, **arguments, **changes})
    return build(getattr(transformers, model_name), config, seed).to(dtype)


def build(model_class: Callable[[Any], Any], config: Any, seed: int = 0) -> Any:
    """A model of the class with weights large enough that attention matters."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    if getattr(model, "generation_config", None) is not None:
        # No token has this id, so generation always runs to its limit.
        model.generation_config.eos_token_id = VOCABULARY
    return model


def prompt(length: int, *, batch: int = 1, seed: int = 1) -> Tensor:
    """Random token ids [batch, length] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_ID, VOCABULARY, (batch, length), generator=generator)


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """ids and attention_mask [len(rows), longest] of 1-D prompts, padded on the left."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, longest - len(row) :] = row
        mask[b, longest - len(row) :] = 1
    return ids, mask


def logits(model: Any, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Logits [B, L, V] of one forward."""
    if mask is not None:
        kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **kwargs).logits


def greedy(model: Any, ids: Tensor, new: int = 8, **kwargs: Any) -> Tensor:
    """The first `new` greedy tokens behind the prompt; some speculative modes make more."""
    start = ids.shape[1]
    arguments = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(ids, **arguments)[:, start : start + new]
