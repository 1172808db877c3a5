"""Finds a pattern for every head of a checkpoint; writes them in the published schema.

Each candidate is measured on blocks of 64 queries spread over a prompt: the error of the attention
output, the share of the softmax that it reads (recall) and the share of the causal pairs that it
costs. Heads then take the candidates that make the sum of their errors smallest at a given mean
cost. Memory is O(N x 64): the N x N weights are never formed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowcontext._fingerprint import fingerprint
from lowcontext.index import BlockIndex
from lowcontext.integrations._probe import probe
from lowcontext.methods import LayerContext, get_method
from lowcontext.methods._patterns import PUBLISHED as PUBLISHED_KINDS
from lowcontext.methods._patterns import HeadPattern, Layer
from lowcontext.methods.minference import BLOCK, Selection
from lowcontext.ops import attention, sparse_attention

PUBLISHED = (
    HeadPattern("stream_llm", 100, 800),
    HeadPattern("stream_llm", 1024, 4096),
    HeadPattern("vertical_and_slash", 30, 100),
    HeadPattern("vertical_and_slash", 30, 800),
    HeadPattern("vertical_and_slash", 100, 750),
    HeadPattern("vertical_and_slash", 500, 700),
    HeadPattern("vertical_and_slash", 1000, 100),
    HeadPattern("vertical_and_slash", 3500, 100),
    HeadPattern("vertical_and_slash", 1000, 4096),
    HeadPattern("vertical_and_slash", 1000, 6096),
    HeadPattern("block_sparse"),
)
DEFAULT = HeadPattern("gain", 4096, 16384)  # what every head has without a file
OURS = (
    DEFAULT,
    HeadPattern("gain", 512, 1024),
    HeadPattern("gain", 1024, 4096),
    HeadPattern("dense"),
)
OBJECTIVES = ("output", "recall")


@dataclass(frozen=True)
class Measurement:
    """What the candidates do on one layer, averaged over the blocks of queries of one prompt.

    Args:
        cost: [candidates][heads]; share of the causal pairs that is read.
        error: [candidates][heads]; norm of the output's error over the norm of the output.
        recall: [candidates][heads]; share of the softmax that is read.
    """

    cost: list[list[float]]
    error: list[list[float]]
    recall: list[list[float]]


@dataclass(frozen=True)
class Choice:
    """The outcome of a calibration: patterns, and what they cost and miss, by layer and head.

    Args:
        patterns: of each layer and head; `score` is the recall.
        cost, error, recall: [layers][heads], averaged over the prompts.
    """

    patterns: tuple[Layer, ...]
    cost: list[list[float]]
    error: list[list[float]]
    recall: list[list[float]]

    @property
    def density(self) -> float:
        """Mean cost of a head."""
        return float(torch.tensor(self.cost).mean())


@dataclass
class Calibration:
    """Measures candidates on prompts and chooses among them; an interrupted run continues.

    Args:
        candidates: patterns to measure.
        published: choose only among patterns of the published schema.
        blocks: blocks of 64 queries that are measured in a prompt, the last one among them.
        state: JSONL file of measurements; those in it of the same model, prompt and candidates are
            not repeated. None keeps them in memory.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
        >>> config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
        >>> run = Calibration(blocks=2)
        >>> run.measure(LlamaForCausalLM(config), torch.randint(0, 64, (1, 700)))
        >>> [len(layer) for layer in run.choose(density=0.5).patterns]
        [2, 2]
    """

    candidates: Sequence[HeadPattern] = PUBLISHED + OURS
    published: bool = False
    blocks: int = 8
    state: Path | None = None
    _rows: dict[tuple[str, int], Measurement] = field(default_factory=dict, init=False)
    _layers: int = field(default=0, init=False)
    # What was asked for: the file may hold other prompts and models besides.
    _prompts: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks: expected at least 1, got {self.blocks}")
        if not self.candidates:
            raise ValueError("candidates: expected at least one pattern, got none")
        if self.state is not None and self.state.exists():
            text = self.state.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:  # a run that was killed while it wrote
                self.state.write_text(whole, encoding="utf-8")
            for line in whole.splitlines():
                row = json.loads(line)
                if row.pop("settings") == self._settings:
                    at = row.pop("prompt"), row.pop("layer")
                    self._rows[at] = Measurement(**row)

    def measure(
        self, model: nn.Module, ids: Tensor, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Measures every candidate on every layer, for one prompt.

        Args:
            model: an unpatched transformers model.
            ids: int [1, N].
            progress: called with (layers done, layers) after each layer.

        Raises:
            ValueError: the prompt has fewer than 128 tokens.
        """
        if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 2 * BLOCK:
            raise ValueError(
                f"ids: expected one prompt of at least {2 * BLOCK} tokens, got {list(ids.shape)}"
            )
        prompt = hashlib.sha1(f"{fingerprint(model)} {ids.tolist()}".encode()).hexdigest()

        def layer_done(q: Tensor, k: Tensor, v: Tensor, layer: LayerContext, window: int) -> None:
            self._layers = layer.num_layers
            at = prompt, layer.layer_idx
            if at not in self._rows:
                self._rows[at] = (
                    _windowed(len(self.candidates), q.shape[1])
                    if window
                    else measure_layer(q, k, v, layer, self.candidates, self.blocks)
                )
                self._append(at)
            if progress is not None:
                progress(layer.layer_idx + 1, layer.num_layers)

        done = [layer for name, layer in self._rows if name == prompt]
        if len(done) and len(done) == self._known_layers(model):
            self._layers = len(done)
            if progress is not None:
                progress(len(done), len(done))
        else:
            probe(model, ids, layer_done)
        self._prompts.add(prompt)

    def choose(self, density: float | None = None, objective: str = "output") -> Choice:
        """The candidates with the smallest total error at a mean cost of at most `density`.

        Args:
            density: mean share of the causal pairs that a head may read, above 0 and at most 1;
                None takes what the default without a file costs on the same prompts.
            objective: "output" (error of the attention output) or "recall".

        Raises:
            ValueError: nothing was measured, the objective or the density is none, or no choice is
                that cheap.
        """
        if density is not None and not 0 < density <= 1:
            raise ValueError(f"density: expected a share above 0 and at most 1, got {density}")
        if objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {list(OBJECTIVES)}, got {objective!r}")
        if not self._prompts:
            raise ValueError("choose: expected measurements, got none; call measure first")
        prompts = sorted(self._prompts)
        tables = []
        for name in ("cost", "error", "recall"):
            layers = [
                torch.tensor([getattr(self._rows[prompt, i], name) for prompt in prompts])
                for i in range(self._layers)
            ]
            tables.append(torch.stack([x.mean(0) for x in layers]))  # [layers, candidates, heads]
        cost, error, recall = tables
        loss = error if objective == "output" else 1 - recall
        if self.published:
            foreign = torch.tensor([c.kind not in PUBLISHED_KINDS for c in self.candidates])
            loss = loss.masked_fill(foreign[:, None], torch.inf)
        if density is None:
            if DEFAULT not in self.candidates:
                raise ValueError("density: expected a number, as the default is no candidate")
            density = float(cost[:, list(self.candidates).index(DEFAULT)].mean())
        picked = _cheapest(cost, loss, density)
        kept = [x.gather(1, picked[:, None])[:, 0] for x in tables]
        patterns = tuple(
            tuple(
                HeadPattern(c.kind, c.a, c.b, round(float(kept[2][i, h]), 6))
                for h, c in enumerate(self.candidates[int(n)] for n in picked[i])
            )
            for i in range(self._layers)
        )
        return Choice(patterns, *(x.tolist() for x in kept))

    @property
    def _settings(self) -> str:
        names = [[c.kind, c.a, c.b] for c in self.candidates]
        return hashlib.sha1(json.dumps([names, self.blocks]).encode()).hexdigest()

    @staticmethod
    def _known_layers(model: nn.Module) -> int:
        config: Any = model.config
        return int(config.get_text_config(decoder=True).num_hidden_layers)

    def _append(self, at: tuple[str, int]) -> None:
        if self.state is None:
            return
        row = {"settings": self._settings, "prompt": at[0], "layer": at[1]}
        with self.state.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | vars(self._rows[at])) + "\n")


