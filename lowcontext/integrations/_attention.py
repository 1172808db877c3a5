"""What transformers calls: the attention function and the hooks before it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer, StaticLayer

from lowcontext.integrations._dense import (
    dense_attention,
    masked_attention,
    padded_attention,
)
from lowcontext.integrations._families import ATTRIBUTE, LayerSettings
from lowcontext.integrations._masks import Padding
from lowcontext.integrations.cache import Row, SharedMemory, SparseCacheLayer, in_autocast
from lowcontext.methods import LayerContext
from lowcontext.methods.base import Moved, is_decoding
from lowcontext.ops import attention, sparse_attention

NAME = "lowcontext"
_LAYER_ARGUMENT = "lowcontext_layer"
_UNSUPPORTED = {
    "s_aux": "learned attention sinks",
    "position_bias": "a position bias",
    "cu_seq_lens_q": "packed sequences",
    "cache": "continuous batching",
}


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Padding | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one patched module, in the form of transformers' AttentionInterface.

    Args:
        module: the attention module; carries its `LayerSettings`.
        query: [B, Hq, Lq, D]; key: [B, Hkv, Lk, D]; value: [B, Hkv, Lk, Dv]; keys and values are
            those of the cache, new tokens included.
        attention_mask: what `mask_function` returned.
        dropout: probability of dropping an attention weight.
        scaling: factor of the logits.
        kwargs: what the family passes on; its `sliding_window` is ignored for the configuration's.

    Returns:
        [B, Lq, Hq, Dv], contiguous, and None for the attention weights.

    Raises:
        NotImplementedError: something that the ops cannot honour; the message says what to do.
    """
    settings: LayerSettings | None = module.__dict__.get(ATTRIBUTE)
    if settings is None:
        return _unsettled(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{name}: expected None, got {_UNSUPPORTED[name]}, which the ops cannot honour; "
                "unpatch_model(model) for this use"
            )
    if kwargs.get("output_attentions"):
        refuse_output_attentions()
    if kwargs.get("is_causal") is False:
        raise NotImplementedError(
            "is_causal: expected True, got False; unpatch_model(model) for bidirectional attention"
        )
    query, key = in_autocast(query, value), in_autocast(key, value)
    call = _Call(
        settings, dropout, scaling, kwargs.get("softcap"), kwargs.get(_LAYER_ARGUMENT), module
    )
    if attention_mask is None:
        out = call.run(query, key, value, None)
    elif isinstance(attention_mask, Padding):
        out = _padded(call, query, key, value, attention_mask)
    else:
        out = _compiled_padding(call, query, key, value, attention_mask)
    return out.contiguous(), None


