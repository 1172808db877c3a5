"""What a method keeps of dense attention, per layer and head, on the inputs of a dense model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowcontext._fingerprint import model_label
from lowcontext.index import BlockIndex
from lowcontext.integrations._probe import probe
from lowcontext.integrations.inspection import FAINT, INK, grid_figure, plain_axis
from lowcontext.methods import LayerContext, Method
from lowcontext.methods.base import Moved
from lowcontext.ops import attention, sparse_attention

_COLOURS = {"mass": ("softmax mass read", "viridis"), "error": ("error of the output", "magma_r")}
_HEADS_WITH_FIGURES = 8

RunKey = tuple[str, str, int, str]  # model, prompt, steps, method


@dataclass(frozen=True)
class FidelityRow:
    """One query head under one method.

    Args:
        model: folder that the model was loaded from, its dtype and a digest of its weights.
        prompt: first digits of the SHA-256 of the prompt's tokens.
        method: the method, as text; settings: all its hyper-parameters, defaults too.
        steps: last tokens that decode was asked for.
        phase: "prefill" or "decode".
        layer: index of the layer; head: of the query head.
        length: tokens of the prompt; queries: how many of them were measured.
        mass: share of the softmax that lies on the keys read, averaged over queries.
        least: the least such share of any query.
        error: norm of (output - dense output) over the norm of the dense output.
        density: share of the causal pairs that the method reads, over all heads of the layer.
    """

    model: str
    prompt: str
    method: str
    settings: dict[str, Any] | None
    steps: int
    phase: str
    layer: int
    head: int
    length: int
    queries: int
    mass: float
    least: float
    error: float
    density: float

    @property
    def run(self) -> RunKey:
        """What names the measurement of a method, of which this is one head."""
        return self.model, self.prompt, self.steps, self.method

    @property
    def key(self) -> tuple[str | int, ...]:
        """What names the row."""
        return *self.run, self.phase, self.layer, self.head


def run_key(model: nn.Module, ids: Tensor, method: Method, steps: int) -> RunKey:
    """What rows of `measure_fidelity` with these arguments have as `run`."""
    numbers = ids.to("cpu", torch.int64).contiguous().numpy().tobytes()
    return model_label(model), hashlib.sha256(numbers).hexdigest()[:12], steps, str(method)


def measure_fidelity(
    model: nn.Module, ids: Tensor, method: Method, *, steps: int = 0
) -> list[FidelityRow]:
    """Compares a method with dense attention at every full-attention layer and head.

    Every layer gets the queries, keys and values of the dense model, so errors do not add up over
    layers. The mass of a query is exp(LSE over the keys read - LSE over all keys).

    Args:
        model: an unpatched transformers model.
        ids: int [1, N].
        method: the method.
        steps: also measure decode, on the last so many tokens, one at a time.

    Returns:
        A row per phase, layer and head.

    Raises:
        ValueError: the model is patched, or `steps` is not below the length.
        NotImplementedError: the method moves keys.
    """
    N = ids.shape[1]
    if not 0 <= steps < N:
        raise ValueError(f"steps: expected 0 to {N - 1} (the prompt less 1), got {steps}")
    found: list[FidelityRow] = []
    shared: list[dict[str, Any]] = [{} for _ in range(steps + 1)]
    run = run_key(model, ids, method, steps)

    def look(q: Tensor, k: Tensor, v: Tensor, at: LayerContext, window: int) -> None:
        if window:
            return
        whole = _Sums(method, run, "prefill", at, N)
        at.shared = shared[-1]
        whole.add(q, k, v)
        found.extend(whole.rows())
        if steps:
            one = _Sums(method, run, "decode", at, N)
            at.memory = {}
            for step, end in enumerate(range(N - steps + 1, N + 1)):
                at.shared = shared[step]
                one.add(q[:, :, end - 1 : end], k[:, :, :end], v[:, :, :end])
            found.extend(one.rows())

    probe(model, ids, look)
    return found


class _Sums:
    """Sums over the queries of one layer, per head."""

    def __init__(
        self, method: Method, run: RunKey, phase: str, at: LayerContext, length: int
    ) -> None:
        self.method, self.run, self.phase = method, run, phase
        self.at, self.length = at, length
        self.masses: list[Tensor] = []
        self.gap = self.norm = torch.zeros((), dtype=torch.float64)  # grow to [Hq]
        self.read, self.pairs = 0.0, 0

    def add(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Takes queries [1, Hq, Lq, D] that stand at the end of the keys."""
        offset = k.shape[2] - q.shape[2]
        scale, softcap = self.at.scale, self.at.softcap
        for row0, row1, index in self.method.parts(q, k, self.at):
            if isinstance(index, Moved):
                raise NotImplementedError(
                    f"{self.method}: expected a method that reads keys where they are, got one "
                    "that moves them; turn that off to measure it"
                )
            end = offset + row1
            part = q[:, :, row0:row1], k[:, :, :end], v[:, :, :end]
            dense, lse = attention(*part, scale=scale, softcap=softcap, return_lse=True)
            out, own = dense, lse
            if index is not None:
                out, own = sparse_attention(
                    *part, index, scale=scale, softcap=softcap, return_lse=True
                )
            self._count(index, row1 - row0, end, (out, dense), (own - lse).exp().clamp(max=1.0)[0])

    def _count(
        self,
        index: BlockIndex | None,
        rows: int,
        end: int,
        outputs: tuple[Tensor, Tensor],
        mass: Tensor,
    ) -> None:
        out, dense = (x[0].double().cpu() for x in outputs)
        self.masses.append(mass)
        self.gap = self.gap + (out - dense).square().sum((1, 2))
        self.norm = self.norm + dense.square().sum((1, 2))
        pairs = rows * (end - rows) + rows * (rows + 1) // 2
        self.pairs += pairs
        self.read += pairs * (1.0 if index is None else index.density(rows, end))

    def rows(self) -> list[FidelityRow]:
        """The figures of every head."""
        mass = torch.cat(self.masses, dim=1)  # [Hq, queries]
        # A head whose values are all zero has no error, and no norm either.
        error = torch.where(self.gap == 0, 0.0, self.gap / self.norm).sqrt()
        model, prompt, steps, label = self.run
        return [
            FidelityRow(
                model=model,
                prompt=prompt,
                method=label,
                settings=self.method.settings,
                steps=steps,
                phase=self.phase,
                layer=self.at.layer_idx,
                head=head,
                length=self.length,
                queries=mass.shape[1],
                mass=float(mass[head].double().mean()),
                least=float(mass[head].min()),
                error=float(error[head]),
                density=self.read / self.pairs,
            )
            for head in range(mass.shape[0])
        ]