def measure_layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: LayerContext,
    candidates: Sequence[HeadPattern],
    blocks: int,
) -> Measurement:
    """Cost, error and recall of each candidate on every head of one layer.

    Args:
        q: [1, Hq, N, D]; k, v: [1, Hkv, N, D].
        layer: scale and softcap.
        candidates: patterns to measure.
        blocks: blocks of 64 queries, spread evenly, the last full one among them.
    """
    H, N = q.shape[1], q.shape[2]
    last = N // BLOCK
    picked = sorted({last - 1 - i * last // blocks for i in range(blocks)})
    options: dict[str, Any] = {"scale": layer.scale, "softcap": layer.softcap, "return_lse": True}
    exact = []
    for n in picked:
        row, end = n * BLOCK, (n + 1) * BLOCK
        exact.append(attention(q[:, :, row:end], k[:, :, :end], v[:, :, :end], **options))
    totals = torch.zeros(3, len(candidates), H, dtype=torch.float64)
    single = LayerContext(0, 1, layer.scale, layer.softcap)
    pairs_of = [BLOCK * n * BLOCK + BLOCK * (BLOCK + 1) // 2 for n in picked]
    for c, candidate in enumerate(candidates):
        pattern = [candidate.kind, candidate.a, candidate.b, 0.0]
        method = get_method("minference", patterns=[{str(h): pattern for h in range(H)}])
        selection = Selection(method, q, k, single)  # type: ignore[arg-type]
        for n, pairs, (out, lse) in zip(picked, pairs_of, exact, strict=True):
            row, end = n * BLOCK, (n + 1) * BLOCK
            index = selection.index(row, end)
            got, got_lse = sparse_attention(
                q[:, :, row:end], k[:, :, :end], v[:, :, :end], index, **options
            )
            totals[0, c] += pairs * _density_by_head(index, end)
            difference = (got - out).double().square().sum(dim=(0, 2, 3))
            norm = out.double().square().sum(dim=(0, 2, 3))
            # A head whose values are all zero has no error.
            totals[1, c] += torch.where(norm > 0, difference / norm, difference).sqrt().cpu()
            totals[2, c] += (got_lse - lse).double().exp().mean(dim=(0, 2)).cpu()
    totals[0] /= sum(pairs_of)
    totals[1:] /= len(picked)
    # More than 1 by rounding is no recall.
    totals[2].clamp_(max=1.0)
    return Measurement(*(x.tolist() for x in totals))


def _density_by_head(index: BlockIndex, Lk: int) -> Tensor:
    fields = index.kv_num_blocks, index.kv_starts, index.kv_num_columns, index.kv_columns
    densities = []
    for h in range(index.kv_starts.shape[1]):
        counts, starts, *columns = (None if x is None else x[:, h : h + 1] for x in fields)
        if counts is None or starts is None:
            raise ValueError("index: expected tiles, got none")
        densities.append(BlockIndex(counts, starts, index.block_size, *columns).density(BLOCK, Lk))
    return torch.tensor(densities, dtype=torch.float64)


def _windowed(candidates: int, heads: int) -> Measurement:
    """A sliding-window layer stays dense whatever its pattern: no cost, nothing missed."""
    none = [[0.0] * heads] * candidates
    return Measurement(none, none, [[1.0] * heads] * candidates)


def _cheapest(cost: Tensor, loss: Tensor, density: float) -> Tensor:
    """Candidates [layers, heads] with the smallest loss + price * cost, at the lowest price whose
    mean cost is at most `density`; ties go to the earlier candidate."""

    def at(price: float) -> Tensor:
        return (loss + price * cost).min(dim=1).indices

    def mean_cost(choice: Tensor) -> float:
        return float(cost.gather(1, choice[:, None]).mean())

    if mean_cost(at(0.0)) <= density:
        return at(0.0)
    low, high = 0.0, 1.0
    while mean_cost(at(high)) > density:
        low, high = high, 4 * high
        if high > 1e12:
            least = float(cost.masked_fill(loss == torch.inf, torch.inf).amin(dim=1).mean())
            raise ValueError(
                f"density: expected at least {least:.4f}, the mean cost of the cheapest "
                f"candidates, got {density}"
            )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if mean_cost(at(middle)) <= density else (middle, high)
    return at(high)
