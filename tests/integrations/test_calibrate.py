"""Calibration: what it measures, what it chooses, and that it continues where it stopped."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from tiny_models import prompt, tiny
from torch import Tensor

import lowcontext
from lowcontext import LayerContext
from lowcontext.integrations import calibrate, inspection
from lowcontext.integrations._probe import probe
from lowcontext.integrations.calibrate import Calibration, Measurement, measure_layer
from lowcontext.methods._patterns import HeadPattern, read_patterns, write_patterns

CANDIDATES = (
    HeadPattern("stream_llm", 4, 64),
    HeadPattern("vertical_and_slash", 40, 100),
    HeadPattern("gain", 64, 128),
    HeadPattern("dense"),
)


def tensors(N: int, seed: int = 0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(1, h, N, 16, generator=gen) for h in (4, 2, 2)]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("N", [130, 700])
def test_measurements_are_those_of_the_dense_softmax_on_the_measured_rows(
    N: int, softcap: float | None
) -> None:
    q, k, v = tensors(N)
    layer = LayerContext(3, 8, 0.5, softcap)
    found = measure_layer(q, k, v, layer, CANDIDATES, blocks=N // 64)  # every whole block
    rows = N // 64 * 64
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    for (c, candidate), h in product(enumerate(CANDIDATES), range(4)):
        logits = q[0, h, :rows].double() @ k[0, h // 2, :rows].double().T * 0.5
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        p = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        patterns = [{str(i): [candidate.kind, candidate.a, candidate.b, 0] for i in range(4)}]
        method = lowcontext.get_method("minference", patterns=patterns, min_length=0)
        mask = method.prefill(q, k, LayerContext(0, 1, 0.5, softcap)).to_mask(N, N)[0, h]
        mask = mask[:rows, :rows]
        kept = p * mask
        exact = p @ v[0, h // 2, :rows].double()
        got = kept / kept.sum(-1, keepdim=True) @ v[0, h // 2, :rows].double()
        assert found.cost[c][h] == pytest.approx(float(mask.sum() / causal.sum()), abs=1e-6)
        assert found.recall[c][h] == pytest.approx(float(kept.sum(-1).mean()), abs=1e-5)
        blocks = [slice(64 * n, 64 * n + 64) for n in range(N // 64)]
        errors = [float((got[b] - exact[b]).norm() / exact[b].norm()) for b in blocks]
        assert found.error[c][h] == pytest.approx(sum(errors) / len(errors), abs=1e-5)
    assert found.cost[3] == [1.0] * 4
    assert max(found.error[3]) < 1e-6


def test_a_head_without_output_has_no_error() -> None:
    q, k, v = tensors(300)
    v[:, 1] = 0.0
    found = measure_layer(q, k, v, LayerContext(0, 1, 0.5), CANDIDATES, blocks=2)
    assert [row[2:] for row in found.error] == [[0.0, 0.0]] * 4
    assert min(found.error[0][:2]) > 0.01


def filled(cost: list, error: list, recall: list) -> Calibration:
    """A calibration with given measurements [layers][candidates][heads]."""
    run = Calibration(candidates=CANDIDATES[: len(cost[0])])
    for i, each in enumerate(zip(cost, error, recall, strict=True)):
        run._rows["p", i] = Measurement(*each)
    run._layers = len(cost)
    run._prompts.add("p")
    return run


@pytest.mark.parametrize("objective", ["output", "recall"])
@pytest.mark.parametrize("seed", range(5))
def test_the_choice_beats_every_cheaper_choice_at_its_own_cost(objective: str, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    cost, error, recall = torch.rand(3, 2, 3, 2, generator=gen).double()
    run = filled(cost.tolist(), error.tolist(), recall.tolist())
    loss = error if objective == "output" else 1 - recall
    for density in (0.3, 0.5, 0.9):
        if float(cost.amin(dim=1).mean()) > density:
            continue
        choice = run.choose(density, objective)
        assert choice.density <= density
        assert read_back(choice, cost)
        total = sum(map(sum, choice.error if objective == "output" else choice.recall))
        total = total if objective == "output" else 4 - total
        for picks in product(range(3), repeat=4):
            at = torch.tensor(picks).view(2, 1, 2)
            if float(cost.gather(1, at).mean()) <= choice.density + 1e-9:
                assert total <= float(loss.gather(1, at).sum()) + 1e-6


def read_back(choice, cost: Tensor) -> bool:
    places = [[CANDIDATES.index(HeadPattern(p.kind, p.a, p.b)) for p in x] for x in choice.patterns]
    return torch.allclose(
        cost.gather(1, torch.tensor(places)[:, None])[:, 0].float(), torch.tensor(choice.cost)
    )


def test_a_density_below_every_choice_is_an_error_that_says_the_least() -> None:
    run = filled([[[0.4, 0.2]]], [[[0.0, 0.0]]], [[[1.0, 1.0]]])
    with pytest.raises(ValueError, match="density: expected at least 0.3000"):
        run.choose(0.1)
    for density in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="density: expected a share above 0 and at most 1"):
            run.choose(density)
    with pytest.raises(ValueError, match="objective: expected one of"):
        run.choose(0.5, "speed")
    with pytest.raises(ValueError, match="choose: expected measurements, got none"):
        Calibration().choose(0.5)
    with pytest.raises(ValueError, match="density: expected a number"):
        run.choose()


def test_an_interrupted_run_continues_and_a_finished_one_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, state = tiny("llama"), prompt(200), tmp_path / "state.jsonl"
    whole = Calibration(candidates=CANDIDATES, blocks=2)
    whole.measure(model, ids)
    whole.measure(model, prompt(150, seed=1))

    calls = []
    real = calibrate.measure_layer

    def stopping(*args):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(calibrate, "measure_layer", stopping)
    first = Calibration(candidates=CANDIDATES, blocks=2, state=state)
    with pytest.raises(KeyboardInterrupt):
        first.measure(model, ids)
    assert model.config._attn_implementation == "sdpa"
    calls.append(None)  # from here on nothing stops
    with state.open("a") as file:
        file.write('{"settings": "unfin')  # killed while it wrote
    second = Calibration(candidates=CANDIDATES, blocks=2, state=state)
    seen = []
    second.measure(model, ids, lambda n, of: seen.append((n, of)))
    second.measure(model, prompt(150, seed=1))
    assert seen == [(1, 2), (2, 2)]
    assert len(calls) == 1 + 1 + 3  # one layer before the stop, then one and two
    assert second.choose(0.9) == whole.choose(0.9)
    third = Calibration(candidates=CANDIDATES, blocks=2, state=state)
    third.measure(model, ids)
    assert len(calls) == 5
    assert len(state.read_text().splitlines()) == 4
    other = Calibration(candidates=CANDIDATES, blocks=3, state=state)
    with pytest.raises(ValueError, match="got none"):
        other.choose(0.5)  # other settings, other measurements


def test_a_choice_is_of_the_prompts_and_the_model_of_its_own_run(tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    model = tiny("llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    runs = {}
    for name, lm, ids in (
        ("first", model, prompt(400)),
        ("prompt", model, prompt(400, seed=2)),
        ("model", other, prompt(400)),
    ):
        kept = Calibration(candidates=CANDIDATES, blocks=2, state=state)
        kept.measure(lm, ids)
        alone = Calibration(candidates=CANDIDATES, blocks=2)
        alone.measure(lm, ids)
        runs[name] = kept.choose(0.9)
        assert runs[name] == alone.choose(0.9)
    assert runs["model"].error != runs["first"].error != runs["prompt"].error


def test_short_prompts_give_finite_measurements_and_too_short_ones_an_error() -> None:
    model = tiny("llama")
    run = Calibration(candidates=CANDIDATES)
    run.measure(model, prompt(128))
    choice = run.choose(1.0)
    assert all(0 <= x <= 1 for row in choice.recall for x in row)
    with pytest.raises(
        ValueError, match=r"expected one prompt of at least 128 tokens, got \[1, 99"
    ):
        run.measure(model, prompt(99))


def test_the_written_file_patches_the_model_and_sliding_layers_stay_dense(tmp_path: Path) -> None:
    model = tiny("gemma2")  # one of two layers has a window
    run = Calibration(candidates=CANDIDATES, blocks=3)
    run.measure(model, prompt(400))
    choice = run.choose(0.8)
    assert sorted(sum(row) for row in choice.cost)[0] == 0.0
    file = write_patterns(choice.patterns, tmp_path / "patterns.json")
    assert read_patterns(file) == choice.patterns
    ids = prompt(300, seed=3)
    with torch.no_grad():
        dense = model(ids).logits
        with lowcontext.patched(model, "minference", patterns=file, min_length=0):
            sparse = model(ids).logits
    assert torch.isfinite(sparse).all()
    assert torch.allclose(dense[:, :64], sparse[:, :64], atol=1e-4)


def test_only_published_patterns_are_chosen_where_asked() -> None:
    run = filled(
        [[[0.1, 0.1], [0.3, 0.3], [0.1, 0.2]]],
        [[[0.5, 0.5], [0.1, 0.1], [0.0, 0.0]]],
        [[[1.0, 1.0]] * 3],
    )
    assert {p.kind for p in run.choose(0.9).patterns[0]} == {"gain"}
    run.published = True
    assert {p.kind for p in run.choose(0.9).patterns[0]} == {"vertical_and_slash"}


def test_probing_leaves_the_model_as_it_was_and_refuses_a_patched_one() -> None:
    model, ids = tiny("qwen3"), prompt(130)
    with torch.no_grad():
        before = model(ids).logits
    seen = []
    probe(model, ids, lambda q, k, v, layer, window: seen.append((q.shape, k.shape, layer)))
    assert [x[2].layer_idx for x in seen] == [0, 1]
    with torch.no_grad():
        assert torch.equal(before, model(ids).logits)
    with (
        lowcontext.patched(model, "dense"),
        pytest.raises(ValueError, match="expected an unpatched model"),
    ):
        probe(model, ids, lambda *_: None)


def test_head_maps_count_what_is_read_and_held() -> None:
    q, k, _ = tensors(300)
    method = lowcontext.get_method("streaming_llm", sink=4, window=64)
    layer = LayerContext(0, 1, 0.25)
    p = (q[0, 3].double() @ k[0, 1].double().T * 0.25).masked_fill(
        torch.ones(300, 300).triu(1).bool(), -torch.inf
    )
    p = p.softmax(-1)
    mask = method.prefill(q, k, layer).to_mask(300, 300)[0, 0]
    for cells in (300, 7):
        found = inspection.map_head(q, k, layer, method, 3, cells)
        assert found.recall == pytest.approx(float((p * mask).sum() / 300), abs=1e-5)
        assert found.density == pytest.approx(float(mask.sum() / (300 * 301 / 2)), abs=1e-6)
        assert torch.allclose(found.weights.sum(1), torch.ones(cells), atol=1e-5)
    fine = inspection.map_head(q, k, layer, method, 3, 300)
    assert torch.allclose(fine.weights.double(), p, atol=1e-5)
    assert torch.equal(fine.read > 0, mask)


def test_pictures_are_written_and_wrong_places_are_named(tmp_path: Path) -> None:
    model, method = tiny("llama"), lowcontext.get_method("minference", min_length=0)
    found = inspection.head_map(model, prompt(260), method, layer=1, head=3, cells=64)
    assert inspection.plot_head(found, tmp_path / "a" / "head.png").stat().st_size > 5000
    table = [{str(h): ["vertical_and_slash", 30, 100 * h, 1] for h in range(4)}] * 3
    picture = inspection.plot_patterns(read_patterns(table), tmp_path / "patterns.png")
    assert picture.stat().st_size > 2000
    with pytest.raises(ValueError, match="layer: expected a layer of the model, got 2"):
        inspection.head_map(model, prompt(130), method, layer=2, head=0)
    with pytest.raises(ValueError, match="head: expected 0 to 3, got 4"):
        inspection.head_map(model, prompt(130), method, layer=0, head=4)
    moving = lowcontext.get_method("tokenselect", positions="compact")
    with pytest.raises(NotImplementedError, match="tokenselect.*: expected a method that reads"):
        inspection.head_map(model, prompt(130), moving, layer=0, head=0)
    windowed = tiny("gemma2")
    window = next(i for i in (0, 1) if windowed.config.layer_types[i] == "sliding_attention")
    with pytest.raises(ValueError, match="expected one with full attention"):
        inspection.head_map(windowed, prompt(130), method, layer=window, head=0)
