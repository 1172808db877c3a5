"""How much of the causal attention a patched model read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lowcontext.index import BlockIndex
from lowcontext.integrations._families import reporting


class Density:
    """Share of the causal (query, key) pairs that full-attention layers read, by phase.

    Each call of a layer counts with its number of causal pairs, times batch and heads: `decode` is
    the share of the cached keys that decode steps read, `prefill` the share of the lower triangle.
    Layers that the method leaves dense count with density 1; sliding-window layers do not count.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted so far."""
        self._read = {"prefill": 0.0, "decode": 0.0}
        self._pairs = {"prefill": 0, "decode": 0}
        # Decode steps are counted when someone asks, not while they run and may be timed. Their
        # lists are small; those of prompts are not, and are counted at once.
        self._later: list[tuple[BlockIndex, int, int, int]] = []

    @property
    def prefill(self) -> float:
        """Density of prompts and of chunks of them, NaN when there were none."""
        return self._mean("prefill")

    @property
    def decode(self) -> float:
        """Density of decode steps, NaN when there were none."""
        return self._mean("decode")

    def add(self, phase: str, index: BlockIndex | None, Lq: int, Lk: int, heads: int) -> None:
        """Counts one call; `heads` is batch times query heads. Reads the index on the host."""
        if index is not None and phase == "decode":
            self._later.append((index, Lq, Lk, heads))
        else:
            self._count(phase, index, Lq, Lk, heads)

    def _count(self, phase: str, index: BlockIndex | None, Lq: int, Lk: int, heads: int) -> None:
        pairs = (Lq * (Lk - Lq) + Lq * (Lq + 1) // 2) * heads
        self._pairs[phase] += pairs
        self._read[phase] += pairs * (1.0 if index is None else index.density(Lq, Lk))

    def _mean(self, phase: str) -> float:
        while self._later:
            self._count("decode", *self._later.pop())
        return self._read[phase] / self._pairs[phase] if self._pairs[phase] else float("nan")


@contextmanager
def measure_density(model: nn.Module) -> Iterator[Density]:
    """Measures what a patched model reads inside the `with` block.

    Args:
        model: a model that `patch_model` has patched.

    Returns:
        A context manager whose value has `.prefill` and `.decode`: the share of causal
        (query, key) pairs that full-attention layers read, weighted by pairs, as floats; NaN for a
        phase without calls, and `.reset()` to start over. A sparse prefill costs a host
        synchronisation for each call while active; decode steps are counted when read.

    Raises:
        ValueError: the model is not patched.

    Example:
        >>> import lowcontext, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
        >>> config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
        >>> model = LlamaForCausalLM(config).eval()
        >>> model = lowcontext.patch_model(model, "streaming_llm", sink=0, window=8)
        >>> ids = torch.ones(1, 63, dtype=torch.long)
        >>> with lowcontext.measure_density(model) as density:
        ...     out = model.generate(ids, max_new_tokens=2, min_new_tokens=2)
        >>> density.decode
        0.125
    """
    density = Density()
    with reporting(model, "density", density):
        yield density
