"""Triton backend: one source for every NVIDIA GPU from sm_80 on. Inference only.

triton is imported at the first call, so that this module loads on a machine without it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowcontext.index import BlockIndex

if TYPE_CHECKING:
    from lowcontext.ops.triton.launch import Launch, Target

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_D = 256
_MIN_CAPABILITY = 80


def interpreted() -> bool:
    """Whether triton's own switch TRITON_INTERPRET runs kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def status() -> str | None:
    """None if kernels can run on this machine, else why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if interpreted():
        return None
    if torch.version.hip is not None:
        return "ROCm is not supported"
    return None if torch.cuda.is_available() else "no CUDA device"


def supports(op: str, q: Tensor, k: Tensor, v: Tensor, index: BlockIndex | None) -> str | None:
    """None if the kernels can run `op` on these arguments, else the reason."""
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype}"
    D, Lk = q.shape[3], k.shape[2]
    if v.shape[3] != D:
        return f"a value head_dim ({v.shape[3]}) other than that of keys ({D})"
    if D > _MAX_D:
        return f"head_dim {D}, larger than {_MAX_D}"
    block_q = 1 if index is None else index.block_q
    if Lk + block_q >= 2**31 or q.shape[0] >= 2**16:
        return f"batch {q.shape[0]} and {Lk} keys: the grid and positions are 16 and 31 bits"
    if index is not None and (index.kv_starts.shape[3] + 1) * index.block_k >= 2**31:
        return "lists of 2**31 keys or more"
    if interpreted():
        # Its tl.dot multiplies the bits of bfloat16 as integers (triton 3.6 and 3.7).
        return "bfloat16 in triton's interpreter" if q.dtype == torch.bfloat16 else None
    return unfit_device(q)


def unfit_device(x: Tensor) -> str | None:
    """None if kernels can run on tensors where this one is, else the reason."""
    if interpreted():
        return None if x.device.type == "cpu" else f"device {x.device.type} in the interpreter"
    if x.device.type != "cuda":
        return f"device {x.device.type}"
    capability = _target(x.device.index).capability
    if capability < _MIN_CAPABILITY:
        return f"compute capability {capability / 10}, older than {_MIN_CAPABILITY / 10}"
    return None


def target(x: Tensor) -> Target:
    """What a plan needs to know of the device of a tensor."""
    if interpreted():
        from lowcontext.ops.triton.launch import Target

        return Target(capability=80, processors=8)
    return _target(x.device.index)


def execute(launches: Iterable[Launch], device: torch.device) -> None:
    """Runs launches one after the other on the current stream of the device."""
    if interpreted():
        for run in launches:
            run()
        return
    with torch.cuda.device(device):
        for run in launches:
            run()


def operator(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, which under torch.compile is one node of the graph, with the outputs of `fake`."""
    op = torch.library.custom_op(f"lowcontext_triton::{name}", run, mutates_args=())
    op.register_fake(fake)

    def call(*args: Any, **kwargs: Any) -> Any:
        # The dispatcher costs more than the plan: only a compiled graph pays for it.
        return op(*args, **kwargs) if torch.compiler.is_compiling() else run(*args, **kwargs)

    return call


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    *,
    scale: float,
    softcap: float,
    kv_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `lowcontext.sparse_attention`; returns (out, lse)."""
    return _attend(
        q,
        k,
        v,
        index.kv_num_blocks,
        index.kv_starts,
        index.kv_num_columns,
        index.kv_columns,
        *index.block_size,
        scale,
        softcap,
        0,
        kv_start,
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float,
    window: int,
    kv_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `lowcontext.attention`; returns (out, lse)."""
    return _attend(q, k, v, None, None, None, None, 1, 1, scale, softcap, window, kv_start)


def _attend(*args: object) -> tuple[Tensor, Tensor]:
    # The dispatcher costs more than the plan: only a compiled graph pays for it.
    return _attend_op(*args) if torch.compiler.is_compiling() else _run(*args)  # type: ignore


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor | None,
    kv_starts: Tensor | None,
    kv_num_columns: Tensor | None,
    kv_columns: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    softcap: float,
    window: int,
    kv_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from lowcontext.ops.triton import launch

    index = None
    if kv_num_blocks is not None and kv_starts is not None:
        index = BlockIndex(kv_num_blocks, kv_starts, (block_q, block_k), kv_num_columns, kv_columns)
    problem = launch.Problem(q, k, v, index, scale, softcap, window, kv_start)
    launches, out, lse = launch.plan(problem, target(q))
    execute(launches, q.device)
    return out, lse


_attend_op = torch.library.custom_op(
    "lowcontext_triton::attend", _run, mutates_args=(), device_types=None
)


@_attend_op.register_fake
def _(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    B, Hq, Lq, D = q.shape
    out = q.new_empty((B, Lq, Hq, D)).transpose(1, 2)
    return out, q.new_empty((B, Hq, Lq), dtype=torch.float32)


@cache
def _target(device: int | None) -> Target:
    from lowcontext.ops.triton.launch import Target

    properties = torch.cuda.get_device_properties(device)
    return Target(
        capability=10 * properties.major + properties.minor,
        processors=properties.multi_processor_count,
    )
