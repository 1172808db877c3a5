"""Which modules of a model are patched, with which window, and which models are refused."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lowcontext.integrations._parallel import RankSum
from lowcontext.integrations._rotary import RotarySource, rotary_source
from lowcontext.methods import Method, method_class

if TYPE_CHECKING:
    from lowcontext.integrations._density import Density

ATTRIBUTE = "_lowcontext"
_CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")


@dataclass
class LayerSettings:
    """What a patched attention module carries; plain data, so that the model copies and pickles.

    Args:
        method: decides what this layer reads.
        layer_idx: index of the layer in the model and in its cache.
        num_layers: layers of the model.
        window: sliding window in tokens, 0 for full attention.
        dense: the method always reads everything, or the layer has a window.
        cache_name: name of the module's argument that holds the cache.
        cache_position: position of that argument in the module's forward.
        previous: attention implementation to restore.
        density: counts what is read, while someone measures.
        rotary: where the frequencies are, for methods that move keys.
        observe: takes figures of selections, while someone measures.
        reduce: sums over the ranks that hold the other heads, under tensor parallelism.
    """

    method: Method
    layer_idx: int
    num_layers: int
    window: int
    dense: bool
    cache_name: str
    cache_position: int
    previous: str
    density: Density | None = None
    rotary: RotarySource | None = None
    observe: Callable[[dict[str, Tensor]], None] | None = None
    reduce: RankSum | None = None


def text_model(model: nn.Module) -> PreTrainedModel:
    """The outermost transformers model that runs the text tower, through PEFT or other wrappers.

    Raises:
        TypeError: there is no transformers model inside.
    """
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    if not models:
        raise TypeError(
            f"model: expected a transformers PreTrainedModel, got {type(model).__name__}"
        )
    config = models[0].config.get_text_config(decoder=True)
    for candidate in models:
        if candidate.config is config:
            return candidate
    # A text tower that was built from a copy of its configuration.
    for candidate in models:
        if type(candidate.config) is type(config):
            return candidate
    raise NotImplementedError(
        f"model: found no text tower with a {type(config).__name__} in {type(models[0]).__name__}; "
        "pass the language model itself"
    )


def patched_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of `model` that carry settings."""
    return [module for module in model.modules() if ATTRIBUTE in module.__dict__]


@contextmanager
def reporting(model: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Gives every settings of a patched model `value` as its field `name`, for a `with` block.

    Raises:
        ValueError: the model is not patched.
    """
    settings = [module.__dict__[ATTRIBUTE] for module in patched_modules(model)]
    if not settings:
        raise ValueError("model: expected a model patched by patch_model, got an unpatched one")
    before = [getattr(setting, name) for setting in settings]
    for setting in settings:
        setattr(setting, name, value)
    try:
        yield
    finally:
        for setting, previous in zip(settings, before, strict=True):
            setattr(setting, name, previous)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The causal self-attention modules of a text tower, in order.

    Raises:
        NotImplementedError: there is none, or the family has something that the ops cannot honour.
    """
    _refuse_config(model.config)
    _refuse_unused_window(model)
    found = []
    for module in model.modules():
        name = type(module).__name__
        if not isinstance(getattr(module, "layer_idx", None), int):
            continue
        if "attention" not in name.lower() and "MLA" not in name:
            continue
        parameters = inspect.signature(type(module).forward).parameters
        if not any(cache in parameters for cache in _CACHE_NAMES):
            continue
        if getattr(module, "is_causal", True) is False:
            continue
        _refuse_module(module)
        found.append(module)
    if not found:
        raise NotImplementedError(
            f"model: found no causal self-attention module in {type(model).__name__}; "
            "only decoders that use the AttentionInterface of transformers can be patched"
        )
    return found


def make_settings(
    modules: list[nn.Module], model: PreTrainedModel, method: Method, reduce: RankSum | None
) -> list[LayerSettings]:
    """The settings of each attention module of `model`."""
    windows = layer_windows(model.config)
    settings = [_settings_of(module, model, method, windows, reduce) for module in modules]
    full = [s.layer_idx for s in settings if not s.window]
    if any(layer >= method.dense_layers for layer in full):
        method.check_layers(full)
    elif not isinstance(method, method_class("dense")):
        warnings.warn(
            f"every layer of {type(model).__name__} has a sliding window or is one of the first "
            f"dense_layers={method.dense_layers}, and stays dense: {method} changes nothing",
            UserWarning,
            stacklevel=4,
        )
    return settings


def _settings_of(
    module: nn.Module,
    model: PreTrainedModel,
    method: Method,
    windows: dict[int, int],
    reduce: RankSum | None,
) -> LayerSettings:
    config = model.config
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]  # without self
    cache_name = next(name for name in _CACHE_NAMES if name in parameters)
    layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
    window = windows.get(layer_idx, 0)
    return LayerSettings(
        method=method,
        layer_idx=layer_idx,
        num_layers=int(config.num_hidden_layers),
        window=window,
        dense=bool(window) or isinstance(method, method_class("dense")),
        cache_name=cache_name,
        cache_position=parameters.index(cache_name),
        previous=config._attn_implementation,
        rotary=rotary_source(model, module) if method.moves_keys and not window else None,
        reduce=reduce,
    )


