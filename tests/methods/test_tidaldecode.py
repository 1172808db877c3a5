"""TidalDecode: dense layers that select, and layers that take their lists."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lowcontext import LayerContext, get_method
from lowcontext.methods.tidaldecode import TidalDecode


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(**options: object) -> TidalDecode:
    return get_method("tidaldecode", **{"k": 30, "select_layers": [1, 3], **options})


def oracle(q: Tensor, k: Tensor, position: int, count: int, local: int) -> set[int]:
    """Keys read by the queries q [n, D] of one list: the window, and the largest logits before."""
    low = position + 1 - local
    logits = (q.double() @ k[:low].double().T).amax(0).tolist()
    best = sorted(range(low), key=lambda i: (-logits[i], i))[:count]
    return {*best, *range(low, position + 1)}


@pytest.mark.parametrize("scope", ["query_head", "kv_head"])
@pytest.mark.parametrize("G", [1, 2, 4, 7, 8])
@pytest.mark.parametrize(("Lq", "local"), [(1, 1), (3, 1), (1, 9), (4, 9)])
def test_layers_read_what_the_last_selecting_layer_scored_highest(
    scope: str, G: int, Lq: int, local: int
) -> None:
    method, shared = make(scope=scope, local=local), {}
    queries = [rand(2, 2 * G, Lq, 16, seed=i) for i in range(5)]
    keys = [rand(2, 2, 200, 16, seed=10 + i) for i in range(5)]
    for i in range(5):
        index = method.decode(queries[i], keys[i], LayerContext(i, 5, shared=shared))
        if i in (0, 1, 3):
            assert index is None
            continue
        index.validate(Lq, 200)
        mask = index.to_mask(Lq, 200)
        assert mask.shape[1] == (2 * G if scope == "query_head" else 2)
        q, k = queries[i - 1], keys[i - 1]  # of the layer that selected
        for b in range(2):
            for h in range(mask.shape[1]):
                heads = [h] if scope == "query_head" else range(h * G, (h + 1) * G)
                kv = h // G if scope == "query_head" else h
                for r in range(Lq):
                    expected = oracle(q[b, list(heads), r], k[b, kv], 200 - Lq + r, 30, local)
                    assert set(mask[b, h, r].nonzero().flatten().tolist()) == expected


def test_a_list_of_another_step_is_not_taken() -> None:
    method, shared = make(), {}
    k = rand(1, 2, 101, 16)
    method.decode(rand(1, 4, 1, 16), k[:, :, :100], LayerContext(1, 5, shared=shared))
    later = LayerContext(2, 5, shared=shared)
    assert method.decode(rand(1, 4, 1, 16), k[:, :, :100], later) is not None
    assert method.decode(rand(1, 4, 1, 16), k, later) is None
    shared.clear()
    assert method.decode(rand(1, 4, 1, 16), k[:, :, :100], later) is None


def test_prefill_and_short_contexts_are_dense() -> None:
    method, shared = make(), {}
    q, k = rand(1, 4, 200, 16), rand(1, 2, 200, 16)
    assert [p[2] for p in method.parts(q, k, LayerContext(2, 5, shared=shared))] == [None]
    for i in range(3):
        layer = LayerContext(i, 5, shared=shared)
        assert method.decode(q[:, :, :1], k[:, :, :31], layer) is None


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"select_layers": [2, 13]}, range(2)),
        ({"select_layers": [3]}, range(4)),
        ({"select_layers": [1, 3]}, [0, 2, 4]),  # windows in the layers between
        ({"select_layers": [1, 3], "dense_layers": 2}, range(8)),
    ],
)
def test_a_model_in_which_a_selecting_layer_cannot_select_is_refused(
    options: dict[str, object], layers: Sequence[int]
) -> None:
    with pytest.raises(ValueError, match="tidaldecode: select_layers: expected layers with full"):
        make(**options).check_layers(layers)


def test_selecting_layers_behind_the_model_are_allowed() -> None:
    make(select_layers=[2, 13]).check_layers(range(4))
    make(select_layers=[2], dense_layers=2).check_layers([2, 5])


def test_hyper_parameters_are_checked() -> None:
    layers = [("select_layers", value) for value in ([], 1, "ab", [1, "2"], [-1], [True])]
    for option, value in [("scope", "layer"), ("k", 0), ("local", 0), *layers]:
        with pytest.raises(ValueError, match=f"tidaldecode: {option}: expected"):
            make(**{option: value})
