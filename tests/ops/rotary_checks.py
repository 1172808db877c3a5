"""What holds for the ops of moved keys on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowcontext.ops.rotary import Positions, gather_moved, list_keys, rotate_to

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Channels, pairs that are rotated, interleaved.
LAYOUTS = ((64, 32, False), (22, 11, False), (40, 6, False), (22, 11, True), (48, 17, True))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def poisoned(x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """The same values on the device, as a view of a larger buffer that holds NaN elsewhere."""
    big = torch.full([n + 3 for n in x.shape], torch.nan, dtype=dtype, device=device)
    view = big[tuple(slice(1, 1 + n) for n in x.shape)]
    return view.copy_(x)


def frequencies(pairs: int, device: str) -> Tensor:
    return (1e6 ** -(torch.arange(pairs) / pairs)).to(device)


def exact(x: Tensor, old: Tensor, new: Tensor, inv_freq: Tensor, interleaved: bool) -> Tensor:
    """fp64; the angles are differences of products in fp32, as a model makes them."""
    P = inv_freq.shape[0]
    angle = sum(s * (p.float()[..., None] * inv_freq).double() for s, p in ((1, new), (-1, old)))
    out = x.double().clone()
    a, b = (out[..., i : 2 * P : 2] if interleaved else out[..., i * P :][..., :P] for i in (0, 1))
    turned = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    a.copy_(turned[0]), b.copy_(turned[1])
    return out


def check(ours: Tensor, plain: Tensor, want: Tensor) -> None:
    """err(ours) <= 2 * err(reference) + 1e-5 against fp64."""
    assert (ours.dtype, ours.shape) == (plain.dtype, plain.shape)
    bound = 2 * (plain.double() - want).abs().max() + 1e-5
    error = (ours.double() - want).abs().max()
    assert error <= bound, f"{error} > {bound}"


def check_rotation(
    layout: tuple[int, int, bool], dtype: torch.dtype, largest: int, backend: str, device: str
) -> None:
    """Against fp64, from and to positions up to `largest`, in every form that they may have."""
    D, P, interleaved = layout
    f, raw = frequencies(P, device), rand(2, 3, 19, D)
    x = poisoned(raw, dtype, device)
    gen = torch.Generator().manual_seed(largest % 1000)
    old = torch.randint(largest, (2, 1, 19), generator=gen).to(device)
    new = torch.randint(largest, (19,), generator=gen, dtype=torch.int32).to(device)
    # One number for all rows, and consecutive ones behind it.
    rows = range(largest - 19, largest)
    cases: list[tuple[Positions, Positions]] = [(old, new), (rows, 0), (7, old), (rows, rows)]
    for positions in cases:
        ours, plain = (
            rotate_to(x, *positions, f, interleaved=interleaved, backend=each)
            for each in (backend, "reference")
        )
        tensors = (
            p if isinstance(p, Tensor) else torch.tensor(p, device=device) for p in positions
        )
        want = exact(x, *tensors, f, interleaved)
        check(ours, plain, want)
        if dtype == torch.float32:
            # A few roundings; a wrong angle of 1e-6 would show.
            assert (ours.double() - want).abs().max() <= 3e-7 * raw.abs().max()
    # A decode step, from bf16 to the fp32 of scores.
    one = poisoned(raw[:, :, -1:], torch.bfloat16, device)
    options = {"interleaved": interleaved, "dtype": torch.float32, "backend": backend}
    wide = rotate_to(one, range(largest - 1, largest), 5, f, **options)
    ends = (torch.tensor(n, device=device) for n in (largest - 1, 5))
    assert wide.dtype == torch.float32
    assert (wide - exact(one, *ends, f, interleaved)).abs().max() <= 3e-7 * raw.abs().max()
    assert torch.equal(wide, rotate_to(one, largest - 1, 5, f, **options))


def check_staying(backend: str, device: str) -> None:
    """Rows whose position does not change come back bit for bit, whatever is in them."""
    x = rand(1, 2, 6, 16).to(device)
    x[0, 0, 1, 2:5] = torch.tensor([torch.inf, -0.0, torch.nan])
    old = torch.tensor([5, 2**24 + 1, 9, 0, 3, 8], device=device)
    new = torch.tensor([5, 2**24 + 1, 8, 0, 4, 8], device=device)
    for dtype in DTYPES:
        rows = x.to(dtype)
        moved = rotate_to(rows, old, new, frequencies(8, device), backend=backend)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        same = (moved.view(bits) == rows.view(bits)).all(-1)[0]
        assert same.tolist() == [[True, True, False, True, False, True]] * 2


def check_lists(backend: str, device: str) -> None:
    """Against lists that Python joins."""
    gen = torch.Generator().manual_seed(0)
    for sink, width, S, low, Lk, ragged in (
        (0, 1, 5, 90, 97, False),
        (6, 1, 700, 2900, 3000, True),
        (0, 8, 6, 104, 97, True),  # the last tile is cut
        (3, 4, 0, 2, 50, False),
        (3, 4, 2, 50, 50, False),
    ):
        lists = [torch.randperm(12 if S < 12 else 900, generator=gen)[:S] for _ in range(4)]
        starts = sink + width * torch.stack(lists).sort()[0].view(2, 2, S)
        starts = starts.to(device, torch.int32)
        counts = torch.tensor([S, max(S - 1, 0) if ragged else S], device=device).int()
        lows = torch.tensor([low, max(low - 4, 0)], device=device).int() if ragged else low
        if width == 8:
            lows = low
        size = sink + S * width + 120 + Lk - low
        keys, first = list_keys(
            starts, counts, lows, Lk, size, width=width, sink=sink, backend=backend
        )
        assert keys.dtype == first.dtype == torch.int32
        for b in range(2):
            begin = lows if isinstance(lows, int) else int(lows[b])
            for h in range(2):
                tiles = starts[b, h, : int(counts[b])].tolist()
                want = [*range(sink), *(s + i for s in tiles for i in range(width))]
                want = want[: len(want) + min(Lk - begin, 0)]
                want += range(max(begin, sink), Lk)
                assert int(first[b]) == size - len(want)
                assert keys[b, h].tolist() == [0] * int(first[b]) + want


def check_gather(
    layout: tuple[int, int, bool], dtype: torch.dtype, heads: int, backend: str, device: str
) -> None:
    """Against rows that are taken one by one; what is not listed is NaN."""
    D, P, interleaved = layout
    Lk, M, Dv = 300, 70, 24
    f = frequencies(P, device)
    gen = torch.Generator().manual_seed(D)
    keys = torch.stack([torch.randperm(Lk, generator=gen)[:M].sort()[0] for _ in range(2 * heads)])
    keys = keys.view(2, heads, M).to(device, torch.int32)
    keys[:, :, -9:] = torch.arange(Lk - 9, Lk)  # they stay
    first = torch.tensor([0, 23], dtype=torch.int32, device=device)
    raw = torch.full((2, 2, Lk, D + Dv), torch.nan)
    for b in range(2):
        for h in range(2):
            listed = keys[b, h if heads > 1 else 0, int(first[b]) :].long().cpu()
            raw[b, h, listed] = rand(len(listed), D + Dv, seed=2 * b + h)
    k = poisoned(raw[..., :D].transpose(1, 2), dtype, device).transpose(1, 2)
    v = poisoned(raw[..., D:], dtype, device)
    (moved, values), (plain, _) = (
        gather_moved(k, v, keys, first, f, interleaved=interleaved, backend=each)
        for each in (backend, "reference")
    )
    for b in range(2):
        begin = int(first[b])
        assert not moved[b, :, :begin].any()
        assert not values[b, :, :begin].any()
        for h in range(2):
            listed = keys[b, h if heads > 1 else 0, begin:].long()
            assert torch.equal(values[b, h, begin:], v[b, h, listed])
            at = torch.arange(Lk - M + begin, Lk, device=device)
            rows = k[b, h, listed]
            check(moved[b, h, begin:], plain[b, h, begin:], exact(rows, listed, at, f, interleaved))
            assert torch.equal(moved[b, h, -9:], rows[-9:])


def check_errors() -> None:
    """The message names the argument."""
    x, f, ints = rand(2, 2, 9, 16), frequencies(8, "cpu"), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="inv_freq: expected at most 7 pairs, got 8"):
        rotate_to(x[..., :15], 0, 1, f)
    with pytest.raises(TypeError, match="old: expected dtype int32 or int64, got torch.float32"):
        rotate_to(x, torch.zeros(9), 1, f)
    with pytest.raises(ValueError, match="new: expected 9 positions, got a range of 8"):
        rotate_to(x, 0, range(8), f)
    lists = torch.zeros(2, 2, 4, dtype=torch.int32)
    with pytest.raises(
        TypeError, match="inv_freq: expected dtype torch.float32, got torch.float64"
    ):
        rotate_to(x, 0, 1, f.double())
    with pytest.raises(ValueError, match="starts: expected shape \\[B, H, S\\], got \\[2\\]"):
        list_keys(ints, ints, 0, 9, 9)
    with pytest.raises(ValueError, match="starts: expected a contiguous last dim, got stride 4"):
        list_keys(lists.mT, ints, 0, 9, 9)
    with pytest.raises(TypeError, match="counts: expected dtype torch.int32, got torch.int64"):
        list_keys(lists, ints.long(), 0, 9, 9)
    with pytest.raises(ValueError, match="counts: expected shape \\[2\\], got \\[1\\]"):
        list_keys(lists, ints[:1], 0, 9, 9)
    with pytest.raises(ValueError, match="low: expected shape \\[1\\] or \\[2\\], got \\[2, 1\\]"):
        list_keys(lists, ints, ints[:, None], 9, 9)
    with pytest.raises(ValueError, match="v: expected torch.float32 \\[2, 2, 9, Dv\\]"):
        gather_moved(x, x[:, :, :8], lists, ints, f)
    with pytest.raises(ValueError, match="keys: expected shape \\[2, 1 or 2, M\\]"):
        gather_moved(x, x, lists[:1], ints, f)
    with pytest.raises(ValueError, match="first: expected shape \\[2\\], got \\[1\\]"):
        gather_moved(x, x, lists, ints[:1], f)
