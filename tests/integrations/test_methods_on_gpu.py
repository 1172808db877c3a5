"""Every registered method behind patch_model on a CUDA device; skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budgets import COVERING, options
from test_every_method import METHODS, SMALL
from tiny_models import greedy, logits, prompt, tiny

import lowcontext
from lowcontext.ops import _dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = "cuda"
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def model(dtype: torch.dtype) -> Any:
    """A Llama with a head_dim of 64 on the device."""
    return tiny("llama", dtype=dtype, **SIZES).to(GPU)


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_and_decode_steps_equal_those_of_the_reference(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(300).to(GPU)
    patched = lowcontext.patch_model(model(torch.float32), method, **options(method, SMALL))
    ours, tokens = logits(patched, ids), greedy(patched, ids, new=8)
    choose, select = _dispatch.choose, _dispatch.select
    monkeypatch.setattr(
        _dispatch, "choose", lambda family, op, name, like: choose(family, op, "reference", like)
    )
    monkeypatch.setattr(
        _dispatch, "select", lambda op, name, *inputs: select(op, "reference", *inputs)
    )
    plain = logits(patched, ids)
    assert (ours - plain).abs().max() <= 1e-4 * plain.abs().max()
    assert torch.equal(tokens, greedy(patched, ids, new=8))


@pytest.mark.parametrize("method", METHODS)
def test_a_covering_budget_in_bf16_is_as_close_to_fp32_as_the_unpatched_model(method: str) -> None:
    ids = prompt(300).to(GPU)
    exact = logits(model(torch.float32), ids)
    plain = logits(model(torch.bfloat16), ids).float()
    patched = lowcontext.patch_model(model(torch.bfloat16), method, **options(method, COVERING))
    got = logits(patched, ids).float()
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-3
