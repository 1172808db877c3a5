"""Top-p masks of the reference against exact rational sums, and what they promise."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowcontext.ops.votes import mass_mask

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


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(VALUES), st.booleans()), min_size=1, max_size=30),
    st.sampled_from([1, 2**20, 2**28, 2**29, 3 * 2**28, 966367642, 2**30 - 1]),
    st.booleans(),
)
def test_the_largest_entries_until_their_exact_mass_reaches_the_share(
    entries: list[tuple[float, bool]], units: int, force: bool
) -> None:
    row, flags = [x for x, _ in entries], [flag and force for _, flag in entries]
    forced = torch.tensor(flags) if force else None
    keep = mass_mask(torch.tensor([row]), units / 2**30, forced=forced, backend="reference")
    assert keep[0].tolist() == exact(row, Fraction(units, 2**30), flags)


def test_a_share_that_is_met_exactly_takes_no_further_entry() -> None:
    weights = torch.tensor([0.25, 0.5, 0.25])
    assert mass_mask(weights, 0.5).tolist() == [False, True, False]
    assert mass_mask(weights, 0.75).tolist() == [True, True, False]
    # 0.9 in steps of 2^-30 is above the share of nine in ten.
    assert int(mass_mask(torch.ones(10), 0.9).sum()) == 10 - (round(0.9 * 2**30) <= 0.9 * 2**30)


def test_masses_below_the_unit_count_nothing_and_subnormal_rows_count_exactly() -> None:
    weights = torch.tensor([1.0, *[2.0**-41] * 9])
    assert mass_mask(weights, 1 - 2**-30).tolist() == [True] + [False] * 9
    assert mass_mask(weights, 1.0).all()
    tiny = torch.tensor([3e-44, 1e-44, 2e-44, 0.0])
    assert mass_mask(tiny, 0.6).tolist() == [True, False, True, False]


def test_forced_rows_repeat_over_the_leading_dims() -> None:
    gen = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 3, 5, 40, generator=gen)
    forced = torch.rand(5, 40, generator=gen) < 0.1
    whole = mass_mask(weights, 0.4, forced=forced)
    for b in range(2):
        for h in range(3):
            for n in range(5):
                alone = mass_mask(weights[b, h, n], 0.4, forced=forced[n])
                assert torch.equal(whole[b, h, n], alone)
    assert torch.equal(mass_mask(weights, 1.0, forced=forced), weights >= 0)
    assert mass_mask(weights[..., :0], 0.5).shape == (2, 3, 5, 0)


def test_the_set_does_not_depend_on_the_order_of_the_entries() -> None:
    # 2^20 entries: fp32 sums in another order differ by more than an entry.
    gen = torch.Generator().manual_seed(1)
    weights = torch.rand(2**20, generator=gen).square()
    places = torch.randperm(2**20, generator=gen)
    keep, moved = mass_mask(weights, 0.7), mass_mask(weights[places], 0.7)
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
