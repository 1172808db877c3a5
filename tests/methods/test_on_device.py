"""Every method on tensors that the host cannot read: no wait for a device, no copy to it.

Meta tensors stand for those of a GPU: they have shapes, and whoever reads a value fails. Kernels
are planned, not run. What a mode sees besides is what would make a GPU wait without an error here:
operations on a mask whose result has the mask's number of entries, and tensors of the host. A last
test lists every place where the sources read a tensor, with its reason.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowcontext
from lowcontext import LayerContext, Method, attention, sparse_attention
from lowcontext.methods.base import Moved, Rotary
from lowcontext.ops import (
    _dispatch,
    block_scores,
    hierarchy,
    lists,
    reuse,
    rotary,
    vertical_slash,
    votes,
)
from lowcontext.ops import triton as backend

pytest.importorskip("triton", reason="the Triton backend is optional")

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}


class Device(TorchDispatchMode):
    """Raises where a GPU would wait for the host, or the host for it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in READS:
            raise AssertionError(f"{func} reads a tensor on the host")
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            masks = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
            if any(x.dtype in (torch.bool, torch.uint8) for x in masks):
                raise AssertionError(f"{func} with a mask counts it on the host")
        # In arithmetic, a number of the host is an argument of a kernel.
        copied = [x.dim() or func is aten._to_copy.default for x in given if x.device.type == "cpu"]
        mixed = any(copied) and any(x.device.type == "meta" for x in (*given, *made))
        if mixed and not (kwargs or {}).get("non_blocking"):
            raise AssertionError(f"{func} copies a tensor of the host to the device")
        return out


class Lists(TorchFunctionMode):
    """Raises where a list becomes a tensor on the device, a copy that `Device` does not see."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            entries = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(entry, (list, range)) for entry in entries):
                raise AssertionError(f"an index of a list, {args[1]}, is copied to the device")
        if func in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None:
            raise AssertionError(f"{func.__name__} with a device copies {args[0]} to it")
        return func(*args, **(kwargs or {}))


FAMILIES = (votes, lists, block_scores, vertical_slash, hierarchy, rotary, reuse)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Triton as on a GPU, but launches are listed, not run; another backend is an error."""
    from lowcontext.ops.triton.launch import Target

    names: list[str] = []

    def execute(launches: Any, device: torch.device) -> None:
        names.extend(each.kernel.__name__ for each in launches)

    def unfit(x: Tensor) -> str | None:
        return None if x.device.type == "meta" else f"device {x.device.type}"

    choose = _dispatch.choose

    def choose_kernels(family: Any, op: str, name: str, like: Tensor) -> str:
        chosen = choose(family, op, name, like)
        if chosen != "triton":
            raise AssertionError(f"{op} runs on {chosen}")
        return chosen

    for module in (backend, *(family.BACKENDS["triton"] for family in FAMILIES)):
        monkeypatch.setattr(module, "execute", execute)
        monkeypatch.setattr(module, "unfit_device", unfit)
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    monkeypatch.setattr(backend, "_target", lambda device: Target(90, 132))
    monkeypatch.setattr(
        _dispatch, "unusable", lambda name: None if name == "triton" else "not on this device"
    )
    monkeypatch.setattr(_dispatch, "choose", choose_kernels)
    yield names
    assert names, "expected kernels"


def attend(method: Method, q: Tensor, k: Tensor, v: Tensor, layer: LayerContext) -> None:
    for row0, row1, index in method.parts(q, k, layer):
        end = k.shape[2] - q.shape[2] + row1
        args = q[:, :, row0:row1], k[:, :, :end], v[:, :, :end]
        if index is None:
            attention(*args)
        elif isinstance(index, Moved):
            attention(args[0], *index.gather(*args[1:]), kv_start=index.first)
        else:
            sparse_attention(*args, index)


