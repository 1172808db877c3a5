"""Top-p masks of the reference against exact rational sums, and what they promise."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowcontext.ops import native
from lowcontext.ops.votes import mass_mask

BACKENDS = ["reference", *(["native"] if native.status() is None else [])]
VALUES = [-math.inf, math.nan, -1.0, -0.0, 0.0, 0.125, 0.25, 0.25, 0.5, 1.0, 3.0]


def exact(row: list[float], share: Fraction, forced: list[bool]) -> list[bool]:
    """In falling order, the lower index first, while the mass before is below the share."""
    part = [i for i, x in enumerate(row) if x >= 0]
    order = sorted(part, key=lambda i: (not forced[i], -row[i], i))
    total, before, keep = sum(Fraction(row[i]) for i in part), Fraction(0), [False] * len(row)
    for i in order:
        keep[i] = forced[i] or before < share * total
        before += Fraction(row[i])
    return keep


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(VALUES), st.booleans()), min_size=1, max_size=30),
    st.sampled_from([1, 2**20, 2**28, 2**29, 3 * 2**28, 966367642, 2**30 - 1]),
    st.booleans(),
)
def test_the_largest_entries_until_their_exact_mass_reaches_the_share(
    backend: str, entries: list[tuple[float, bool]], units: int, force: bool
) -> None:
    row, flags = [x for x, _ in entries], [flag and force for _, flag in entries]
    forced = torch.tensor(flags) if force else None
    keep = mass_mask(torch.tensor([row]), units / 2**30, forced=forced, backend=backend)
    assert keep[0].tolist() == exact(row, Fraction(units, 2**30), flags)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_share_that_is_met_exactly_takes_no_further_entry(backend: str) -> None:
    weights = torch.tensor([0.25, 0.5, 0.25])
    assert mass_mask(weights, 0.5, backend=backend).tolist() == [False, True, False]
    assert mass_mask(weights, 0.75, backend=backend).tolist() == [True, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_masses_below_the_unit_count_nothing_and_subnormal_rows_exactly(backend: str) -> None:
    weights = torch.tensor([1.0, *[2.0**-41] * 9])
    assert mass_mask(weights, 1 - 2**-30, backend=backend).tolist() == [True] + [False] * 9
    assert mass_mask(weights, 1.0, backend=backend).all()
    tiny = torch.tensor([3e-44, 1e-44, 2e-44, 0.0])
    assert mass_mask(tiny, 0.6, backend=backend).tolist() == [True, False, True, False]


@pytest.mark.skipif(native.status() is not None, reason=f"native backend: {native.status()}")
@pytest.mark.parametrize("threads", [1, 3])
def test_native_marks_what_the_reference_marks_in_long_rows(threads: int) -> None:
    gen = torch.Generator().manual_seed(3)
    weights = torch.randn(7, 3, 5000, generator=gen).exp()
    weights[:, 0] = (8 * weights[:, 0]).floor() / 8  # ties
    weights[:, 1, ::3] = -torch.inf
    forced = torch.rand(5000, 3, generator=gen).t() < 0.01
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for share, flags in ((0.3, None), (0.9, forced), (1e-8, None), (1 - 2**-30, forced[0])):
        given = weights[..., 1:], share
        own = None if flags is None else flags[..., 1:]
        ours = mass_mask(*given, forced=own, backend="native")
        assert torch.equal(ours, mass_mask(*given, forced=own, backend="reference"))
    torch.set_num_threads(before)


@pytest.mark.skipif(native.status() is not None, reason=f"native backend: {native.status()}")
def test_the_fake_op_agrees_with_the_real_one() -> None:
    x = torch.rand(4, 9)
    mass_mask(x, 0.5, backend="native")  # registers the fake
    op = torch.ops.lowcontext.mass_mask.default
    for args in (
        (x, 2**29, None),
        (x, 1, torch.zeros(2, 9, dtype=torch.bool)),
        (x[:, :0], 1, None),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_forced_rows_repeat_over_the_leading_dims(backend: str) -> None:
    gen = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 3, 5, 40, generator=gen)
    forced = torch.rand(5, 40, generator=gen) < 0.1
    whole = mass_mask(weights, 0.4, forced=forced, backend=backend)
    for b in range(2):
        for h in range(3):
            for n in range(5):
                alone = mass_mask(weights[b, h, n], 0.4, forced=forced[n], backend=backend)
                assert torch.equal(whole[b, h, n], alone)
    assert torch.equal(mass_mask(weights, 1.0, forced=forced), weights >= 0)
    assert mass_mask(weights[..., :0], 0.5, backend=backend).shape == (2, 3, 5, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_set_does_not_depend_on_the_order_of_the_entries(backend: str) -> None:
    # 2^20 entries: fp32 sums in another order differ by more than an entry.
    gen = torch.Generator().manual_seed(1)
    weights = torch.rand(2**20, generator=gen).square()
    places = torch.randperm(2**20, generator=gen)
    keep, moved = (mass_mask(x, 0.7, backend=backend) for x in (weights, weights[places]))
    assert torch.equal(weights[keep].sort().values, weights[places][moved].sort().values)
    mass = weights.double()
    assert mass[keep].sum() >= 0.7 * mass.sum() > mass[keep].sum() - mass[keep].min()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": torch.zeros(4, dtype=torch.bfloat16)}, TypeError, "weights: expected an fp32"),
        ({"weights": torch.tensor(1.0)}, ValueError, r"weights: expected shape \[..., N <= "),
        ({"share": 0.0}, ValueError, "share: expected more than 0, got 0.0"),
        ({"share": math.nan}, ValueError, "share: expected more than 0, got nan"),
        ({"forced": torch.zeros(4)}, TypeError, "forced: expected a bool tensor"),
        ({"forced": torch.zeros(5, dtype=torch.bool)}, ValueError, r"forced: expected shape \[4\]"),
    ],
)
def test_wrong_arguments_are_named(
    change: dict[str, Tensor | float], error: type[Exception], message: str
) -> None:
    arguments: dict = {"weights": torch.ones(3, 4), "share": 0.5, **change}
    with pytest.raises(error, match=message):
        mass_mask(**arguments)


def test_a_row_of_more_masses_than_64_bits_hold_is_refused() -> None:
    weights = torch.zeros(1).expand(2**23 + 1)
    with pytest.raises(ValueError, match="N <= 8388608"):
        mass_mask(weights, 0.5)
