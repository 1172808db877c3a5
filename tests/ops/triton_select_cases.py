"""Cases of the Triton select ops; `test_triton.py` runs this file in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowcontext.ops import votes
from lowcontext.ops.triton import select
from lowcontext.ops.votes import triton as vote_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives the largest int32, so an entry that no kernel writes is out of range."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def rows_of(kind: str, N: int) -> Tensor:
    """fp32 [4, N] on the device."""
    gen = torch.Generator().manual_seed(N)
    x = torch.randn(4, N, generator=gen)
    if kind == "ties":
        x = x.round()
    elif kind == "signs":
        x = torch.where(x > 0, 0.0, -0.0)
        x[:, ::5] = 1e-44  # subnormal
    elif kind == "few":
        x = x.masked_fill(torch.rand(x.shape, generator=gen) < 0.9, -torch.inf)
        x[0, ::3] = torch.nan
        x[1] = -torch.nan
        x[2, :2] = torch.inf
    return x.to(DEVICE)


@pytest.mark.parametrize("kind", ["normal", "ties", "signs", "few"])
@pytest.mark.parametrize(
    ("N", "long"), [(1, False), (33, False), (700, False), (65, True), (192, True), (700, True)]
)
def test_topk_equals_the_reference(
    N: int, long: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if long and DEVICE == "cpu":
        monkeypatch.setattr(select, "ROW", 64)
        monkeypatch.setattr(select, "CHUNK", 64 if N < 700 else 256)
    x = rows_of(kind, N if DEVICE == "cpu" or not long else 100 * N)
    N = x.shape[1]
    for k in {0, 1, N // 2, N, N + 5}:
        limits = torch.tensor([k, k // 3, 0, N + 9], device=DEVICE)
        ours = votes.topk(x, k, limits=limits, backend="triton")
        plain = votes.topk(x, k, limits=limits, backend="reference")
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a, b), k


def test_topk_of_a_row_longer_than_a_program_holds_equals_the_reference() -> None:
    x = rows_of("ties", 20000)[:1]
    ours = votes.topk(x, 700, backend="triton")
    plain = votes.topk(x, 700, backend="reference")
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)


def test_topk_takes_rows_that_lie_apart() -> None:
    x = rows_of("normal", 300)
    ours = votes.topk(x[1::2, 40:260], 20, backend="triton")
    plain = votes.topk(x[1::2, 40:260], 20, backend="reference")
    assert torch.equal(ours[0], plain[0])


def test_topk_traces_into_one_graph_with_its_fake() -> None:
    x = rows_of("normal", 100)
    limits = torch.tensor([3, 9, 0, 20], dtype=torch.int32, device=DEVICE)

    def chosen(x: Tensor) -> tuple[Tensor, Tensor]:
        return vote_kernels.topk(x, 9, limits)

    compiled = torch.compile(chosen, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(x), chosen(x), strict=True):
        assert torch.equal(a, b)
    op = torch.ops.lowcontext_triton.topk.default
    for args in ((x, 9, limits), (x, 200, None), (x, 0, None)):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
