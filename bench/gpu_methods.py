"""The cases of the GPU suite that run methods: whole prompts, and decode steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

import lowcontext
from bench.dense import best, dense_calls
from bench.device import Device
from bench.gpu_cases import DTYPE, Call, Case, D, Row, refused, timed, wrong
from bench.oracle import Part, sampled_error
from bench.structured import HEADS, structured
from bench.timing import interleave
from lowcontext import LayerContext, Method, get_method

# Behind the first layers that methods leave dense or treat otherwise.
LAYER = {"layer_idx": 5, "num_layers": 32}
# The size that most heads of the published pattern files have.
PUBLISHED = ("vertical_and_slash", 1000, 6096)
# The kernels that each method selects with, as tests name them.
OPS = {
    "minference": ("window", "lines", "topk"),
    "flexprefill": ("window", "blocks", "topk", "mass"),
    "xattention": ("blocks", "mass"),
    "hip": ("search",),
    "infinitehip": ("search",),
    "tokenselect": ("scores", "topk", "lists"),
    "quest": ("scores", "topk", "lists"),
}
# Budgets at which the methods select on the few keys of a CPU run.
SMALL = {"min_length": 0, "min_budget": 64, "vertical": 32, "slash": 128, "budget": 128}
SMALL |= {
    "window": 64,
    "block_q": 64,
    "k": 64,
    "local": 32,
    "sink": 16,
    "threshold": 0.5,
    "block": 64,
}
# Parts of a prompt, by number, whose output is checked; the last one is too.
_CHECKED = (0, 1, 4, 16, 64)


def make(name: str, tiny: bool, **options: Any) -> Method:
    """The method at its defaults but for `options`, or with small budgets."""
    method = get_method(name, **options)
    if not tiny:
        return method
    known = {f.name: SMALL[f.name] for f in fields(method) if f.name in SMALL}
    return get_method(name, **{**known, **options})


def needs(method: Method) -> tuple[str, ...]:
    """The tests behind a figure of the method."""
    return ("attend", *OPS[method.name], f"method {method.name}")


@dataclass(frozen=True)
class Prompt(Case):
    """A prompt through methods, score and select beside attend, and through dense attention.

    Queries and keys have the structure of `bench.structured`.

    Args:
        rounds: most rounds; with 1, for lengths where a call takes seconds, one dense candidate is
            timed, the fastest on 32K tokens.
    """

    section: ClassVar[str] = "methods"

    rounds: int = 5

    @property
    def bytes(self) -> int:
        """One head is made in fp32 at a time; an index part takes up to 1 GiB."""
        return super().bytes + self.L * D * 16 + 2**32

    def methods(self, tiny: bool) -> dict[str, Method]:
        """What is timed, by name."""
        sizes = ("vertical_and_slash", 30, 100) if tiny else PUBLISHED
        layer = {str(h): [*sizes, 1.0] for h in range(self.Hq)}
        patterns = [layer] * LAYER["num_layers"]
        published = make("minference", tiny, patterns=patterns, parity="minference")
        names = ("minference", "flexprefill", "xattention", "hip", "infinitehip")
        found = {name: make(name, tiny) for name in names}
        return {**found, "minference 1000/6096": published}

    def rows(self, device: Device) -> Iterator[Row]:
        """Dense candidates and every method."""
        q, k = self._structured(device)
        v = device.randn(*k.shape, dtype=DTYPE, seed=1)
        calls, missing = _dense(device, q, k, v, self.rounds == 1)
        for name, reason in missing.items():
            yield refused(name, reason)
        history: dict[str, list[dict[str, float]]] = {}
        runs: dict[str, Call] = {}
        for name, call in calls.items():
            runs[name] = _recorded(device, history.setdefault(name, []), partial(_whole, call))
        known: dict[str, Row] = {}
        chosen = self.methods(device.tiny)
        for name, method in chosen.items():
            look = Check(q, k, v)
            prompt(method, q, k, v, look=look)
            if look.wrong:
                yield refused(name, look.wrong, red=True)
                continue
            known[name] = {"density": look.density, "max_error": look.error}
            run = partial(prompt, method, q, k, v)
            runs[name] = _recorded(device, history.setdefault(name, []), run)

        def measure(call: Call) -> float:
            device.flush()
            return sum(call().values())

        once = self.rounds == 1
        times = interleave(
            runs, rounds=self.rounds, budget_s=self.timing, measure=measure, least=1,
            warm=not once,
        )  # fmt: skip
        dense = best({name: t.p50 for name, t in times.items()})
        for name, t in times.items():
            more = {"best_dense": dense, "speedup_over_dense": times[dense].p50 / t.p50}
            if name not in chosen:
                yield timed(name, t, ("attend",) if name == "ours-dense" else (), **more)
                continue
            laps = history[name] if once else history[name][1:]
            select, attend = (
                statistics.median(lap[what] for lap in laps) for what in ("select", "attend")
            )
            more |= {"select_ms": select, "attend_ms": attend, **known[name]}
            more["select_share"] = select / (select + attend)
            yield timed(name, t, needs(chosen[name]), config=str(chosen[name]), **more)

    def _structured(self, device: Device) -> tuple[Tensor, Tensor]:
        heads = (HEADS * 4)[: self.Hq]
        form = {"heads": heads, "group": self.Hq // self.Hkv, "device": device.kind, "dtype": DTYPE}
        rows = [structured(self.L, b, **form) for b in range(self.B)]
        if self.B == 1:
            return rows[0]
        q, k = (torch.cat(x) for x in zip(*rows, strict=True))
        return q, k


class Check:
    """Looks at the parts of a prompt: their density, and the errors of some of them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.inputs = q, k, v
        self.error, self.wrong = 0.0, ""
        self._number, self._pairs = 0, 0.0

    def __call__(self, part: Part, out: Tensor) -> None:
        row, end, index = part
        q, k, v = self.inputs
        keys = k.shape[2] - q.shape[2] + end
        rows = end - row
        causal = rows * (keys - rows) + rows * (rows + 1) / 2
        self._pairs += causal * (1.0 if index is None else index.density(rows, keys))
        if self._number in _CHECKED or end == q.shape[2]:
            inputs = q[:, :, row:end], k[:, :, :keys], v[:, :, :keys]
            error, allowed = sampled_error(*inputs, out, (0, rows, index), 1.0)
            self.error = max(self.error, error)
            self.wrong = self.wrong or wrong(error, allowed)
        self._number += 1

    @property
    def density(self) -> float:
        """Share of the causal pairs of the parts seen."""
        L = self.inputs[0].shape[2]
        return self._pairs / (L * (L + 1) / 2)


