"""The public ops under torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext import BlockIndex, attention, sparse_attention


def test_ops_compile_into_one_graph() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16, generator=generator) for n in (5, 40, 40))
    index = BlockIndex.from_blocks(torch.ones(1, 1, 5, 3, dtype=torch.bool), (1, 16))

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, index)

    for op in (attention, sparse):
        torch._dynamo.reset()
        compiled = torch.compile(op, fullgraph=True, backend="eager")
        assert torch.equal(compiled(q, k, v), op(q, k, v))
