"""Interleaved timing and the measured limits of the machine."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Times:
    """Percentiles of one candidate's time, in milliseconds.

    Args:
        p20, p50, p80: of the calls that follow another call of the same candidate, or of all calls
            where each is long.
        first: median of the calls that follow another candidate. After milliseconds of something
            else, the code of Python and torch is out of the caches too, for whatever is called.
    """

    p20: float
    p50: float
    p80: float
    first: float

    def divided(self, calls: int) -> Times:
        """The same for one of so many calls that were timed together."""
        return Times(self.p20 / calls, self.p50 / calls, self.p80 / calls, self.first / calls)


# A candidate is called again within its turn until the turn has lasted so long, or so often.
TURN_S = 0.02
TURN_CALLS = 40


def wall_ms(call: Callable[[], Any]) -> float:
    """Milliseconds that one call takes on this machine's clock."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def interleave(
    candidates: dict[str, Callable[[], Any]],
    *,
    rounds: int,
    budget_s: float,
    measure: Callable[[Callable[[], Any]], float] = wall_ms,
    least: int = 3,
    warm: bool = True,
) -> dict[str, Times]:
    """Times the candidates in turn, A B C A B C, so that all see the same machine.

    Short calls are repeated within a turn; each call is timed alone.

    Args:
        candidates: what to call; each is called once before timing, unless `warm` is False.
        rounds: most rounds; at least `least` are run.
        budget_s: no further round starts after so many seconds.
        measure: the milliseconds of one call.
        least: see `rounds`.
        warm: see `candidates`.

    Returns:
        Percentiles per candidate.
    """
    if warm:
        for call in candidates.values():
            call()
    first: dict[str, list[float]] = {name: [] for name in candidates}
    later: dict[str, list[float]] = {name: [] for name in candidates}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - began > budget_s:
            break
        for name, call in candidates.items():
            turn = time.perf_counter()
            for i in range(TURN_CALLS):
                (later if i else first)[name].append(measure(call))
                if time.perf_counter() - turn >= TURN_S:
                    break
    return {name: _percentiles(first[name], later[name]) for name in candidates}


def _percentiles(first: list[float], later: list[float]) -> Times:
    kept = torch.tensor(later or first, dtype=torch.float64)
    p20, p50, p80 = kept.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Times(p20, p50, p80, statistics.median(first))


def read_bandwidth(buffer: torch.Tensor) -> Callable[[], Any]:
    """A call that reads all of `buffer` once: the best reader torch has, a sum over fp32."""
    return buffer.sum


def matmul_rate(seconds: float = 1.0) -> float:
    """Measured fp32 matrix product rate of the machine in TFLOP/s, 2048 cubed, best of the runs."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    out = torch.empty_like(a)
    best, began = 0.0, time.perf_counter()
    while time.perf_counter() - began < seconds or best == 0.0:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start) / 1e12)
    return best


def environment() -> dict[str, Any]:
    """What a row says about where it was measured."""
    import lowcontext
    from lowcontext.ops import native

    root = Path(__file__).parent.parent

    def git(*args: str) -> str | None:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or _cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": native.cpu_isa() if native.status() is None else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lowcontext": lowcontext.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(status) if status is not None else None,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
