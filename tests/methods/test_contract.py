"""What every method must keep, whatever it selects. A new method gets these tests for free."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from budgets import COVERING, options
from torch import Tensor

import lowcontext
from lowcontext import BlockIndex, LayerContext, Method, attention, sparse_attention
from lowcontext.methods import combine, method_class

METHODS = lowcontext.available_methods()
# A list that is kept for some steps (refresh > 1) depends on the query that made it, and a dense
# end (dense_last) or one that selects for itself (tail) on where the prompt ends: the methods that
# have these test them themselves.
SMALL = {
    "budget": 512,
    "window": 96,
    "dense_layers": 0,
    "min_length": 0,
    "refresh": 1,
    "dense_last": 0,
    "min_budget": 128,
    "k": 100,
    "sink": 70,
    "local": 90,
    "chunk": 128,
    "tail": 0,
}


def make(name: str, values: dict = SMALL) -> Method:
    return lowcontext.get_method(name, **options(name, values))


def qkv(Lq: int, Lk: int, G: int = 4, B: int = 1, D: int = 16, seed: int = 0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shapes = [(B, 2 * G, Lq, D), (B, 2, Lk, D), (B, 2, Lk, D)]
    return [torch.randn(shape, generator=gen) for shape in shapes]


def run(method: Method, q: Tensor, k: Tensor, v: Tensor, layer: LayerContext) -> Tensor:
    out = []
    for row0, row1, index in method.parts(q, k, layer):
        end = k.shape[2] - q.shape[2] + row1
        args = (q[:, :, row0:row1], k[:, :, :end], v[:, :, :end])
        out.append(
            attention(*args, backend="reference")
            if index is None
            else sparse_attention(*args, index, backend="reference")
        )
    return torch.cat(out, dim=2)


def indices(
    method: Method, q: Tensor, k: Tensor, layer: LayerContext
) -> list[tuple[int, int, BlockIndex]]:
    offset = k.shape[2] - q.shape[2]
    parts = list(method.parts(q, k, layer))
    assert [p[0] for p in parts] == [0, *(p[1] for p in parts[:-1])]
    assert parts[-1][1] == q.shape[2]
    return [(r1 - r0, offset + r1, index) for r0, r1, index in parts if index is not None]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("G", [1, 4, 7, 8])
@pytest.mark.parametrize(
    ("Lq", "Lk"),
    [(1, 1), (63, 63), (64, 64), (65, 65), (1000, 1000), (300, 1001), (1, 1000), (5, 1003)],
)
def test_index_is_valid_and_reads_the_diagonal(name: str, G: int, Lq: int, Lk: int) -> None:
    q, k, _ = qkv(Lq, Lk, G)
    for rows, end, index in indices(make(name), q, k, LayerContext(num_layers=4)):
        index.validate(rows, end)
        assert index.kv_starts.shape[1] in (1, 2, 2 * G)
        assert index.to_mask(rows, end).diagonal(end - rows, dim1=2, dim2=3).all()
        assert index.kv_num_blocks.device == q.device


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("Lq", "Lk"), [(700, 700), (130, 900), (1, 900), (4, 900)])
def test_a_budget_that_covers_the_context_equals_dense(name: str, Lq: int, Lk: int) -> None:
    q, k, v = qkv(Lq, Lk)
    out = run(make(name, COVERING), q, k, v, LayerContext())
    torch.testing.assert_close(out, attention(q, k, v, backend="reference"), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("Lq", "Lk"), [(900, 900), (1, 900)])
def test_batch_rows_are_independent(name: str, Lq: int, Lk: int) -> None:
    q, k, v = qkv(Lq, Lk, B=3)
    together = run(make(name), q, k, v, LayerContext())
    for b in range(3):
        alone = run(make(name), *(x[b : b + 1] for x in (q, k, v)), LayerContext())
        torch.testing.assert_close(together[b : b + 1], alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_memory_can_be_dropped_at_any_step(name: str) -> None:
    q, k, v = qkv(1000, 1000)
    kept = LayerContext()
    method = make(name)
    run(method, q[:, :, :900], k[:, :, :900], v[:, :, :900], kept)
    for n in range(900, 960):
        args = (q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n])
        dropped = run(method, *args, LayerContext())
        torch.testing.assert_close(run(method, *args, kept), dropped, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_same_input_gives_the_same_index(name: str) -> None:
    q, k, _ = qkv(800, 800)
    first = indices(make(name), q, k, LayerContext())
    second = indices(make(name), q, k, LayerContext())
    for (rows, end, a), (_, _, b) in zip(first, second, strict=True):
        assert torch.equal(a.to_mask(rows, end), b.to_mask(rows, end))


@pytest.mark.parametrize("name", METHODS)
def test_future_keys_do_not_change_what_earlier_queries_get(name: str) -> None:
    q, k, v = qkv(512, 512)
    noise_k, noise_v = k.clone(), v.clone()
    noise_k[:, :, 384:], noise_v[:, :, 384:] = 100.0, 1e6
    method = make(name)
    if not method.query_chunk and name != "quest":  # may score with the last queries
        pytest.skip(f"{name} selects with the whole prompt")
    before, after = (
        run(method, q[:, :, :384], kk[:, :, :384], vv[:, :, :384], LayerContext())
        for kk, vv in ((k, v), (noise_k, noise_v))
    )
    assert torch.equal(before, after)
    whole = run(method, q, noise_k, noise_v, LayerContext())[:, :, :384]
    torch.testing.assert_close(whole, before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_decode_reads_no_tensor_on_the_host(name: str) -> None:
    # A meta tensor has no data: any read of its contents raises.
    q = torch.empty(2, 8, 1, 16, device="meta")
    k = torch.empty(2, 2, 4096, 16, device="meta")
    parts = list(make(name).parts(q, k, LayerContext()))
    assert len(parts) == 1


@pytest.mark.parametrize("name", METHODS)
def test_dense_layers_and_short_contexts_are_dense(name: str) -> None:
    q, k, _ = qkv(700, 700)
    first = make(name, {**SMALL, "dense_layers": 2})
    assert not indices(first, q, k, LayerContext(layer_idx=1, num_layers=4))
    assert not indices(make(name, {**SMALL, "min_length": 701}), q, k, LayerContext())


@pytest.mark.parametrize("name", METHODS)
def test_hyper_parameters_are_checked_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected hyper-parameters among .*'nonsense'"):
        lowcontext.get_method(name, nonsense=1)
    with pytest.raises(ValueError, match=f"{name}: min_length: expected at least 0, got -1"):
        lowcontext.get_method(name, min_length=-1)
    with pytest.raises(TypeError, match=f"{name}: dense_layers: expected an int, got 'two'"):
        lowcontext.get_method(name, dense_layers="two")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_docstring_with_its_source_and_a_test_file(name: str) -> None:
    cls = method_class(name)
    assert cls.__doc__
    assert cls.name == name
    assert (Path(__file__).parent / f"test_{name}.py").exists()


def test_long_prompts_are_cut_into_chunks_at_fixed_positions() -> None:
    method = make("block_topk")
    q, k = torch.empty(1, 1, 9000, 1), torch.empty(1, 1, 20000, 1)
    small = [(r0, r1) for r0, r1, _ in type(method).parts(_NoIndex(), q, k, LayerContext())]
    assert small == [(0, 5384), (5384, 9000)]  # absolute 11000..16384..20000


class _NoIndex(Method):
    name = "none"

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        return None

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        return None


def test_two_methods_run_as_one_with_separate_memory() -> None:
    both = combine(prefill=make("block_topk"), decode=make("quest"))
    q, k, v = qkv(1000, 1000)
    layer = LayerContext()
    out = run(both, q[:, :, :999], k[:, :, :999], v[:, :, :999], layer)
    expected = run(make("block_topk"), q[:, :, :999], k[:, :, :999], v[:, :, :999], LayerContext())
    assert torch.equal(out, expected)
    step = run(both, q[:, :, 999:], k, v, layer)
    assert torch.equal(step, run(make("quest"), q[:, :, 999:], k, v, LayerContext()))
    assert set(layer.memory) == {"prefill", "decode"}


def test_combine_refuses_what_it_cannot_place() -> None:
    with pytest.raises(TypeError, match="got both"):
        combine("dense", prefill="dense")
    with pytest.raises(TypeError, match="got none of them"):
        combine()
    with pytest.raises(TypeError, match="options: expected none beside"):
        combine(prefill="dense", decode="quest", budget=64)
    with pytest.raises(TypeError, match="options: expected none beside"):
        combine(make("dense"), budget=64)
    with pytest.raises(ValueError, match="method: expected one of .*'qest'"):
        combine("qest")


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_config_files_give_hyper_parameters_and_arguments_override_them(
    tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"quest.{suffix}"
    text = '{"budget": 640, "page": 32}' if suffix == "json" else "budget: 640\npage: 32\n"
    file.write_text(text)
    method = lowcontext.get_method("quest", config=file, page=8)
    assert (method.budget, method.page) == (640, 8)
    (tmp_path / "quest.toml").write_text("")
    with pytest.raises(ValueError, match=r"config: expected a .json, .yaml or .yml file"):
        lowcontext.get_method("quest", config=tmp_path / "quest.toml")


@pytest.mark.parametrize("name", METHODS)
def test_settings_hold_every_hyper_parameter_as_json_gives_it_back(name: str) -> None:
    method = make(name)
    settings = method.settings
    assert set(settings) == {"name", *(field.name for field in fields(method))}
    assert json.loads(json.dumps(settings)) == settings
    given = options(name, SMALL)
    assert {key: settings[key] for key in given} == given


@pytest.mark.parametrize(
    ("name", "option"),
    [("minference", "gain"), ("flexprefill", "gamma"), ("xattention", "threshold")],
)
def test_a_hyper_parameter_that_is_no_number_is_refused(name: str, option: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: {option}: expected .* 0, got nan"):
        lowcontext.get_method(name, **{option: math.nan})