def write_rows(found: Sequence[FidelityRow], path: str | Path) -> Path:
    """Writes one JSON line per row.

    Args:
        found: from `measure_fidelity`.
        path: the file; replaced in one step if it exists, so a run that dies leaves the old one.

    Returns:
        The path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(row)) + "\n" for row in found)
    new = target.with_name(f"{target.name}.new")
    new.write_text(text, encoding="utf-8")
    return new.replace(target)


def plot_fidelity(found: Sequence[FidelityRow], path: str | Path) -> Path:
    """Draws, per method, maps of layers and heads: mass read and error of the output, by phase.

    Errors from 1 on, as large as the output itself, have one colour. With few heads the cells hold
    their figures.

    Args:
        found: from `measure_fidelity`.
        path: the image to write; its suffix chooses the format.

    Returns:
        The path.

    Raises:
        ValueError: there are no rows.
    """
    if not found:
        raise ValueError("found: expected at least one row, got none")
    methods = list(dict.fromkeys(row.method for row in found))
    phases = list(dict.fromkeys(row.phase for row in found))
    maps = [(phase, name) for phase in phases for name in _COLOURS]
    layers = sorted({row.layer for row in found})
    heads = max(row.head for row in found) + 1
    size = max(2.2, 0.22 * heads) + 0.3, max(0.8, 0.2 * len(layers)) + 0.6
    figure, axes, target = grid_figure(path, len(methods), len(maps), size)
    for column, (phase, name) in enumerate(maps):
        title, colours = _COLOURS[name]
        for line, method in enumerate(methods):
            axis = axes[line, column]
            table = torch.full((len(layers), heads), torch.nan)
            for row in found:
                if (row.method, row.phase) == (method, phase):
                    table[layers.index(row.layer), row.head] = getattr(row, name)
            image = axis.imshow(table.numpy(), cmap=colours, vmin=0.0, vmax=1.0, aspect="auto")
            if heads <= _HEADS_WITH_FIGURES:
                _write_cells(axis, table, image)
            axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
            axis.set_xticks(range(heads), [str(head) for head in range(heads)])
            axis.set_xlabel("query head", fontsize=8, color=FAINT)
            plain_axis(axis)
        extend = "max" if name == "error" else "neither"
        bar = figure.colorbar(
            image, ax=list(axes[:, column]), location="top", aspect=30, extend=extend
        )
        bar.set_label(f"{phase}: {title}", fontsize=8.5, color=INK)
        bar.ax.tick_params(labelsize=7, colors=INK)
    for axis, method in zip(axes[:, 0], methods, strict=True):
        axis.set_ylabel("layer", fontsize=8, color=FAINT)
        axis.set_title(method, fontsize=9.5, color=INK, weight="bold", loc="left")
    figure.savefig(target)
    return target


def _write_cells(axis: Any, table: Tensor, image: Any) -> None:
    """Writes the figures into a map, light on dark."""
    for y, line in enumerate(table.tolist()):
        for x, value in enumerate(line):
            if value == value:
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                style = {"fontsize": 7, "color": "white" if dark else INK}
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", **style)
