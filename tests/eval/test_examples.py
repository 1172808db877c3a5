"""The examples in the docstrings run and give what they say."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "lowcontext.eval",
        "lowcontext.eval.retrieval",
        "lowcontext.eval.ruler",
        "lowcontext.eval.scoring",
    ],
)
def test_docstring_examples_are_true(module: str) -> None:
    result = doctest.testmod(import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
