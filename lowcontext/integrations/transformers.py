"""patch_model and its undoing: one attention function, one mask function, one hook per layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from lowcontext.integrations import _verify
from lowcontext.integrations._attention import (
    NAME,
    attention_function,
    cache_hook,
    model_hook,
)
from lowcontext.integrations._families import (
    ATTRIBUTE,
    attention_modules,
    make_settings,
    patched_modules,
    text_model,
)
from lowcontext.integrations._masks import mask_function
from lowcontext.integrations._parallel import rank_sum
from lowcontext.methods import Method, combine

ModelT = TypeVar("ModelT", bound=nn.Module)

AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function)


def patch_model(
    model: ModelT,
    method: str | Method | None = None,
    *,
    prefill: str | Method | None = None,
    decode: str | Method | None = None,
    config: str | Path | None = None,
    verify: bool = False,
    **options: Any,
) -> ModelT:
    """Makes a transformers decoder read what a sparse-attention method selects, in place.

    Works on every decoder-only model that uses transformers' AttentionInterface; of a
    vision-language model only the text tower is patched. Full-attention layers follow the method;
    sliding-window layers stay dense and exact. A left-padded batch gives what each row gives alone.
    Inference only: a sparse method raises in training mode and when gradients are required.

    Args:
        model: the model, wrapped by PEFT or not.
        method: a name from `available_methods()` or a Method, for both phases.
        prefill: method for prompts; with `decode`, in place of `method`. A phase left out is dense.
        decode: method for decode steps.
        config: JSON or YAML file with the method's hyper-parameters.
        verify: first compare a short random prompt and two decode steps with the unpatched model,
            with an index that lists every key. The largest difference may be 1e-4 of the largest
            output in fp32 and fp64, 1e-2 in fp16, 4e-2 in bf16.
        options: the method's hyper-parameters.

    Returns:
        The same model.

    Raises:
        TypeError: not a transformers model, or options that fit no method.
        ValueError: the model is patched already, or shares its config with a patched one; or a
            hyper-parameter names layers that the model does not have.
        NotImplementedError: the model has something the ops cannot honour; nothing was changed.
        RuntimeError: verification failed; the model is left unpatched.

    Example:
        >>> import lowcontext, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
        >>> config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
        >>> model = LlamaForCausalLM(config).eval()
        >>> model = lowcontext.patch_model(model, "streaming_llm", window=512)
        >>> model = lowcontext.unpatch_model(model)
        >>> model = lowcontext.patch_model(model, decode="quest")
        >>> ids = torch.ones(1, 4, dtype=torch.long)
        >>> model.generate(ids, max_new_tokens=2, min_new_tokens=2).shape
        torch.Size([1, 6])
    """
    chosen = combine(method, prefill=prefill, decode=decode, config=config, **options)
    target = text_model(model)
    if patched_modules(model):
        raise ValueError(
            "model: expected an unpatched model, got a patched one; unpatch_model(model) first"
        )
    if target.config._attn_implementation == NAME:
        raise ValueError(
            "model: expected a config of its own, got one whose attention implementation is "
            f"already {NAME!r}: another patched model shares it (give each model "
            "copy.deepcopy(config)), or the model was loaded with it (load it with another "
            "attn_implementation)"
        )
    modules = attention_modules(target)
    if verify:
        reference = _verify.outputs(target)
        _attach(model, target, modules, _verify.Everything())
        try:
            _verify.compare(reference, _verify.outputs(target))
        finally:
            unpatch_model(model)
    _attach(model, target, modules, chosen)
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Restores a patched model exactly: its outputs are again bit for bit those from before.

    Args:
        model: a patched model, or a wrapper or copy of one.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not patched.
    """
    modules = patched_modules(model)
    if not modules:
        raise ValueError("model: expected a model patched by patch_model, got an unpatched one")
    target = text_model(model)
    previous = modules[0].__dict__[ATTRIBUTE].previous
    _detach(model)
    target.set_attn_implementation(previous)
    return model


@contextmanager
def patched(
    model: ModelT, method: str | Method | None = None, **arguments: Any
) -> Iterator[ModelT]:
    """`patch_model` for the length of a `with` block; the arguments are the same.

    Example:
        >>> import lowcontext, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
        >>> config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
        >>> model = LlamaForCausalLM(config).eval()
        >>> ids = torch.ones(1, 4, dtype=torch.long)
        >>> with lowcontext.patched(model, "quest", budget=1024, dense_layers=0):
        ...     out = model.generate(ids, max_new_tokens=2)
    """
    patch_model(model, method, **arguments)
    try:
        yield model
    finally:
        unpatch_model(model)


def _attach(
    model: nn.Module, target: PreTrainedModel, modules: list[nn.Module], method: Method
) -> None:
    settings = make_settings(modules, target, method, rank_sum(model))
    target.set_attn_implementation(NAME)
    # transformers only logs a warning for a class that does not use the interface.
    ignored = [m for m in modules if getattr(m, "config", None) is not target.config]
    if target.config._attn_implementation != NAME or ignored:
        target.set_attn_implementation(settings[0].previous)
        raise NotImplementedError(
            f"model: {type(target).__name__} does not use transformers' AttentionInterface, so its "
            "attention cannot be replaced"
        )
    for module, setting in zip(modules, settings, strict=True):
        setattr(module, ATTRIBUTE, setting)
        module.register_forward_pre_hook(cache_hook, with_kwargs=True)
    outermost = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
    outermost.register_forward_pre_hook(model_hook, with_kwargs=True)


def _detach(model: nn.Module) -> None:
    for module in model.modules():
        module.__dict__.pop(ATTRIBUTE, None)
        # By function and not by handle: a copied or unpickled model has the hooks but no handles.
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is cache_hook or hook is model_hook:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
