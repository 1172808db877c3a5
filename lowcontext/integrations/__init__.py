"""Hugging Face transformers: `patch_model` puts a method behind a model's attention."""

from __future__ import annotations

from lowcontext.integrations._density import Density, measure_density
from lowcontext.integrations._selection import Selection, measure_selection
from lowcontext.integrations.cache import SparseCacheLayer
from lowcontext.integrations.transformers import patch_model, patched, unpatch_model

__all__ = [
    "Density",
    "Selection",
    "SparseCacheLayer",
    "measure_density",
    "measure_selection",
    "patch_model",
    "patched",
    "unpatch_model",
]
