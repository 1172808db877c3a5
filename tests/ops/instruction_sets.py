"""The instruction sets that native kernels can use here."""

from __future__ import annotations

import torch

from lowcontext.ops import native


def machine_isas() -> list[str]:
    """Those of this machine; none without the native backend."""
    found: list[str] = []
    if native.status() is not None:
        return found
    for isa in ("avx512", "avx2", "portable"):
        try:
            torch.ops.lowcontext._set_cpu_isa(isa)
        except RuntimeError:
            continue
        found.append(isa)
    torch.ops.lowcontext._set_cpu_isa("auto")
    return found