def cache_hook(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: gives the cache a `SparseCacheLayer` and hands it to the function."""
    settings: LayerSettings = module.__dict__[ATTRIBUTE]
    cache = kwargs.get(settings.cache_name)
    if cache is None:
        if len(args) <= settings.cache_position:
            return None
        cache = args[settings.cache_position]
        if cache is None:
            return None
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    index = settings.layer_idx
    layer = layers[index] if index < len(layers) else None
    if type(layer) is not SparseCacheLayer:
        layer = _install(cache, index)
        if layer is None:
            return None
    kwargs[_LAYER_ARGUMENT] = layer
    return args, kwargs


def model_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the model: refuses what never reaches the attention function."""
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        refuse_output_attentions()


def refuse_output_attentions() -> None:
    """Raises the error for `output_attentions=True`."""
    raise NotImplementedError(
        "output_attentions: expected False, got True; attention weights are never formed. "
        'unpatch_model(model) and model.set_attn_implementation("eager") to see them'
    )


class _Call:
    """One call of the attention function: what is common to the rows of its batch."""

    __slots__ = ("dropout", "layer", "module", "scale", "settings", "softcap")

    def __init__(
        self,
        settings: LayerSettings,
        dropout: float,
        scale: float | None,
        softcap: float | None,
        layer: SparseCacheLayer | None,
        module: nn.Module,
    ) -> None:
        self.settings = settings
        self.dropout = dropout
        self.scale = scale
        self.softcap = softcap
        self.layer = layer
        self.module = module

    def run(self, q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        """Attention of rows without padding: [B, Lq, Hq, Dv]."""
        settings = self.settings
        if settings.dense or q.shape[3] != v.shape[3]:
            if not settings.dense:
                _warn_latent(module=self.module)
            out = dense_attention(
                q,
                k,
                v,
                scale=self.scale,
                softcap=self.softcap,
                window=settings.window,
                dropout=self.dropout,
            )
            if settings.density is not None and not settings.window:
                self._count(None, q, k)
            return out.transpose(1, 2)
        self._refuse_training(q, k, v)
        return self._sparse(q, k, v, self._context(q, row))

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, context: LayerContext) -> Tensor:
        Lq, Lk = q.shape[2], k.shape[2]
        out = None
        for row0, row1, index in self.settings.method.parts(q, k, context):
            end = Lk - Lq + row1
            whole = row0 == 0 and row1 == Lq
            q_part = q if whole else q[:, :, row0:row1]
            k_part, v_part = (k, v) if row1 == Lq else (k[:, :, :end], v[:, :, :end])
            if index is None:
                part = dense_attention(
                    q_part, k_part, v_part, scale=self.scale, softcap=self.softcap
                )
            elif isinstance(index, Moved):
                part = attention(  # type: ignore[assignment]
                    q_part,
                    *index.gather(k_part, v_part),
                    scale=self.scale,
                    softcap=self.softcap,
                    kv_start=index.first,
                )
            else:
                part = sparse_attention(  # type: ignore[assignment]
                    q_part, k_part, v_part, index, scale=self.scale, softcap=self.softcap
                )
            if self.settings.density is not None:
                self._count(index, q_part, k_part, decoding=is_decoding(Lq, Lk))
            if whole:
                return part.transpose(1, 2)
            if out is None:
                out = q.new_empty(q.shape[0], Lq, q.shape[1], v.shape[3])
            out[:, row0:row1] = part.transpose(1, 2)
        if out is None:
            raise RuntimeError(f"{self.settings.method}: expected parts for {Lq} queries, got none")
        return out

    def _context(self, q: Tensor, row: Row) -> LayerContext:
        settings = self.settings
        scale = q.shape[3] ** -0.5 if self.scale is None else self.scale
        if self.layer is None:
            context = LayerContext(settings.layer_idx, settings.num_layers, scale, self.softcap)
        else:
            context = self.layer.context(
                settings.method, row, settings.layer_idx, settings.num_layers, scale, self.softcap
            )
        context.rotary = None if settings.rotary is None else settings.rotary.facts()
        context.observe = settings.observe
        context.reduce = settings.reduce
        return context

    def _refuse_training(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if grad or self.module.training:
            raise NotImplementedError(
                f"{self.settings.method}: sparse attention is for inference, got "
                f"{'a model in training mode' if self.module.training else 'inputs with gradients'}"
                "; call model.eval() and run under torch.no_grad(), or unpatch_model(model) to "
                "train"
            )

    def _count(self, index: Any, q: Tensor, k: Tensor, decoding: bool | None = None) -> None:
        if self.settings.density is None:
            return
        Lq, Lk = q.shape[2], k.shape[2]
        decoding = is_decoding(Lq, Lk) if decoding is None else decoding
        phase = "decode" if decoding else "prefill"
        self.settings.density.add(phase, index, Lq, Lk, q.shape[0] * q.shape[1])


def _warn_latent(module: nn.Module) -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"{type(module).__name__} has keys and values of different sizes (multi-head latent "
            "attention); it stays dense and exact",
            UserWarning,
            stacklevel=3,
        )


def _padded(call: _Call, q: Tensor, k: Tensor, v: Tensor, padding: Padding) -> Tensor:
    """Row by row on the valid span, so that a padded row is computed as the same row alone."""
    B, Hq, Lq, _ = q.shape
    first = k.shape[2] - Lq
    if (len(padding.spans), padding.length) != (B, k.shape[2]):
        raise ValueError(
            f"attention_mask: expected {B} rows of {k.shape[2]} keys as in the input, got "
            f"{len(padding.spans)} rows of {padding.length}"
        )
    if call.settings.dense and call.settings.density is None and padding.kv_start is not None:
        together = padded_attention(
            q, k, v, padding.kv_start, call.scale, call.softcap, call.settings.window
        )
        if together is not None:
            return together.transpose(1, 2)
    out = q.new_zeros(B, Lq, Hq, v.shape[3])
    for b, (start, end) in enumerate(padding.spans):
        row0, row1 = max(start - first, 0), end - first
        if row0 < row1:
            rows = slice(b, b + 1)
            out[rows, row0:row1] = call.run(
                q[rows, :, row0:row1], k[rows, :, start:end], v[rows, :, start:end], (b, start)
            )
    return out


def _compiled_padding(call: _Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    settings = call.settings
    if mask.dim() != 2:
        raise NotImplementedError(
            f"attention_mask: expected [B, L] with 0 for padding, got {list(mask.shape)}; custom "
            "4-D masks need unpatch_model(model)"
        )
    if not settings.dense or call.softcap or call.dropout:
        raise NotImplementedError(
            f"{settings.method}: under torch.compile the padding cannot be read; leave out "
            "attention_mask and give prompts of one length, or do not compile"
        )
    return masked_attention(q, k, v, mask, call.scale, settings.window).transpose(1, 2)


def _install(cache: Any, index: int) -> SparseCacheLayer | None:
    """Puts a SparseCacheLayer at `index` in the place of a plain dynamic layer, or leaves it."""
    layers = cache.layers
    make = getattr(cache, "layer_class_to_replicate", None)
    if make is DynamicLayer:
        while len(layers) <= index:
            layers.append(make())
    if index >= len(layers):
        return None
    layer = layers[index]
    if isinstance(layer, StaticLayer) or getattr(layer, "is_compileable", False):
        raise NotImplementedError(
            f"past_key_values: expected a DynamicCache, got a cache of {type(layer).__name__}, "
            "whose buffer is longer than the sequence; leave cache_implementation out"
        )
    if type(layer) is not DynamicLayer:
        return None
    shared = next((x.shared for x in layers if type(x) is SparseCacheLayer), None)
    layers[index] = SparseCacheLayer.adopt(layer, SharedMemory() if shared is None else shared)
    return layers[index]


def _unsettled(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """A module that was not patched: bidirectional ones run as before, the others are an error."""
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True))
    if not causal and not isinstance(mask, Padding):
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, q, k, v, mask, dropout=dropout, scaling=scaling, **kwargs)
    raise RuntimeError(
        f"{type(module).__name__}: expected a module patched by lowcontext.patch_model, got one "
        'whose configuration says attn_implementation="lowcontext"; call patch_model(model), or, '
        "if the model shares its config object with a patched model, give it a copy of its own"
    )