PATTERNS = [
    {
        "0": ["vertical_and_slash", 500, 700, 1],
        "1": ["stream_llm", 100, 1000, 1],
        "2": ["tri_shape", 100, 1000, 1],
        "3": ["block_sparse", 100, 800, 1],
        "4": ["dense", 0, 0, 1],
        "5": ["gain", 1000, 8000, 1],
        "6": ["vertical_and_slash", 100, 2000, 1],
        "7": ["block_sparse", 100, 800, 1],
    }
]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in lowcontext.available_methods()),
    ("minference", {"patterns": PATTERNS}),
    ("minference", {"patterns": PATTERNS, "parity": "minference"}),
    ("flexprefill", {"gamma": 1.0, "max_budget": 4096}),
    ("xattention", {"threshold": 1.0, "dense_last": 0}),
    ("quest", {"scope": "kv_head", "dense_layers": 0}),
    ("hip", {"refresh": 1, "share": "layer"}),
    ("hip", {"positions": "streaming", "share": "layer"}),
    ("infinitehip", {"positions": "streaming", "share": "layer"}),
    ("infinitehip", {"refresh": 1, "dense_layers": 0}),
    ("recycled", {"threshold": None}),
    ("tidaldecode", {"select_layers": [0], "scope": "kv_head"}),
    ("tokenselect", {"scoring": "exact", "scope": "layer", "pool": 5}),
    ("tokenselect", {"scoring": "int8", "cache_threshold": 0.9}),
    ("tokenselect", {"scoring": "int4"}),
    ("tokenselect", {"positions": "compact", "cache_threshold": 0.9, "cache_cosine": "layer"}),
    ("tokenselect", {"select_layers": [0]}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda x: str(x)[:60])
