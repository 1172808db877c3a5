"""Hyper-parameters that tests give to every method: each takes those that it has."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lowcontext.methods import method_class

# Values at which every method reads everything; a new method adds its own budget here.
COVERING: dict[str, Any] = {
    "budget": 10**6,
    "window": 10**6,
    "stride": 1,
    "dense_layers": 0,
    "min_length": 0,
    "gain": 0.0,
    "min_budget": 10**6,
    "threshold": 1.0,
    "vertical": 10**6,
    "slash": 10**6,
    "k": 10**6,
}

# What a single method needs on models of two layers.
OF_METHOD: dict[str, dict[str, Any]] = {"tidaldecode": {"select_layers": [0]}}


def options(method: str, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that are hyper-parameters of the method, and its own."""
    known = {f.name for f in fields(method_class(method))}
    shared = {name: value for name, value in values.items() if name in known}
    return {**shared, **OF_METHOD.get(method, {})}
