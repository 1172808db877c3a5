"""Shows every attention layer's queries, keys and values to a callback, in one dense forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lowcontext.integrations._dense import dense_attention
from lowcontext.integrations._families import (
    attention_modules,
    layer_windows,
    patched_modules,
    text_model,
)
from lowcontext.integrations._masks import mask_function
from lowcontext.methods import LayerContext

_NAME = "lowcontext_probe"
_ATTRIBUTE = "_lowcontext_probe"

# Called with (q [1, Hq, N, D], k [1, Hkv, N, D], v, layer, sliding window or 0).
Callback = Callable[[Tensor, Tensor, Tensor, LayerContext, int], None]


class Enough(Exception):
    """Raised by a callback that needs no further layer."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    callback, num_layers, windows = module.__dict__[_ATTRIBUTE]
    index = int(module.layer_idx)  # type: ignore[arg-type]
    window = windows.get(index, 0)
    softcap = kwargs.get("softcap")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    callback(query, key, value, LayerContext(index, num_layers, scale, softcap), window)
    out = dense_attention(query, key, value, scale=scaling, softcap=softcap, window=window)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, mask_function)


def probe(model: nn.Module, ids: Tensor, callback: Callback) -> None:
    """Runs the tokens through the model, dense, and calls `callback` at every attention layer.

    Args:
        model: an unpatched transformers model; restored afterwards.
        ids: int [1, N], without padding.
        callback: see `Callback`; it may raise `Enough` to stop.

    Raises:
        ValueError: the model is patched.
        NotImplementedError: the model has attention that the ops cannot compute.
    """
    if patched_modules(model):
        raise ValueError(
            "model: expected an unpatched model, got a patched one; unpatch_model(model) first"
        )
    target = text_model(model)
    modules = attention_modules(target)
    windows = layer_windows(target.config)
    previous, training = target.config._attn_implementation, target.training
    target.set_attn_implementation(_NAME)
    try:
        for module in modules:
            module.__dict__[_ATTRIBUTE] = callback, target.config.num_hidden_layers, windows
        target.eval()
        with torch.no_grad():
            # The tower without its head: logits of a long prompt would not fit.
            target.base_model(input_ids=ids, use_cache=False)
    except Enough:
        pass
    finally:
        target.train(training)
        for module in modules:
            module.__dict__.pop(_ATTRIBUTE, None)
        target.set_attn_implementation(previous)