def prompt(
    method: Method,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lap: Callable[[str], None] = lambda name: None,
    look: Callable[[Part, Tensor], None] = lambda part, out: None,
) -> None:
    """What the integration does with the prompt of one layer.

    Args:
        method: selects.
        q, k, v: of the layer.
        lap: told when a part is selected ("select") and attended ("attend").
        look: given each part and its output.
    """
    for row, end, index in method.parts(q, k, LayerContext(**LAYER, scale=1.0)):
        lap("select")
        keys = k.shape[2] - q.shape[2] + end
        inputs = q[:, :, row:end], k[:, :, :keys], v[:, :, :keys]
        if index is None:
            out = lowcontext.attention(*inputs, scale=1.0)
        else:
            out = lowcontext.sparse_attention(*inputs, index, scale=1.0)
        lap("attend")
        look((row, end, index), out)


def _whole(call: Call, lap: Callable[[str], None]) -> None:
    call()
    lap("attend")


def _recorded(device: Device, history: list[dict[str, float]], run: Call) -> Call:
    """A call that gives the milliseconds between the laps of `run`, and keeps them."""

    def call() -> dict[str, float]:
        marks = [("", device.mark())]
        run(lap=lambda name: marks.append((name, device.mark())))
        history.append(device.laps(marks))
        return history[-1]

    return call


def _dense(
    device: Device, q: Tensor, k: Tensor, v: Tensor, once: bool
) -> tuple[dict[str, Call], dict[str, str]]:
    """`dense_calls` with scale 1; with `once`, that of others which is fastest on 32K tokens."""
    if not once:
        return dense_calls(q, k, v, 1.0)
    short, _ = dense_calls(*(x[:, :, :32768] for x in (q, k, v)), 1.0)
    times = {name: t.p50 for name, t in device.times(short, seconds=1.0).items()}
    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name in sorted(set(times) - {"ours-dense"}, key=times.__getitem__):
        calls, refused_here = dense_calls(q, k, v, 1.0, only=name)
        missing |= refused_here
        if calls:
            break
    return calls, missing


