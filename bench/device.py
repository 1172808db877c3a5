"""What a suite needs of the device it runs on: timing, graphs, limits, state."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.timing import Times, interleave

Call = Callable[[], Any]
# Written before each timed call, so that nothing of the call before is left in a cache of this
# size; an H200 has 50 MB.
_FLUSHED = 2**28


@dataclass(frozen=True)
class Device:
    """A CUDA device, or with kind "cpu" this machine at sizes that only exercise the code.

    Args:
        kind: "cuda" or "cpu".
    """

    kind: str

    @property
    def tiny(self) -> bool:
        """Whether figures mean nothing here."""
        return self.kind == "cpu"

    def times(
        self, calls: dict[str, Call], *, seconds: float, rounds: int = 20
    ) -> dict[str, Times]:
        """Times the calls in turn, each with cold caches; on a GPU by its events.

        Args:
            calls: what to call, by name.
            seconds: no further round starts later.
            rounds: most rounds; at least three are run.
        """
        if self.tiny:
            return interleave(calls, rounds=1, budget_s=seconds)
        return interleave(calls, rounds=rounds, budget_s=seconds, measure=self._event_ms)

    @cached_property
    def _flush(self) -> Tensor:
        return torch.empty(_FLUSHED // 4, dtype=torch.int32, device=self.kind)

    def flush(self) -> None:
        """Empties the caches: writing so much takes a GPU longer than a launch takes the host."""
        if not self.tiny:
            self._flush.zero_()

    def _event_ms(self, call: Call) -> float:
        self.flush()
        start = self.mark()
        call()
        return self.laps([("", start), ("call", self.mark())])["call"]

    def mark(self) -> Any:
        """A point in time: on a GPU a place in its queue."""
        if self.tiny:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def laps(self, marks: list[tuple[str, Any]]) -> dict[str, float]:
        """Milliseconds between consecutive marks, summed by the name of the later one."""
        found: dict[str, float] = {}
        if not self.tiny:
            marks[-1][1].synchronize()
        for (_, start), (name, end) in pairwise(marks):
            ms = (end - start) * 1e3 if self.tiny else start.elapsed_time(end)
            found[name] = found.get(name, 0.0) + ms
        return found

    def captured(self, call: Call) -> Call:
        """Replays of the call as a CUDA graph, after the calls that its first use needs.

        Raises:
            RuntimeError: the call cannot be captured.
        """
        if self.tiny:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def randn(self, *shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
        """Normal numbers made on the device."""
        gen = torch.Generator(self.kind).manual_seed(seed)
        return torch.randn(*shape, generator=gen, dtype=dtype, device=self.kind)

    def free_bytes(self) -> int | None:
        """Memory that can still be taken; None where it is not limited."""
        if self.tiny:
            return None
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def broken(self) -> bool:
        """Whether an earlier error has ended the use of the GPU in this process."""
        if self.tiny:
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def versions(self) -> dict[str, str | None]:
        """Versions that a figure depends on."""
        names = ("triton", "transformers", "flash-attn", "flashinfer-python")
        found = {name: _version(name) for name in names}
        cudnn = None if self.tiny else str(torch.backends.cudnn.version())
        return {
            **found,
            "cuda": torch.version.cuda,
            "cudnn": cudnn,
            "kernel": platform.release(),
        }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
