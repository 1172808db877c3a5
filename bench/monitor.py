"""Clocks, power and temperature of a GPU while something is measured on it, from nvidia-smi."""

from __future__ import annotations

import subprocess
import threading
import time
from typing import Any

_FIELDS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "temperature.gpu": "celsius",
}
# A bit for each reason that holds the clocks down; the name depends on the age of the driver.
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
_ONCE = ("name", "driver_version", "clocks.max.sm", "power.limit")
_PERIOD_MS = 250


class Monitor:
    """Samples one GPU from its making until `stop`; without nvidia-smi, it has none.

    Args:
        command: the program that samples.
    """

    def __init__(self, command: str = "nvidia-smi") -> None:
        self._command = command
        self._samples: list[tuple[float, list[str]]] = []
        self._process: subprocess.Popen[str] | None = None
        self.device = self._asked(_ONCE) or {}
        reason = next((x for x in _REASONS if self._asked((x,))), None)
        self._names = [*_FIELDS, *filter(None, [reason])]
        if self.device:
            self._process = subprocess.Popen(
                [*self._query(self._names), "-lms", str(_PERIOD_MS)],
                stdout=subprocess.PIPE,
                text=True,
            )
            threading.Thread(target=self._read, daemon=True).start()

    def _query(self, names: Any) -> list[str]:
        options = [f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0"]
        return [self._command, *options]

    def _asked(self, names: tuple[str, ...]) -> dict[str, str] | None:
        try:
            done = subprocess.run(
                self._query(names), capture_output=True, text=True, check=True, timeout=20
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return dict(zip(names, done.stdout.strip().split(", "), strict=False))

    def _read(self) -> None:
        if self._process is not None and self._process.stdout is not None:
            for line in self._process.stdout:
                self._samples.append((time.time(), line.strip().split(", ")))

    def since(self, start: float) -> dict[str, Any]:
        """Lowest, middle and highest of each field since a `time.time()`, and reasons seen."""
        rows = [values for at, values in list(self._samples) if at >= start]
        found: dict[str, Any] = {}
        for place, (name, title) in enumerate(zip(self._names, _titles(), strict=False)):
            values = [row[place] for row in rows if len(row) == len(self._names)]
            if name in _REASONS:
                found[title] = sorted(set(values))
                continue
            numbers = sorted(float(x) for x in values if _is_number(x))
            if numbers:
                found[title] = [numbers[0], numbers[len(numbers) // 2], numbers[-1]]
        return found

    def stop(self) -> None:
        """Ends the sampling."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def _titles() -> list[str]:
    return [*_FIELDS.values(), "throttle"]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