def layer_windows(config: Any) -> dict[int, int]:
    """Sliding window of each layer that has one, from the configuration.

    Read from the cache that transformers itself builds for this configuration: some families
    (PhiMoE) mask with a window but do not tell the attention function.
    """
    windows = {}
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if getattr(layer, "is_sliding", False):
            windows[index] = int(layer.sliding_window)  # type: ignore[union-attr]
    # Layers that read the keys of another layer have no cache layer of their own.
    for index, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if "sliding" in kind and getattr(config, "sliding_window", None):
            windows.setdefault(index, int(config.sliding_window))
    return windows


def _refuse_config(config: Any) -> None:
    kind = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"model: {kind} is an encoder-decoder model; only decoder-only models can be patched"
        )
    if getattr(config, "is_causal", True) is False:
        raise NotImplementedError(
            f"model: {kind} is configured with is_causal=False; only causal attention can be sparse"
        )
    types = getattr(config, "layer_types", None)
    chunked = (
        "chunked_attention" in types if types else getattr(config, "attention_chunk_size", None)
    )
    if chunked:
        raise NotImplementedError(
            f"model: {kind} has chunked-attention layers, which the ops cannot mask; "
            "use the model unpatched"
        )
    if getattr(config, "index_topk", None) is not None:
        raise NotImplementedError(
            f"model: {kind} selects keys with an indexer of its own; use the model unpatched"
        )


def _refuse_unused_window(model: PreTrainedModel) -> None:
    """Raises where the configuration has a window that the model's masks do not.

    Checkpoints converted to another family keep such leftovers. transformers then reads a prompt in
    full and cuts the cache of the steps behind it: there is no window to be exact about.
    """
    window = max(layer_windows(model.config).values(), default=0)
    families = {
        c.__module__
        for m in model.modules()
        if isinstance(m, PreTrainedModel)
        for c in type(m).__mro__
    }
    if window and not any(
        hasattr(sys.modules.get(name), "create_sliding_window_causal_mask") for name in families
    ):
        raise NotImplementedError(
            f"model: config.sliding_window={window}, but {type(model).__name__} never masks with a "
            "window; set model.config.sliding_window = None, and its cache will not be cut either"
        )


def _refuse_module(module: nn.Module) -> None:
    name = type(module).__name__
    if "CrossAttention" in name:
        raise NotImplementedError(
            f"model: {name} attends to another sequence; models with cross-attention layers "
            "cannot be patched"
        )
    for sinks in ("sinks", "attention_sink_bias"):
        if getattr(module, sinks, None) is not None:
            raise NotImplementedError(
                f"model: {name} has learned attention sinks, which the ops cannot add to the "
                "softmax; use the model unpatched"
            )
