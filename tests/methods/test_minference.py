"""MInference: published selections against brute force, and the traps of the published code."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import lowcontext
from lowcontext import BlockIndex, LayerContext, attention, sparse_attention
from lowcontext.methods import minference


def qk(N: int, Lq: int = 0, G: int = 2, D: int = 16, seed: int = 0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shapes = [(1, 2 * G, Lq or N, D), (1, 2, N, D), (1, 2, N, D)]
    return [torch.randn(shape, generator=gen) for shape in shapes]


def make(*heads: tuple, **options):
    """A method with these patterns for the heads of its one layer."""
    table = [{str(h): [*p, 1.0] for h, p in enumerate(heads)}]
    return lowcontext.get_method("minference", patterns=table, min_length=0, **options)


def index_of(method, q: Tensor, k: Tensor, **layer) -> BlockIndex:
    (part,) = method.parts(q, k, LayerContext(**{"scale": q.shape[3] ** -0.5, **layer}))
    part[2].validate(q.shape[2], k.shape[2])
    return part[2]


def read_mask(method, q: Tensor, k: Tensor, **layer) -> Tensor:
    return index_of(method, q, k, **layer).to_mask(q.shape[2], k.shape[2])


def run(method, q: Tensor, k: Tensor, v: Tensor, layer: LayerContext | None = None) -> Tensor:
    out = []
    for row0, row1, index in method.parts(q, k, layer or LayerContext(scale=q.shape[3] ** -0.5)):
        end = k.shape[2] - q.shape[2] + row1
        args = (q[:, :, row0:row1], k[:, :, :end], v[:, :, :end])
        out.append(attention(*args) if index is None else sparse_attention(*args, index))
    return torch.cat(out, dim=2)


def weights(q: Tensor, k: Tensor, h: int, G: int) -> Tensor:
    """fp64 causal softmax of one query head: [Lq, Lk]."""
    Lq, Lk = q.shape[2], k.shape[2]
    logits = q[0, h].double() @ k[0, h // G].double().T * q.shape[3] ** -0.5
    future = torch.arange(Lk) > torch.arange(Lk - Lq, Lk)[:, None]
    return logits.masked_fill(future, -torch.inf).softmax(-1)


def published_lines(p: Tensor, v: int, s: int, least: int) -> tuple[set[int], set[int]]:
    """Vertical and slash lines of one head, from its dense softmax, by the published rule."""
    (n, N), last = p[-64:].shape, p[-64:]
    vertical = [(-(j < 30), -float(last[:, j].sum()), j) for j in range(N)]
    sums = [0.0] * N
    for r in range(n):
        for j in range(N - n + r + 1):
            sums[N - n + r - j] += float(last[r, j])
    slash = [(-(d < 100), -sums[d] if d >= 100 else 0.0, d) for d in range(N)]
    return (
        {j for _, _, j in sorted(vertical)[: max(v, 30)]},
        {d for _, _, d in sorted(slash)[: max(s, least)]},
    )


def covered(vertical: set[int], slash: set[int], m: int) -> set[int]:
    """Keys of block m by the merge rule."""
    end, ranges = 64 * (m + 1), []
    for e in sorted(max(end - d, 64) for d in slash if d < end):
        if not ranges or e - 64 > ranges[-1][1]:
            ranges.append([e - 64, e])
        elif e > ranges[-1][1]:
            ranges[-1][1] += 64
    inside = {j for a, b in ranges for j in range(a, b)}
    return inside | {j for j in vertical if ranges and j < ranges[-1][1]}


@pytest.mark.parametrize("parity", ["lowcontext", "minference"])
@pytest.mark.parametrize(("N", "Lq"), [(1, 1), (40, 40), (333, 333), (640, 200), (700, 65)])
def test_published_patterns_select_what_the_dense_softmax_says(
    parity: str, N: int, Lq: int
) -> None:
    q, k, _ = qk(N, Lq)
    sizes = [(35, 60), (30, 100), (60, 120), (0, 140)]
    method = make(*[("vertical_and_slash", v, s) for v, s in sizes], parity=parity)
    keys = index_of(method, q, k).key_mask(N)
    for h, (v, s) in enumerate(sizes):
        least = 50 if parity == "minference" else 100
        vertical, slash = published_lines(weights(q, k, h, 2), v, s, least)
        for n in range(keys.shape[2]):
            wanted = covered(vertical, slash, (N - Lq) // 64 + n)
            got = set(keys[0, h, n].nonzero()[:, 0].tolist())
            assert got == {j for j in wanted if j < N}


@pytest.mark.parametrize("N", [1, 2, 13, 63, 64, 65, 127, 130, 1000])
def test_every_length_gives_finite_output_and_reads_the_diagonal(N: int) -> None:
    q, k, v = qk(N)
    heads = [("vertical_and_slash", 30, 50), ("stream_llm", 4, 20), ("block_sparse", 8, 1)]
    for method in (
        make(*heads, ("tri_shape", 4, 20), tri_last=10),
        make(*heads, ("gain", 10, 64), parity="minference"),
        lowcontext.get_method("minference", min_length=0),
    ):
        assert torch.isfinite(run(method, q, k, v)).all()
    assert read_mask(make(*heads, ("gain", 0, 64)), q, k).diagonal(dim1=2, dim2=3).all()


def test_block_sparse_rounds_up_and_always_reads_the_first_block_and_the_diagonal() -> None:
    # Query blocks dislike block 0 and their own block, and like block 3.
    N = 64 * 130 + 5
    k = torch.zeros(1, 1, N, 8)
    k[0, 0, :64, 0], k[0, 0, 192:256, 0] = -9.0, 9.0
    q = torch.zeros(1, 1, N, 8)
    q[..., 0] = 1.0
    q[..., 1] = 1.0
    k[0, 0, torch.arange(N), 1] = -torch.arange(N) / N  # later blocks score lower
    method = make(("block_sparse", 8, 1))
    parts = list(method.parts(q, k, LayerContext()))
    index, (row0, row1, _) = parts[-1][2], parts[-1]
    keys = index.key_mask(N)
    assert int(index.kv_num_blocks.max()) == 100
    assert keys[0, 0, :, 0].all()
    assert keys[0, 0, :, 192].all()
    assert keys[0, 0, -1, -1]
    assert row1 - row0 == N % 8192
    short_q, short_k = q[:, :, :70], k[:, :, :70]
    assert read_mask(method, short_q, short_k).sum() == 70 * 71 // 2
    published = make(("block_sparse", 8, 1), parity="minference")
    assert int(index_of(published, short_q, short_k).kv_num_blocks.max()) == 1  # 70 // 64


def test_block_sparse_averages_the_last_block_over_its_own_tokens() -> None:
    N = 64 * 3 + 1
    q, k = torch.ones(1, 1, N, 8), torch.zeros(1, 1, N, 8)
    k[0, 0, -1] = 2.0  # mean 2 over one token, 2 / 64 over a block filled up with zeros
    k[0, 0, 64:128] = 1.0
    q, k = q.repeat(1, 2, 1, 1), k.repeat(1, 2, 1, 1)
    ours = minference.Selection(make(*[("block_sparse", 0, 0)] * 2), q, k, LayerContext())
    keys = ours.index(0, N).key_mask(N)
    assert keys[0, 0, 3].all()  # 4 blocks, budget of 4


@pytest.mark.parametrize(("s", "ratio"), [(0, 1.0), (50, 1.0), (99, 1.0), (100, 0.5)])
def test_distance_zero_is_chosen_at_any_budget(s: int, ratio: float) -> None:
    q, k, v = qk(1000, seed=3)
    for parity in ("lowcontext", "minference"):
        method = make(*[("vertical_and_slash", 40, s)] * 4, ratio=ratio, parity=parity)
        assert read_mask(method, q, k).diagonal(dim1=2, dim2=3).all()
        assert torch.isfinite(run(method, q, k, v)).all()


def test_no_key_is_listed_twice_and_every_column_is_visible_to_its_whole_block() -> None:
    draw = random.Random(0)
    for seed in range(30):
        N = draw.randint(1, 2000)
        q, k, _ = qk(N, draw.randint(1, N) if N > 40 else N, seed=seed)
        if q.shape[2] < N and q.shape[2] <= 32:
            continue
        sizes = [(draw.randint(0, 300), draw.randint(0, 300)) for _ in range(3)]
        index = index_of(
            make(*[("vertical_and_slash", *each) for each in sizes], ("gain", 300, 640)), q, k
        )  # validate() refuses overlaps
        first = (N - q.shape[2]) // 64
        columns = torch.arange(index.kv_columns.shape[3]) < index.kv_num_columns[..., None]
        block = torch.arange(first, first + columns.shape[2])[:, None] * 64
        assert not ((index.kv_columns > block) & columns).any()


def test_offsets_beyond_2_to_the_31_elements_are_addressed() -> None:
    # 65 rows, 2^25 elements apart; only their pages are ever touched.
    room = torch.empty(2**31 + 64, dtype=torch.float16)
    k = room.as_strided((1, 1, 65, 8), (2**31, 2**31, 2**25, 1))
    gen = torch.Generator().manual_seed(0)
    k.copy_(torch.randn(1, 1, 65, 8, generator=gen))
    q = torch.randn(1, 1, 65, 8, generator=gen).half()
    for near, far in zip(
        minference.last_window_scores(q, k.clone()),
        minference.last_window_scores(q, k),
        strict=True,
    ):
        assert torch.equal(near, far)


@pytest.mark.parametrize("G", [1, 2, 4])
def test_grouped_heads_select_as_repeated_keys_would_and_keep_the_order_of_the_file(G: int) -> None:
    q, k, _ = qk(700, G=G)
    heads = [("vertical_and_slash", 30 + 20 * h, 100 + 30 * h) for h in range(2 * G)]
    grouped = read_mask(make(*heads), q, k)
    repeated = read_mask(make(*heads), q, k.repeat_interleave(G, dim=1))
    assert torch.equal(grouped, repeated)
    for h in range(2 * G):
        alone = read_mask(make(heads[h]), q[:, h : h + 1], k[:, h // G : h // G + 1])
        assert torch.equal(grouped[:, h], alone[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_selects_the_same_mass(dtype: torch.dtype) -> None:
    q, k, _ = qk(1500)
    q = (3 * q).to(dtype)
    k = k.to(dtype)
    method = make(*[("vertical_and_slash", 60, 150)] * 2, *[("gain", 200, 320)] * 2)
    low, exact = read_mask(method, q, k), read_mask(method, q.float(), k.float())
    for h in range(4):
        p = weights(q, k, h, 2)
        assert abs(float((p * low[0, h]).sum() / (p * exact[0, h]).sum()) - 1) < 1e-3


def test_left_padded_rows_use_their_own_last_tokens() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64}
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 97, (2, 600))
    mask = torch.ones_like(ids)
    mask[0, :171] = 0
    patterns = [{str(h): ["vertical_and_slash", 40, 110, 0.9] for h in range(4)}] * 2
    with lowcontext.patched(model, "minference", patterns=patterns, min_length=0), torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        alone = model(ids[:1, 171:]).logits
        other = model(ids[1:]).logits
    torch.testing.assert_close(together[:1, 171:], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[1:], other, atol=1e-5, rtol=1e-4)


def test_lines_are_scored_with_the_queries_and_keys_that_the_model_rotated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64}
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 97, (1, 300))
    seen = []
    scores = minference.last_window_scores
    monkeypatch.setattr(
        minference, "last_window_scores", lambda q, k, **o: seen.append((q, k)) or scores(q, k, **o)
    )
    with lowcontext.patched(model, "minference", min_length=0), torch.no_grad():
        model(ids)
        block = model.model.layers[0]
        x = block.input_layernorm(model.model.embed_tokens(ids))
        cos, sin = model.model.rotary_emb(x, torch.arange(300)[None])
        plain = block.self_attn.q_proj(x), block.self_attn.k_proj(x)
        q, k = (y.view(1, 300, -1, 16).transpose(1, 2) for y in plain)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
    assert torch.allclose(seen[0][0], q, atol=1e-6)
    assert torch.allclose(seen[0][1], k, atol=1e-6)


def test_settings_are_checked() -> None:
    with pytest.raises(TypeError, match="minference: gain: expected a number, got 'high'"):
        lowcontext.get_method("minference", gain="high")
    with pytest.raises(ValueError, match="minference: ratio: expected at least 0, got -1"):
        lowcontext.get_method("minference", ratio=-1)
    with pytest.raises(ValueError, match="minference: parity: expected one of"):
        lowcontext.get_method("minference", parity="paper")


def test_forced_lines_count_towards_the_budget() -> None:
    q, k, _ = qk(900)
    chosen = minference.Selection(
        make(*[("vertical_and_slash", 30, 100), ("vertical_and_slash", 31, 101)] * 2),
        q,
        k,
        LayerContext(),
    )
    assert chosen.vertical.sum(-1).tolist() == [[30, 31, 30, 31]]
    assert chosen.slash.sum(-1).tolist() == [[100, 101, 100, 101]]
    assert chosen.vertical[..., :30].all()
    assert chosen.slash[..., :100].all()


def test_a_shape_reads_its_window_exactly_up_to_whole_tiles() -> None:
    q, k, _ = qk(1000)
    mask = read_mask(make(*[("stream_llm", 10, 200)] * 4), q, k)[0, 0]
    i, j = torch.arange(1000)[:, None], torch.arange(1000)
    exact = (j <= i) & ((i - j < 200) | (j < 10))
    assert (mask | ~exact).all()
    beyond = (i // 64 * 64 - j >= 200) & (j >= 10)  # further than 200 from the first row
    assert not (mask & beyond).any()


def test_tri_shape_leaves_the_last_queries_dense_and_only_their_blocks() -> None:
    q, k, _ = qk(1000)
    mask = read_mask(make(*[("tri_shape", 4, 64)] * 4, tri_last=50), q, k)[0, 0]
    assert mask[896:].sum() == torch.ones(1000, 1000).tril()[896:].sum()  # blocks 14 and 15
    stream = read_mask(make(*[("stream_llm", 4, 64)] * 4), q, k)[0, 0]
    assert torch.equal(mask[:896], stream[:896])


def test_softcap_reaches_the_estimator() -> None:
    q, k, _ = qk(900)
    q = 6 * q
    method = make(*[("vertical_and_slash", 60, 150)] * 4)
    assert not torch.equal(read_mask(method, q, k), read_mask(method, q, k, softcap=1.0))


def test_an_index_part_stays_below_256_mib_at_long_context() -> None:
    N = 200_000
    q = torch.zeros(1, 1, 1, 8).expand(1, 8, N, 8)
    k = torch.zeros(1, 1, 1, 8).expand(1, 2, N, 8)
    method = make(*[("vertical_and_slash", 3500, 6096)] * 8)
    row0, row1, index = next(iter(method.parts(q, k, LayerContext())))
    assert row0 == 0
    assert row1 == 8192
    assert index.kv_starts.numel() + index.kv_columns.numel() <= 2**26
    assert index.kv_columns.shape[3] == 3500


def test_chunked_rows_are_those_of_one_index() -> None:
    q, k, _ = qk(20000, 12345, G=1, D=8)
    method = make(("vertical_and_slash", 50, 130), ("block_sparse", 0, 0))
    whole = method.prefill(q, k, LayerContext()).key_mask(20000)
    parts = list(method.parts(q, k, LayerContext()))
    # Absolute 7655, 8192, 16384, 20000.
    assert [p[:2] for p in parts] == [(0, 537), (537, 8729), (8729, 12345)]
    first = 7655 // 64
    for row0, row1, index in parts:
        end = 7655 + row1
        keys = index.key_mask(end)
        n0 = (7655 + row0) // 64 - first
        part = whole[:, :, n0 : n0 + keys.shape[2], :end]
        assert torch.equal(keys[:, :1], part[:, :1])
        assert torch.equal(keys[:, 1:, :-1], part[:, 1:, :-1])


def test_all_heads_are_scored_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    scores = minference.last_window_scores
    monkeypatch.setattr(
        minference, "last_window_scores", lambda *a, **k: calls.append(1) or scores(*a, **k)
    )
    q, k, _ = qk(300, G=16)
    run(make(*[("vertical_and_slash", 40, 100)] * 32), q, k, k)
    assert len(calls) == 1
    run(lowcontext.get_method("minference", min_length=0), q, k, k)
    assert len(calls) == 3


def test_integer_tensors_are_refused_by_name() -> None:
    q = torch.zeros(1, 2, 100, 8, dtype=torch.int32)
    with pytest.raises(TypeError, match="q: expected a floating dtype, got torch.int32"):
        run(make(*[("vertical_and_slash", 40, 100)] * 2), q, q, q)


def test_a_planted_diagonal_is_a_distance_and_not_a_block_number() -> None:
    N, offset = 3000, 777
    gen = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, N, 64, generator=gen)
    q = torch.randn(1, 1, N, 64, generator=gen)
    q[:, :, offset:] += k[:, :, :-offset]
    for kind in (("vertical_and_slash", 30, 110), ("gain", 0, 640)):
        mask = read_mask(make(kind), q, k)[0, 0]
        rows = torch.arange(offset, N)
        assert mask[rows, rows - offset].float().mean() > 0.97
        assert mask.float().mean() < 0.15


def test_gain_keeps_columns_and_diagonals_apart() -> None:
    N = 4096
    gen = torch.Generator().manual_seed(1)
    k = torch.randn(1, 1, N, 64, generator=gen) / 8
    q = torch.randn(1, 1, N, 64, generator=gen) / 8
    columns = torch.tensor([500, 1234, 2000])
    k[0, 0, columns, 0] += 9.0
    q[..., 0] += 9.0
    method = make(("gain", 512, 640))
    index = index_of(method, q, k)
    mask = index.to_mask(N, N)[0, 0]
    assert mask[3000:, columns].all()
    # 64 window rows see each column at 64 distances: no tile is spent on those.
    assert int(index.kv_num_blocks.max()) == 2
    assert index.density(N, N) < 0.07
