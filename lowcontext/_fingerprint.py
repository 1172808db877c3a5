"""What tells two loaded models apart."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import nn


def fingerprint(model: nn.Module) -> str:
    """A digest of the names, shapes, dtypes and up to 64 values of each parameter.

    Values that are not in memory (an offloaded parameter) are left out. Hexadecimal.
    """
    digest = hashlib.sha1()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            step = max(1, parameter.numel() // 64)
            digest.update(f" {parameter.detach().flatten()[::step][:64].tolist()}".encode())
    return digest.hexdigest()


def model_label(model: Any) -> str:
    """Where a model was loaded from, its dtype, and a digest of its weights: other weights in the
    same folder, or another dtype, are another model to the rows of a run."""
    name, dtype = getattr(model, "name_or_path", ""), str(model.dtype).removeprefix("torch.")
    return f"{name} ({dtype}, {fingerprint(model)[:8]})"