def test_prefill_and_decode_neither_wait_for_the_device_nor_copy_to_it(
    name: str, options: dict[str, Any], launched: list[str]
) -> None:
    method = lowcontext.get_method(name, **options)
    N, D = 9000, 64
    q = torch.empty(2, 8, N, D, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, 2, N + 4, D, dtype=torch.bfloat16, device="meta")
    rotation = Rotary(torch.empty(D // 2, device="meta"))
    shared: dict[str, Any] = {}
    layers = [LayerContext(n, 4, D**-0.5, shared=shared, rotary=rotation) for n in range(4)]
    if options.get("patterns") is not None:
        layers = [LayerContext(0, 1, D**-0.5, rotary=rotation)]
    with Device(), Lists(), torch.inference_mode():
        # A prompt in two calls, single steps, and a speculative one of three tokens.
        for first, end in ((0, 5000), (5000, N), (N, N + 1), (N + 1, N + 2), (N + 2, N + 4)):
            for layer in layers:
                keys = k[:, :, :end]
                attend(method, q[:, :, : end - first], keys, keys, layer)


WAITS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "a truth value": lambda x, flags: bool(flags.any()),
    "a number": lambda x, flags: x.sum().item(),
    "a list": lambda x, flags: x.tolist(),
    "places": lambda x, flags: flags.nonzero(),
    "entries of a mask": lambda x, flags: x[flags],
    "a write by a mask": lambda x, flags: x.__setitem__(flags, x),
    "a list of places": lambda x, flags: x[[0, 2]],
    "a write to a list": lambda x, flags: x.__setitem__([0, 2], 1.0),
    "a tensor of a list": lambda x, flags: torch.tensor([1.0, 2.0], device="meta"),
    "a tensor of a number": lambda x, flags: torch.tensor(1.0, device="meta"),
    "a copy": lambda x, flags: torch.zeros(3).to("meta"),
    "a copy of a number": lambda x, flags: torch.zeros(()).to("meta"),
    "another backend": lambda x, flags: votes.topk(torch.zeros(3), 2),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_would_wait_is_found(name: str, launched: list[str]) -> None:
    x = torch.zeros(4, device="meta")
    flags = torch.zeros(4, dtype=torch.bool, device="meta")
    with Device(), Lists():
        votes.mass_mask(x, 0.5)
        with pytest.raises((AssertionError, RuntimeError)):
            WAITS[name](x, flags)


class Operations(TorchDispatchMode):
    """Names PyTorch's operations on tensors: each is a launch, but for views and allocations."""

    FREE: ClassVar[set[str]] = {
        *("empty", "new_empty", "empty_strided", "empty_like"),
        *(
            "alias",
            "view",
            "flatten",
            "expand",
            "slice",
            "select",
            "transpose",
            "unsqueeze",
            "squeeze",
            "reshape",
        ),
    }

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


# The most launches of a decode step in a layer, the two of attention included: each takes
# microseconds, and dense decode over 128K keys takes an H200 a ninth of a millisecond.
LAUNCHES: list[tuple[str, dict[str, Any], int]] = [
    ("dense", {}, 2),
    ("streaming_llm", {}, 5),
    ("quest", {}, 5),
    ("block_topk", {}, 6),
    ("tokenselect", {}, 11),
    ("tokenselect", {"scoring": "exact"}, 8),
    ("tokenselect", {"scoring": "int8"}, 11),
    ("tokenselect", {"scoring": "exact", "cache_threshold": 0.9}, 13),
    ("tokenselect", {"positions": "compact"}, 16),
    ("recycled", {}, 17),
    ("hip", {}, 3),
    ("infinitehip", {}, 3),
]


@pytest.mark.parametrize(("name", "options", "most"), LAUNCHES, ids=lambda x: str(x))
def test_a_decode_step_takes_few_launches(
    name: str, options: dict[str, Any], most: int, launched: list[str]
) -> None:
    method = lowcontext.get_method(name, **options)
    N, D = 2**17, 128
    q = torch.empty(1, 32, 1, D, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 8, N + 5, D, dtype=torch.bfloat16, device="meta")
    layer = LayerContext(5, 32, D**-0.5, rotary=Rotary(torch.empty(D // 2, device="meta")))
    # The first step also makes bounds or copies of all the keys; the one counted needs none.
    for end in (N, N + 1, N + 2):
        launched.clear()
        with Operations(launched), torch.inference_mode():
            attend(method, q, k[:, :, :end], k[:, :, :end], layer)
    assert len(launched) <= most, launched


# Where ops and methods read a tensor on the host, and why a GPU does not wait there in a step.
ALLOWED = {
    "index.py from_mask": "an index by hand, from a token mask",
    "index.py to_flex": "for comparisons with FlexAttention",
    "index.py _raise_at": "validate, for tests",
    "methods/base.py density": "a measurement",
    "methods/flexprefill.py _index": "on a CPU alone: pooled scores that no head asks for",
    "methods/_reuse.py reuse": "on a CPU alone: rows that reuse their selection",
}
METHODS_THAT_READ = {"item", "tolist", "nonzero", "cpu", "numpy", "masked_select", "unique"}
REDUCTIONS = {"any", "all", "sum", "max", "min", "mean"}


def reads(tree: ast.AST) -> bool:
    """Whether an expression makes numbers of the host from a tensor."""
    if not isinstance(tree, ast.Call):
        return False
    if isinstance(tree.func, ast.Attribute):
        return tree.func.attr in METHODS_THAT_READ
    inner = tree.args[0] if tree.args else None
    reduced = isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute)
    named = isinstance(tree.func, ast.Name) and tree.func.id in ("bool", "int", "float")
    return named and reduced and inner.func.attr in REDUCTIONS  # type: ignore[union-attr]


def test_every_read_on_the_host_has_its_reason() -> None:
    root = Path(lowcontext.__file__).parent
    found = set()
    for path in (root / "index.py", *root.glob("ops/**/*.py"), *root.glob("methods/*.py")):
        for tree in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(tree, ast.FunctionDef) and any(reads(x) for x in ast.walk(tree)):
                found.add(f"{path.relative_to(root).as_posix()} {tree.name}")
    assert found == set(ALLOWED)
