"""Fidelity: mass and error per head against attention written out."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowcontext.integrations._probe import probe
from lowcontext.integrations.fidelity import measure_fidelity, plot_fidelity, write_rows
from lowcontext.methods import get_method

N, WINDOW, SINK = 192, 40, 2


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, num_key_value_heads=2, **sizes)
    made = LlamaForCausalLM(config).eval()
    for layer in made.model.layers:
        layer.self_attn.q_proj.weight.data *= 40
    return made


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (1, N), generator=torch.Generator().manual_seed(1))


def written_out(
    model: Any, ids: torch.Tensor, chosen: torch.Tensor, rows: slice
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(mass [H], error [H]) of every layer for a mask [N, N] of the keys read."""
    found = []

    def look(q: Any, k: Any, v: Any, at: Any, window: int) -> None:
        k, v = (x.double().repeat_interleave(2, dim=1)[0] for x in (k, v))
        causal = torch.ones(N, N, dtype=torch.bool).tril()
        logits = (q[0].double() @ k.transpose(1, 2) * at.scale).masked_fill(~causal, -torch.inf)
        p = logits.softmax(-1)
        dense = (p @ v)[:, rows]
        kept = p * chosen
        out = (kept / kept.sum(-1, keepdim=True) @ v)[:, rows]
        gap = (out - dense).square().sum((1, 2)) / dense.square().sum((1, 2))
        found.append((kept.sum(-1)[:, rows].mean(1), gap.sqrt()))

    probe(model, ids, look)
    return found


@pytest.mark.parametrize(("phase", "block_q"), [("prefill", 64), ("decode", 1)])
def test_mass_and_error_are_those_of_attention_written_out(
    model: Any, ids: torch.Tensor, phase: str, block_q: int
) -> None:
    method = get_method("streaming_llm", sink=SINK, window=WINDOW)
    position = torch.arange(N)
    first = position // block_q * block_q - WINDOW + 1  # of the block's first query
    chosen = (position >= first[:, None]) | (position < SINK)
    rows = slice(0, N) if phase == "prefill" else slice(N - 8, N)
    expected = written_out(model, ids, chosen, rows)
    found = [x for x in measure_fidelity(model, ids, method, steps=8) if x.phase == phase]
    assert [(row.layer, row.head) for row in found] == [(i, h) for i in (0, 1) for h in range(4)]
    for row in found:
        mass, error = (float(x[row.head]) for x in expected[row.layer])
        assert row.queries == (N if phase == "prefill" else 8)
        assert row.mass == pytest.approx(mass, abs=1e-4)
        assert row.error == pytest.approx(error, abs=1e-4)
        assert 0.0 < row.least <= row.mass < 1.0


def test_dense_keeps_everything(model: Any, ids: torch.Tensor) -> None:
    for row in measure_fidelity(model, ids, get_method("dense"), steps=2):
        assert (row.mass, row.error, row.density) == (1.0, 0.0, 1.0)


def test_a_head_without_values_has_no_error(model: Any, ids: torch.Tensor) -> None:
    silent = copy.deepcopy(model)
    silent.model.layers[1].self_attn.v_proj.weight.data[:16] = 0  # the first KV head
    for row in measure_fidelity(silent, ids, get_method("streaming_llm", window=32)):
        assert (row.error == 0) == (row.layer == 1 and row.head < 2)


def test_methods_with_memory_of_other_layers_are_measured_in_decode(
    model: Any, ids: torch.Tensor
) -> None:
    tidal = get_method("tidaldecode", select_layers=[0])
    for method in (tidal, *map(get_method, ("recycled", "tokenselect", "quest"))):
        found = measure_fidelity(model, ids, method, steps=4)
        assert len([row for row in found if row.phase == "decode"]) == 8


def test_rows_and_picture_are_written(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    found = measure_fidelity(model, ids, get_method("streaming_llm", window=32), steps=2)
    lines = write_rows(found, tmp_path / "deep" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["head"] for line in lines] == [row.head for row in found]
    picture = plot_fidelity(found, tmp_path / "deep" / "map.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_a_map_per_phase_and_figures_where_heads_are_few(
    model: Any, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _target: drawn.append(figure))
    found = measure_fidelity(model, ids, get_method("streaming_llm", window=32), steps=2)
    plot_fidelity(found, tmp_path / "map.png")
    plot_fidelity([replace(row, head=row.head + 9) for row in found], tmp_path / "many.png")
    few, many = ([axes for axes in figure.axes if axes.images] for figure in drawn)
    assert [axes.get_title(loc="left") for axes in few] == ["streaming_llm(window=32)", "", "", ""]
    values = [text.get_text() for text in few[0].texts]
    assert values == [f"{row.mass:.2f}" for row in found if row.phase == "prefill"]
    assert not many[0].texts


def test_too_many_steps_and_no_rows_are_refused(
    model: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="steps: expected 0 to 191 .* got 192"):
        measure_fidelity(model, ids, get_method("dense"), steps=N)
    with pytest.raises(ValueError, match="found: expected at least one row, got none"):
        plot_fidelity([], tmp_path / "map.png")