@dataclass(frozen=True)
class DecodeSteps(Case):
    """Decode steps, selection included, behind a context of random keys.

    A candidate runs `STEPS` steps on a cache that grows by a token each. Its figures are of a
    replayed CUDA graph, `eager_ms` of calls from Python.
    """

    section: ClassVar[str] = "decode steps"
    STEPS: ClassVar[int] = 8

    def methods(self, tiny: bool) -> dict[str, Method]:
        """What is timed, by name."""
        never: dict[str, Any] = {"cache_threshold": None}
        return {
            "tokenselect exact": make("tokenselect", tiny, scoring="exact", **never),
            "tokenselect int8": make("tokenselect", tiny, scoring="int8", **never),
            "tokenselect pages": make("tokenselect", tiny, scoring="pages", **never),
            "tokenselect hit": make("tokenselect", tiny, scoring="exact", cache_threshold=0.9),
            "quest": make("quest", tiny),
            "quest kv_head": make("quest", tiny, scope="kv_head"),
            "hip": make("hip", tiny),
            "infinitehip": make("infinitehip", tiny),
        }

    @property
    def bytes(self) -> int:
        """Votes of all heads and a second copy of the keys come on top."""
        return self.B * self.L * (4 * self.Hkv * D * DTYPE.itemsize + 16 * self.Hq) + 2**32

    def rows(self, device: Device) -> Iterator[Row]:
        """Dense candidates and every method."""
        q, k, v = self.qkv(device, self.STEPS)
        calls: dict[str, Call] = {}
        last, missing = dense_calls(q[:, :, -1:], k, v)
        for name, reason in missing.items():
            yield refused(name, reason)
        for name, call in last.items():
            calls[name] = lambda call=call: [call() for _ in range(self.STEPS)]
        chosen = self.methods(device.tiny)
        known: dict[str, Row] = {}
        for name, method in chosen.items():
            # A query that stays the same is one that may reuse.
            queries = q[:, :, :1].expand_as(q) if name.endswith("hit") else q
            layer = LayerContext(**LAYER, scale=D**-0.5)
            found = self._checked(method, queries, k, v, layer)
            failed = wrong(found["max_error"], found.pop("allowed"))
            if failed:
                yield refused(name, failed, red=True)
                continue
            known[name] = found
            calls[name] = partial(self._steps, method, queries, k, v, layer)
        eager = device.times(calls, seconds=self.timing / 2, rounds=10)
        graphs: dict[str, Call] = {}
        for name, call in calls.items():
            try:
                graphs[name] = device.captured(call)
            except RuntimeError as error:
                reason = str(error).splitlines()[0][:200]
                alone = eager[name].divided(self.STEPS).p50
                yield refused(name, f"not capturable: {reason}", name in chosen) | {
                    "eager_ms": alone
                }
                if device.broken():
                    raise
        times = device.times(graphs, seconds=self.timing / 2, rounds=10)
        dense = best({name: t.p50 for name, t in times.items()})
        for name, t in times.items():
            more: Row = {"best_dense": dense, "speedup_over_dense": times[dense].p50 / t.p50}
            more |= {"eager_ms": eager[name].divided(self.STEPS).p50}
            if name in chosen:
                more |= {"config": str(chosen[name]), **known[name]}
            wanted = needs(chosen[name]) if name in chosen else ()
            wanted = ("attend",) if name == "ours-dense" else wanted
            yield timed(name, t.divided(self.STEPS), wanted, **more)

    def _checked(self, method: Method, q: Tensor, k: Tensor, v: Tensor, layer: LayerContext) -> Row:
        """Density, error and allowed error of the first step, whose state the others go on with."""
        keys = self.L - self.STEPS + 1
        part = q[:, :, :1], k[:, :, :keys], v[:, :, :keys]
        index = method.decode(*part[:2], layer)
        if index is None:
            raise RuntimeError(f"{method}: expected a selection, got dense attention")
        out = lowcontext.sparse_attention(*part, index)
        error, allowed = sampled_error(*part, out, (0, 1, index), D**-0.5)
        return {"density": index.density(1, keys), "max_error": error, "allowed": allowed}

    def _steps(
        self, method: Method, q: Tensor, k: Tensor, v: Tensor, layer: LayerContext
    ) -> list[Tensor]:
        outs = []
        for r in range(self.STEPS):
            end = self.L - self.STEPS + r + 1
            part = q[:, :, r : r + 1], k[:, :, :end], v[:, :, :end]
            index = method.decode(*part[:2], layer)
            outs.append(lowcontext.sparse_attention(*part, index))
        return outs
