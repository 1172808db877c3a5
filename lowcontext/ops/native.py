"""The native backend: C++ kernels of csrc, loaded on first use.

The kernels for the CPU are compiled for several instruction sets; the widest one that the machine
has is picked at run time. Formulas and layouts are in csrc/cpu/panel.h and csrc/cpu/decode.h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowcontext.index import BlockIndex

BUILD_COMMAND = "python setup.py build_ext --inplace"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


@cache
def status() -> str | None:
    """None if the extension is loaded, else why it is not; loads it on the first call."""
    found = sorted(Path(__file__).parent.parent.glob("_C.*"))
    libraries = [path for path in found if path.suffix in (".so", ".pyd", ".dylib")]
    if not libraries:
        return f"the extension is not built; build it with `{BUILD_COMMAND}`"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"{libraries[0].name} does not load ({error}); rebuild it with `{BUILD_COMMAND}`"
    torch.library.register_fake("lowcontext::sparse_attention", _fake_sparse_attention)
    torch.library.register_fake("lowcontext::attention", _fake_attention)
    return None


def supports(op: str, q: Tensor, k: Tensor, v: Tensor, index: BlockIndex | None) -> str | None:
    """None if the kernels take these arguments, else the reason they do not."""
    if q.device.type != "cpu":
        return f"its kernels run on the CPU, q is on {q.device.type}"
    if q.dtype not in _DTYPES:
        return f"its kernels take fp32, bf16 and fp16, q is {q.dtype}"
    D, Dv = q.shape[3], v.shape[3]
    if Dv != D:
        return f"its kernels take one head_dim, q has {D} and v has {Dv}"
    if D % 8 or not 0 < D <= _MAX_HEAD_DIM:
        return f"its kernels take a head_dim that is a multiple of 8 up to 256, q has {D}"
    return None


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
    require_library()
    return torch.ops.lowcontext.sparse_attention(
        q,
        k,
        v,
        index.kv_num_blocks,
        index.kv_starts,
        index.kv_num_columns,
        index.kv_columns,
        index.block_q,
        index.block_k,
        scale,
        softcap,
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
    require_library()
    return torch.ops.lowcontext.attention(q, k, v, scale, softcap, window, kv_start)


def prefer_huge_pages(*fresh: Tensor) -> None:
    """Asks the system for huge pages under large CPU buffers that are still untouched.

    A list of keys touches a page per key or tile; with 4 KiB pages their table entries are as cold
    as the keys. Does nothing without the extension, on a GPU, or while torch.compile traces.

    Args:
        fresh: contiguous tensors from `torch.empty`.
    """
    if torch.compiler.is_compiling() or status() is not None:
        return
    for tensor in fresh:
        if tensor.device.type == "cpu":
            torch.ops.lowcontext._prefer_huge_pages(tensor)


def cpu_isa() -> str:
    """The instruction set of the CPU kernels in use: avx512, avx2 or portable.

    Raises:
        RuntimeError: the extension is not built; the message has the build command.
    """
    require_library()
    return torch.ops.lowcontext.cpu_isa()


@torch.compiler.assume_constant_result
def require_library() -> None:
    """Raises RuntimeError, with the build command, unless the extension is loaded."""
    reason = status()
    if reason:
        raise RuntimeError(f"native backend: {reason}")


def loader(fakes: Mapping[str, Callable[..., Any]]) -> Callable[[], None]:
    """A function that loads the extension and registers fakes of its ops, by name, at first use."""

    @cache
    def register() -> None:
        require_library()
        for name, fake in fakes.items():
            torch.library.register_fake(f"lowcontext::{name}", fake)

    def load() -> None:
        register()

    return torch.compiler.assume_constant_result(load)


def _fake_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    B, Hq, Lq, D = q.shape
    return q.new_empty((B, Hq, Lq, D)), q.new_empty((B, Hq, Lq), dtype=torch.float32)


def _fake_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_starts: Tensor,
    kv_num_columns: Tensor | None,
    kv_columns: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    softcap: float,
    kv_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _fake_outputs(q)


def _fake_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float,
    window: int,
    kv_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _fake_outputs(q)
