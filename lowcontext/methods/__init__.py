"""The directory is the registry: every module here without an underscore holds one Method."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from lowcontext.methods._phases import Phases
from lowcontext.methods.base import LayerContext, Method

__all__ = ["LayerContext", "Method", "available_methods", "combine", "get_method", "method_class"]


def available_methods() -> list[str]:
    """Names that `get_method` and `patch_model` take, sorted.

    Example:
        >>> import lowcontext
        >>> "streaming_llm" in lowcontext.available_methods()
        True
    """
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in modules if name != "base" and not name.startswith("_"))


def method_class(name: str) -> type[Method]:
    """The Method subclass called `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in available_methods():
        raise ValueError(f"method: expected one of {available_methods()}, got {name!r}")
    module = importlib.import_module(f"{__name__}.{name}")
    for _, cls in inspect.getmembers(module, inspect.isclass):
        if issubclass(cls, Method) and cls.__module__ == module.__name__:
            return cls
    raise ValueError(f"method: expected a Method subclass in {module.__file__}, got none")


def get_method(name: str, *, config: str | Path | None = None, **options: Any) -> Method:
    """Makes a method from its name and hyper-parameters.

    Args:
        name: one of `available_methods()`.
        config: a JSON or YAML file with hyper-parameters; `options` override it.
        options: hyper-parameters, the fields of the method's class.

    Raises:
        ValueError: unknown name, or a value out of range. TypeError: unknown hyper-parameter.

    Example:
        >>> import lowcontext
        >>> print(lowcontext.get_method("streaming_llm", window=256))
        streaming_llm(window=256)
    """
    cls = method_class(name)
    values = {**(_read_config(Path(config)) if config is not None else {}), **options}
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise TypeError(f"{name}: expected hyper-parameters among {known}, got {key!r}")
    return cls(**values)


def combine(
    method: str | Method | None = None,
    *,
    prefill: str | Method | None = None,
    decode: str | Method | None = None,
    config: str | Path | None = None,
    **options: Any,
) -> Method:
    """One Method from what `patch_model` takes: one for both phases, or one for each.

    Options go to the single named method; with `prefill=` and `decode=`, pass instances for
    settings of their own. A phase left out is dense.

    Raises:
        TypeError: both forms, neither, or options that have no method to go to.
    """
    if method is not None and (prefill is not None or decode is not None):
        raise TypeError("method: expected method=, or prefill= and decode=, got both")
    given = [m for m in (method, prefill, decode) if m is not None]
    if not given:
        raise TypeError("method: expected method=, prefill= or decode=, got none of them")
    if (options or config is not None) and (len(given) > 1 or isinstance(given[0], Method)):
        raise TypeError(
            f"options: expected none beside a Method instance or two methods, got "
            f"{[*options, *(['config'] if config is not None else [])]}; "
            "make each with get_method(name, ...)"
        )

    def make(value: str | Method | None) -> Method:
        if isinstance(value, Method):
            return value
        if value is not None and not isinstance(value, str):
            raise TypeError(f"method: expected a name or a Method, got {type(value).__name__}")
        if value is None:
            return get_method("dense")
        return get_method(value, config=config, **options)

    return (
        make(method)
        if method is not None
        else Phases(prefill_method=make(prefill), decode_method=make(decode))
    )


def _read_config(path: Path) -> dict[str, Any]:
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"config: expected a .json, .yaml or .yml file, got {str(path)!r}")
    text = path.read_text()
    if path.suffix == ".json":
        values = json.loads(text)
    else:
        import yaml

        values = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise ValueError(f"config: expected a mapping in {path}, got {type(values).__name__}")
    return values
