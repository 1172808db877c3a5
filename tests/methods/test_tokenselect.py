"""TokenSelect against its definition in fp64, its cache, and what it may leave out."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from lowcontext import LayerContext, attention, get_method, sparse_attention
from lowcontext.methods._reuse import Kept, _branch, _where
from lowcontext.methods.base import Moved, Rotary
from lowcontext.methods.tokenselect import TokenSelect
from lowcontext.ops.rotary import rotate_to

SIZES: dict[str, Any] = {
    "k": 40,
    "sink": 5,
    "local": 20,
    "tail": 0,
    "scope": "layer",
    "scoring": "exact",
    "cache_threshold": None,
}


def make(**options: Any) -> TokenSelect:
    return get_method("tokenselect", **{**SIZES, **options})


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(q: Tensor, k: Tensor, lists: int, scale: float, pool: int) -> Tensor:
    """fp64 votes [lists, n] of the query q [Hq, D] for the candidates k [Hkv, n, D]."""
    keys = k.double().repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    logits = scale * torch.einsum("hd,hnd->hn", q.double(), keys)
    votes = logits.softmax(-1).unflatten(0, (lists, -1)).sum(1)
    n = votes.shape[1]
    if pool:
        half = pool // 2
        votes = torch.stack(
            [votes[:, max(0, i - half) : i + half + 1].amax(1) for i in range(n)], dim=1
        )
    return votes


def check(listed: Tensor, q: Tensor, k: Tensor, low: int, method: TokenSelect, scale: float) -> int:
    """Compares the listed keys bool [H, Lk] of one query with the oracle; returns how many differ.

    Those that differ must be ties of the k-th vote.
    """
    scale = 1.0 if method.vote_scale == 1 else scale
    votes = oracle(q, k[:, method.sink : low], listed.shape[0], scale, method.pool)
    differ = 0
    for h in range(listed.shape[0]):
        assert listed[h, : method.sink].all()
        assert listed[h, low:].all()
        chosen = listed[h, method.sink : low].nonzero().flatten().tolist()
        order = sorted(range(votes.shape[1]), key=lambda i: (-float(votes[h, i]), i))
        best, last = order[: method.k], float(votes[h, order[min(method.k, len(order)) - 1]])
        assert len(chosen) == len(best)
        wrong = set(chosen) ^ set(best)
        differ += len(wrong)
        assert all(abs(float(votes[h, i]) - last) <= 2e-6 * last + 1e-9 for i in wrong)
    return differ


@pytest.mark.parametrize("G", [1, 2, 4, 7, 8])
def test_decode_lists_equal_the_definition_in_200_random_cases(G: int) -> None:
    gen = torch.Generator().manual_seed(G)
    differ = 0
    for case in range(200):

        def pick(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=gen))

        Hkv, D, R = pick(1, 3), 8 * pick(1, 4), 1 if case % 3 else pick(2, 4)
        method = make(
            k=pick(1, 60),
            sink=pick(0, 90),
            local=pick(1, 100),
            scope=("layer", "kv_head")[pick(0, 1)],
            vote_scale=("1/sqrt(d)", 1)[pick(0, 1)],
            pool=(0, 0, 1, 3, 7)[pick(0, 4)],
        )
        Lk = method.sink + method.k + method.local + R + pick(0, 300)
        q = torch.randn(2, Hkv * G, R, D, generator=gen) * 2
        k = torch.randn(2, Hkv, Lk, D, generator=gen)
        index = method.decode(q, k, LayerContext(scale=D**-0.5))
        index.validate(R, Lk)
        mask = index.to_mask(R, Lk)
        assert mask.shape[1] == (1 if method.scope == "layer" else Hkv)
        for b in range(2):
            for r in range(R):
                n = Lk - R + r + 1
                row = mask[b, :, r, :n]
                low = n - method.local
                ties = check(row, q[b, :, r], k[b, :, :n], low, method, D**-0.5)
                differ += 0 if method.pool else ties
    # Pooling gives neighbours one value; without it hardly any two votes are as close.
    assert differ <= 4


@pytest.mark.parametrize("G", [1, 4, 7])
@pytest.mark.parametrize("scope", ["layer", "kv_head"])
def test_a_chunk_selects_once_with_its_mean_query(G: int, scope: str) -> None:
    method = make(chunk=50, scope=scope)
    q, k, v = rand(1, 2 * G, 300, 16), rand(1, 2, 300, 16, seed=1), rand(1, 2, 300, 16, seed=2)
    dense = attention(q, k, v, backend="reference")
    parts = list(method.parts(q, k, LayerContext(scale=0.25)))
    assert [(a, b, i is None) for a, b, i in parts[:3]] == [
        (0, 100, True),
        (100, 150, False),
        (150, 200, False),
    ]
    for start, end, index in parts[1:]:
        index.validate(end - start, end)
        listed = index.key_mask(end)[0, :, 0]
        mean = q[0, :, start:end].double().mean(1).float()
        check(listed, mean, k[0, :, :end], start + 1 - method.local, method, 0.25)
        out = sparse_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], index, scale=0.25)
        causal = torch.ones(end - start, end, dtype=torch.bool).tril(start)
        mask = listed.repeat_interleave(2 * G // listed.shape[0], 0)[:, None] & causal
        logits = (
            0.25 * q[0, :, start:end].double() @ k[0, :, :end].double().mT.repeat_interleave(G, 0)
        )
        weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
        expected = weights @ v[0, :, :end].double().repeat_interleave(G, 0)
        torch.testing.assert_close(out[0].double(), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(out, dense[:, :, start:end], atol=1e-3)


@pytest.mark.parametrize("pieces", [(300,), (50, 250), (100, 100, 100), (250, 50)])
def test_a_prompt_in_pieces_selects_what_the_whole_prompt_selects(pieces: tuple[int, ...]) -> None:
    method = make(chunk=50)
    q, k = rand(1, 4, 300, 16), rand(1, 2, 300, 16, seed=1)
    whole = torch.zeros(300, 300, dtype=torch.bool)
    cut = torch.zeros(300, 300, dtype=torch.bool)
    done = 0
    for out, steps in ((whole, (300,)), (cut, pieces)):
        done = 0
        for n in steps:
            layer = LayerContext(scale=0.25)
            for a, b, index in method.parts(q[:, :, done : done + n], k[:, :, : done + n], layer):
                end = done + b
                causal = torch.ones(b - a, end, dtype=torch.bool).tril(end - (b - a))
                mask = causal if index is None else index.to_mask(b - a, end)[0, 0]
                out[done + a : end, :end] = mask
            done += n
    assert torch.equal(whole, cut)


def test_chunks_of_any_size_are_causal_and_read_their_window() -> None:
    q, k = rand(1, 2, 200, 8), rand(1, 1, 200, 8, seed=1)
    for chunk in (1, 7, 64, 1000):
        method = make(chunk=chunk, k=10, local=9)
        seen = 0
        for a, b, index in method.parts(q, k, LayerContext()):
            seen += b - a
            if index is None:
                continue
            mask = index.to_mask(b - a, b)[0, 0]
            for row in range(b - a):
                position = a + row
                assert mask[row, position - 8 : position + 1].all()
                assert not mask[row, position + 1 :].any()
        assert seen == 200


@pytest.mark.parametrize("scoring", ["exact", "int8", "int4", "pages"])
def test_the_last_queries_of_a_prompt_select_one_by_one(
    scoring: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = rand(1, 4, 300, 16), rand(1, 2, 300, 16, seed=1)
    method, layer = make(chunk=50, tail=20, scoring=scoring), LayerContext(scale=0.25)
    parts = list(method.parts(q, k, layer))
    assert [p[:2] for p in parts] == [
        (0, 100),
        (100, 150),
        (150, 200),
        (200, 250),
        (250, 280),
        (280, 300),
    ]
    mask = parts[-1][2].to_mask(20, 300)
    # Pages round the sink up, and several rows vote with the keys themselves.
    one_by_one = make(scoring="exact", sink=16) if scoring == "pages" else make(scoring=scoring)
    for r in range(20):
        n = 281 + r
        alone = one_by_one.decode(q[:, :, n - 1 : n], k[:, :, :n], LayerContext(scale=0.25))
        assert torch.equal(mask[:, :, r : r + 1, :n], alone.to_mask(1, n))
    monkeypatch.setattr("lowcontext.methods.tokenselect._SCORES", 3 * 4 * 300)  # 3 rows at a time
    assert torch.equal(method.decode(q[:, :, 280:], k, layer).to_mask(20, 300), mask)


@pytest.mark.parametrize("scoring", ["exact", "int8", "int4", "pages"])
def test_a_planted_needle_is_selected_among_many_tokens(scoring: str) -> None:
    q, k = rand(1, 8, 1, 64), rand(1, 2, 8192, 64, seed=1)
    k[:, 0, 3001] = 1.5 * q[:, 0, 0]
    index = make(scoring=scoring).decode(q, k, LayerContext(scale=0.125))
    assert index.to_mask(1, 8192)[0, 0, 0, 3001]


def drifting(steps: int, turn: float) -> Tensor:
    """Queries [1, 4, steps, 16] of which each is the one before plus noise of size `turn`."""
    noise = turn * rand(1, 4, steps, 16)
    noise[:, :, 0] = rand(1, 4, 16, seed=5)
    return noise.cumsum(2)


def test_a_reused_selection_leaves_no_holes() -> None:
    method = make(cache_threshold=0.5, cache_steps=16)
    q, k = drifting(120, 0.02), rand(1, 2, 420, 16, seed=1)
    layer, hits = LayerContext(scale=0.25), []
    layer.observe = lambda figures: hits.append(bool(figures["cache_hits"]))
    low, chosen = 0, torch.empty(0)
    for n in range(300, 420):
        mask = method.decode(q[:, :, n - 300 : n - 299], k[:, :, :n], layer).to_mask(1, n)[0, 0, 0]
        if not hits[-1]:
            low = n - method.local
            chosen = mask[:low].clone()
        # Everything behind the last selection is read, and before it exactly that selection.
        assert mask[low:].all()
        assert torch.equal(mask[:low], chosen)
    assert 0.7 < sum(hits) / len(hits) < 1
    # At most cache_steps in a row.
    assert max(len(run) for run in "".join("x" if h else " " for h in hits).split()) == 16


def test_a_turned_query_selects_anew_and_a_kept_direction_does_not() -> None:
    method = make(cache_threshold=0.9)
    q, k = rand(1, 4, 1, 16), rand(1, 2, 400, 16, seed=1)
    layer = LayerContext(scale=0.25)
    hits: list[bool] = []
    layer.observe = lambda figures: hits.append(bool(figures["cache_hits"]))
    for step in (q, 3 * q, q + 0.1 * rand(1, 4, 1, 16, seed=7), -q, q):
        method.decode(step, k[:, :, : 350 + len(hits)], layer)
    assert hits == [False, True, True, False, False]


def test_by_default_a_small_turn_that_asks_for_another_needle_finds_it() -> None:
    # Nine tenths of each query are the same in every step; the rest names one of two needles.
    needles = torch.tensor([1200, 2400])
    k = 0.1 * rand(1, 2, 4000, 32, seed=1)
    k[:, :, needles] = torch.eye(32)[:2]
    common = 4 * torch.eye(32)[2]
    queries = [(common + torch.eye(32)[i]).expand(1, 4, 1, 32) for i in range(2)]
    assert torch.cosine_similarity(*(q[0, 0, 0] for q in queries), dim=0) > 0.9
    for threshold, found in (({}, True), ({"cache_threshold": 0.9}, False)):
        method = get_method("tokenselect", k=16, sink=16, local=64, min_length=0, **threshold)
        layer = LayerContext(scale=8.0)
        for step, q in enumerate(queries):
            mask = method.decode(q, k[:, :, : 3999 + step], layer).to_mask(1, 3999 + step)
        assert mask[..., needles[1]].all() == found


@pytest.mark.parametrize(("cosine", "hit"), [("head", False), ("layer", True)])
def test_one_head_that_turns_is_seen_head_by_head_alone(cosine: str, hit: bool) -> None:
    method = make(cache_threshold=0.8, cache_cosine=cosine)
    q, k = rand(1, 4, 1, 16), rand(1, 2, 400, 16, seed=1)
    layer, hits = LayerContext(scale=0.25), []
    layer.observe = lambda figures: hits.append(bool(figures["cache_hits"]))
    q[:, 3] *= 0.1
    method.decode(q, k[:, :, :399], layer)
    turned = q.clone()
    turned[:, 3] *= -1
    method.decode(turned, k, layer)
    assert hits == [False, hit]


def test_dropped_memory_selects_anew() -> None:
    method = make(cache_threshold=-1.0)
    q, k = rand(1, 4, 2, 16), rand(1, 2, 400, 16, seed=1)
    kept = LayerContext(scale=0.25)
    method.decode(q[:, :, :1], k[:, :, :399], kept)
    reused = method.decode(q[:, :, 1:], k, kept).to_mask(1, 400)
    kept.memory.clear()
    fresh = method.decode(q[:, :, 1:], k, kept).to_mask(1, 400)
    exact = make().decode(q[:, :, 1:], k, LayerContext(scale=0.25)).to_mask(1, 400)
    assert torch.equal(fresh, exact)
    assert not torch.equal(reused, exact)


@pytest.mark.parametrize("scoring", ["exact", "int8", "int4", "pages"])
def test_rows_of_a_batch_reuse_on_their_own(scoring: str) -> None:
    method = make(cache_threshold=0.9, scoring=scoring, page=8)
    k = rand(3, 2, 460, 16, seed=1)
    together = LayerContext(scale=0.25)
    alone = [LayerContext(scale=0.25) for _ in range(3)]
    base = rand(3, 4, 1, 16)
    hits = []
    together.observe = lambda figures: hits.append(figures["cache_hits"].bool().tolist())
    for step in range(12):
        # Row b turns at every (b + 2)-th step.
        q = base.clone()
        for b in range(3):
            if step % (b + 2) == 0:
                base[b] = q[b] = rand(4, 1, 16, seed=100 * step + b)
        keys = k[:, :, : 400 + step]
        mask = method.decode(q, keys, together).to_mask(1, 400 + step)
        for b in range(3):
            row = slice(b, b + 1)
            expected = method.decode(q[row], keys[row], alone[b]).to_mask(1, 400 + step)
            assert torch.equal(mask[row], expected)
    assert [False, True, True] in hits
    assert [True, False, True] in hits


def test_a_choice_from_before_there_were_pages_reads_the_sink_of_those_after() -> None:
    method = make(sink=100, scoring="pages", page=16, coarse=2, cache_threshold=0.9)
    k, base = rand(2, 2, 220, 16, seed=1), rand(2, 4, 1, 16)
    layer, hits = LayerContext(scale=0.25), []
    layer.observe = lambda figures: hits.append(figures["cache_hits"].bool().tolist())
    for n in range(173, 220):
        q = torch.cat([base[:1], base[1:] if n < 210 else -base[1:]])
        index = method.decode(q, k[:, :, :n], layer)
        assert index.to_mask(1, n)[..., :112].all()  # 100 keys, in whole pages
    assert hits[-10] == [True, False]


def test_both_ways_to_merge_hits_and_misses_agree() -> None:
    method = make()
    vote, layer = method._vote(LayerContext(scale=0.25)), LayerContext(scale=0.25)
    q, k = rand(3, 4, 1, 16), rand(3, 2, 300, 16, seed=1)
    old = vote.exact(rand(3, 4, 1, 16, seed=2), k, 270, layer)
    kept = Kept(q.flatten(1), old, torch.full((3,), 270, dtype=torch.int32))
    for missed in ([False, False, True], [True] * 3, [False] * 3, [True, False, False]):
        flags = torch.tensor(missed)
        tokens, low = _branch(missed, kept, lambda rows: vote.exact(q, k, 280, layer, rows))
        merged = _where(flags, vote.exact(q, k, 280, layer, flags), old)
        assert torch.equal(tokens.ids, merged.ids)
        assert torch.equal(tokens.counts, merged.counts)
        assert low.tolist() == [280 if each else 270 for each in missed]


def structured(Lk: int = 4096, G: int = 4) -> tuple[Tensor, Tensor]:
    """Queries and keys with neighbours alike and a few tokens that each head looks for."""
    gen = torch.Generator().manual_seed(0)
    walk = torch.randn(1, 2, Lk // 32, 64, generator=gen).repeat_interleave(32, dim=2)
    k = walk + 0.7 * torch.randn(1, 2, Lk, 64, generator=gen)
    q = torch.randn(1, 2 * G, 1, 64, generator=gen)
    for h in range(2 * G):
        where = torch.randint(200, Lk - 200, (6,), generator=gen)
        k[0, h // G, where] += 0.8 * q[0, h, 0]
    return q, k


@pytest.mark.parametrize(("scoring", "share"), [("int8", 0.998), ("int4", 0.97), ("pages", 0.9)])
def test_cheaper_scoring_keeps_most_of_the_mass_and_survives_lost_memory(
    scoring: str, share: float
) -> None:
    q, k = structured()
    method, exact = make(k=256, scoring=scoring), make(k=256)
    logits = torch.einsum("hd,hnd->hn", q[0, :, 0].double(), k[0].double().repeat_interleave(4, 0))
    weights = (0.125 * logits).softmax(-1).mean(0)
    kept = LayerContext(scale=0.125)
    for n in range(4000, 4096, 5):
        index = method.decode(q, k[:, :, :n], kept)
        index.validate(1, n)
        fresh = method.decode(q, k[:, :, :n], LayerContext(scale=0.125))
        assert torch.equal(index.to_mask(1, n), fresh.to_mask(1, n))
    index = method.decode(q, k, kept)
    best = exact.decode(q, k, LayerContext(scale=0.125))
    mass = [float(weights[i.to_mask(1, 4096)[0, 0, 0]].sum()) for i in (index, best)]
    assert mass[0] > share * mass[1]


def test_layers_that_do_not_select_take_the_list_of_the_last_that_did() -> None:
    method = make(select_layers=[1, 3])
    shared: dict = {}
    layers = [LayerContext(i, 5, 0.25, shared=shared) for i in range(5)]
    queries = [rand(1, 4, 1, 16, seed=10 + i) for i in range(5)]
    keys = [rand(1, 2, 400, 16, seed=20 + i) for i in range(5)]
    masks = [
        method.decode(q, k, layer).to_mask(1, 400)
        for q, k, layer in zip(queries, keys, layers, strict=True)
    ]
    own = [
        make().decode(q, k, LayerContext(scale=0.25)).to_mask(1, 400)
        for q, k in zip(queries, keys, strict=True)
    ]
    for i, selecting in enumerate([0, 1, 1, 3, 3]):
        assert torch.equal(masks[i], own[selecting])
    # A list of another step is not taken.
    longer = torch.cat([keys[4], rand(1, 2, 1, 16)], dim=2)
    mask = method.decode(queries[4], longer, layers[4]).to_mask(1, 401)
    assert torch.equal(mask, make().decode(queries[4], longer, layers[4]).to_mask(1, 401))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [8, 4])
@pytest.mark.parametrize("Lq", [1, 3, 40])
@pytest.mark.parametrize("scope", ["layer", "kv_head"])
def test_compact_equals_attention_over_the_list_at_adjacent_positions(
    interleaved: bool, pairs: int, Lq: int, scope: str
) -> None:
    Lk, D = 400, 16
    inv_freq = 1e4 ** -(torch.arange(pairs) / pairs)
    rotary = Rotary(inv_freq, interleaved)
    method = make(positions="compact", chunk=40, scope=scope)
    q, k, v = rand(2, 4, Lq, D), rand(2, 2, Lk, D, seed=1), rand(2, 2, Lk, D, seed=2)

    def placed(x: Tensor, position: Tensor) -> Tensor:
        zero = torch.zeros_like(position)
        return rotate_to(x, zero, position, inv_freq, interleaved=interleaved)

    rotated_q = placed(q, torch.arange(Lk - Lq, Lk))
    rotated_k = placed(k, torch.arange(Lk))
    layer = LayerContext(scale=0.25, rotary=rotary)
    # Candidates vote at position 0, decode queries at `local`, those of a chunk one by one behind.
    level = 20 + (torch.arange(Lq) if Lq > 32 else torch.zeros(Lq, dtype=torch.int64))
    original = make(chunk=40, scope=scope).parts(placed(q, level), k, LayerContext(scale=0.25))
    ((_, _, index),) = original
    mask = index.to_mask(Lq, Lk)
    for a, b, moved in method.parts(rotated_q, rotated_k, layer):
        assert isinstance(moved, Moved)
        end = Lk - Lq + b
        assert torch.equal(moved.key_mask(end), mask[:, :, b - 1, :end])
        out = attention(
            rotated_q[:, :, a:b],
            *moved.gather(rotated_k[:, :, :end], v[:, :, :end]),
            scale=0.25,
            kv_start=moved.first,
        )
        for batch, h in itertools.product(range(2), range(4)):
            kv = h // 2
            listed = mask[batch, kv if scope == "kv_head" else 0, b - 1, :end].nonzero().flatten()
            # As the model would see a context of these tokens alone, at positions 0, 1, 2, ...
            at = torch.arange(len(listed))
            keys = placed(k[batch, kv, listed], at)
            queries = placed(q[batch, h, a:b], at[a - b :])
            logits = 0.25 * queries.double() @ keys.double().mT
            future = torch.ones_like(logits, dtype=torch.bool).triu(len(listed) - (b - a) + 1)
            weights = logits.masked_fill(future, -torch.inf).softmax(-1)
            expected = weights @ v[batch, kv, listed].double()
            torch.testing.assert_close(out[batch, h].double(), expected, atol=2e-5, rtol=1e-4)


def test_compact_votes_of_a_long_context_survive_lost_memory_and_do_not_depend_on_distance() -> (
    None
):
    inv_freq = 1e4 ** -(torch.arange(8) / 8)
    method = make(positions="compact", k=1)
    k, q = 0.1 * rand(1, 2, 900, 16), rand(1, 4, 1, 16, seed=1)
    found = []
    for needle in (30, 400, 850):
        keys = k.clone()
        zero = torch.zeros((), dtype=torch.int64)
        # What the query looks for `local` behind itself.
        keys[:, :, needle] = rotate_to(q[:, ::2, 0], zero, zero + 20, inv_freq)
        keys = rotate_to(keys, zero, torch.arange(900), inv_freq)
        query = rotate_to(q, zero, zero + 899, inv_freq)
        layer = LayerContext(scale=1.0, rotary=Rotary(inv_freq))
        for context in (layer, layer, LayerContext(scale=1.0, rotary=Rotary(inv_freq))):
            ((_, _, moved),) = method.parts(query, keys, context)
            found.append(bool(moved.key_mask(900)[0, 0, needle]))
    assert all(found)


def test_compact_needs_rotary_facts_and_is_dense_within_the_budget() -> None:
    method = make(positions="compact")
    q, k = rand(1, 4, 1, 16), rand(1, 2, 65, 16)
    assert [p[2] for p in method.parts(q, k, LayerContext())] == [None]
    with pytest.raises(NotImplementedError, match='tokenselect: positions: "compact"'):
        list(method.parts(q, rand(1, 2, 66, 16), LayerContext()))


@pytest.mark.parametrize("cosine", ["head", "layer"])
def test_ranks_that_share_the_heads_agree_with_one_that_has_them_all(cosine: str) -> None:
    method = make(cache_threshold=0.7, cache_cosine=cosine)
    q, k = drifting(30, 0.25), rand(1, 2, 430, 16, seed=1)
    q[:, 2:, 15:] = -q[:, 2:, 15:]  # the second rank turns alone
    one, hits = LayerContext(scale=0.25), []
    one.observe = lambda figures: hits.append(int(figures["cache_hits"]))
    expected = [
        method.decode(q[:, :, i : i + 1], k[:, :, : 400 + i], one).to_mask(1, 400 + i)
        for i in range(30)
    ]
    meet = threading.Barrier(2, timeout=20)
    slots: list[Any] = [None, None]
    results: list[list[Tensor]] = [[], []]

    def rank(r: int) -> None:
        def reduce(x: Tensor) -> Tensor:
            slots[r] = x
            meet.wait()
            total = slots[0] + slots[1]
            meet.wait()
            return total

        layer = LayerContext(scale=0.25, reduce=reduce)
        heads = q[:, 2 * r : 2 * r + 2]
        for i in range(30):
            index = method.decode(heads[:, :, i : i + 1], k[:, r : r + 1, : 400 + i], layer)
            results[r].append(index.to_mask(1, 400 + i))

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not meet.broken
    assert 0 < sum(hits) < 30
    for r in range(2):
        assert all(torch.equal(a, b) for a, b in zip(results[r], expected, strict=True))


def test_hyper_parameters_are_checked() -> None:
    for option, value in [
        ("pool", 4),
        ("scope", "head"),
        ("vote_scale", 2),
        ("scoring", "int2"),
        ("positions", "relative"),
        ("cache_threshold", 1.5),
        ("cache_cosine", "both"),
        ("tail", 33),
        ("k", 0),
        ("local", 0),
    ]:
        with pytest.raises(ValueError, match=f"tokenselect: {option}: expected"):
            get_method("tokenselect", **{option: value})
