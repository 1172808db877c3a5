"""What the tests of several ops share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from instruction_sets import machine_isas


@pytest.fixture(params=["reference", *machine_isas()])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, and native with each instruction set of this machine."""
    if request.param == "reference":
        yield "reference"
        return
    torch.ops.lowcontext._set_cpu_isa(request.param)
    yield "native"
    torch.ops.lowcontext._set_cpu_isa("auto")
