"""Host time of a decode step on a GPU: planned and launched from Python, run by nobody.

    python -m bench.host_time

Triton's driver is replaced by one whose launches do nothing, so that a machine without a GPU can
time what stands before each kernel: checks, plans, allocations and Triton's own launch code. What
the CUDA driver adds, some microseconds a launch, is not in it.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Iterator
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table

from lowcontext import LayerContext, attention, get_method, sparse_attention
from lowcontext.ops import _dispatch, block_scores, hierarchy, lists, reuse, rotary, votes
from lowcontext.ops import triton as backend
from lowcontext.ops.triton.launch import Launch, Target

FAMILIES = (votes, lists, reuse, rotary, block_scores, hierarchy)
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    ("hip", {}),
    ("quest", {}),
    ("block_topk", {}),
    ("tokenselect", {"scoring": "exact"}),
    ("tokenselect", {}),
]
app = typer.Typer(add_completion=False)


class Driver:
    """Compiles for sm_90 and runs nothing."""

    launcher_cls = staticmethod(lambda source, metadata: lambda *args: None)

    class utils:
        """What triton asks of a device before its first launch."""

        @staticmethod
        def load_binary(*args: Any) -> tuple[int, ...]:
            """Module, function, registers, spills and threads."""
            return 0, 0, 32, 0, 1024

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            """Those of an H200 that bound a launch."""
            return {"max_shared_mem": 232448, "max_num_regs": 65536, "warpSize": 32}

    def get_current_target(self) -> Any:
        """sm_90."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


@contextlib.contextmanager
def null_gpu(seen: list[str]) -> Iterator[None]:
    """Tensors of the CPU are taken for those of a GPU; `seen` gets the names of kernels."""
    from triton.runtime import driver

    def execute(launches: list[Launch], device: torch.device) -> None:
        for launch in launches:
            seen.append(launch.kernel.__name__)
            launch()

    def fits(x: torch.Tensor) -> None:
        """No reason against any tensor."""

    h200 = Target(90, 132)
    with contextlib.ExitStack() as stack:
        for module in (backend, *(family.BACKENDS["triton"] for family in FAMILIES)):
            stack.enter_context(mock.patch.object(module, "execute", execute))
            stack.enter_context(mock.patch.object(module, "unfit_device", fits))
        for module, name, value in (
            (backend, "interpreted", bool),
            (backend, "_target", lambda device: h200),
            (_dispatch, "unusable", lambda name: None if name == "triton" else "not asked"),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(mock.patch.object(driver, "_active", Driver()))
        yield


def step_us(name: str, options: dict[str, Any], keys: int, steps: int) -> tuple[float, int]:
    """Median microseconds of a step in one layer, and its kernels."""
    method, layer = get_method(name, **options), LayerContext(5, 32, 128**-0.5)
    q = torch.randn(1, 32, 1, 128).bfloat16()
    k = torch.randn(1, 8, keys + steps, 128).bfloat16()
    times: list[float] = []
    seen: list[str] = []
    with null_gpu(seen), torch.inference_mode():
        for end in range(keys, keys + steps):
            cache = k[:, :, :end]
            seen.clear()
            start = time.perf_counter()
            index = method.decode(q, cache, layer)
            if index is None:
                attention(q, cache, cache)
            else:
                sparse_attention(q, cache, cache, index)
            times.append((time.perf_counter() - start) * 1e6)
    return sorted(times)[steps // 2], len(seen)


@app.command()
def main(
    keys: Annotated[int, typer.Option(min=4096, help="Keys of the context.")] = 9000,
    steps: Annotated[int, typer.Option(min=2, help="Steps; the median is printed.")] = 200,
) -> None:
    """Prints the host time of a decode step in one layer, 32/8 heads of 128 in bf16."""
    torch.set_num_threads(1)
    table = Table(title=f"Host time of a decode step, {platform.machine()}, one thread")
    for column in ("method", "kernels", "us"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, options in METHODS:
        us, kernels = step_us(name, options, keys, steps)
        label = ", ".join([name, *(f"{key}={value}" for key, value in options.items())])
        table.add_row(label, str(kernels), f"{us:.0f}")
    Console().print(table)


if __name__ == "__main__":
    app()
