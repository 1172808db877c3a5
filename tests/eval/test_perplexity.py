"""Perplexity: every token once, in its window, and rows that a second run does not make again."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowcontext.eval.perplexity import (
    PerplexityRow,
    PerplexityRun,
    read_perplexity_rows,
    run_perplexity,
    summarize_perplexity,
)
from lowcontext.eval.scoring import mean_interval
from lowcontext.eval.words import filler_words


@pytest.fixture(scope="module")
def small(checkpoint: Path) -> Any:
    """A random model that gives each token a probability of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=4096, num_hidden_layers=2, max_position_embeddings=4096, **sizes
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(" ".join(filler_words()[:700]), encoding="utf-8")
    return str(path)


def expected_nats(model: Any, ids: list[int], start: int, length: int) -> torch.Tensor:
    window = torch.tensor([ids[start : start + length]])
    with torch.no_grad():
        chosen = model(window).logits[0].double().log_softmax(-1)
    return -chosen[:-1].gather(1, window[0, 1:, None])[:, 0]


def test_windows_that_do_not_overlap_score_all_but_their_first_token(
    small: Any, tokenizer: Any, text: str
) -> None:
    rows = list(run_perplexity(small, tokenizer, PerplexityRun(text, length=200)))
    ids = tokenizer(Path(text).read_text())["input_ids"]
    assert len(ids) == 701
    assert [row.window for row in rows] == [0, 1, 2]
    for row in rows:
        nats = expected_nats(small, ids, 200 * row.window, 200)
        assert row.tokens == 199
        assert row.nll == pytest.approx(float(nats.mean()), abs=1e-5)


def test_a_sliding_window_scores_its_new_tokens_with_all_of_its_context(
    small: Any, tokenizer: Any, text: str
) -> None:
    rows = list(run_perplexity(small, tokenizer, PerplexityRun(text, length=200, stride=50)))
    ids = tokenizer(Path(text).read_text())["input_ids"]
    assert [row.tokens for row in rows] == [199] + [50] * 10
    nats = expected_nats(small, ids, 150, 200)[-50:]
    assert rows[3].nll == pytest.approx(float(nats.mean()), abs=1e-5)


def test_tokens_fed_one_by_one_get_the_likelihoods_of_one_pass(
    small: Any, tokenizer: Any, text: str
) -> None:
    (row,) = run_perplexity(small, tokenizer, PerplexityRun(text, 200, windows=1, decode=30))
    ids = tokenizer(Path(text).read_text())["input_ids"]
    assert row.tokens == 30
    assert row.nll == pytest.approx(float(expected_nats(small, ids, 0, 200)[-30:].mean()), abs=1e-5)


@pytest.mark.parametrize("chunk", [1, 33, 60, 199, 500])
@pytest.mark.parametrize("settings", [{}, {"stride": 50}, {"decode": 30}])
def test_a_prompt_fed_in_chunks_gets_the_likelihoods_of_one_pass(
    small: Any, tokenizer: Any, text: str, chunk: int, settings: dict[str, int]
) -> None:
    run = PerplexityRun(text, 200, windows=2, **settings)
    sizes: list[int] = []
    handle = small.model.layers[0].mlp.register_forward_pre_hook(
        lambda _module, args: sizes.append(args[0].shape[1])
    )
    try:
        parts = list(run_perplexity(small, tokenizer, replace(run, chunk=chunk)))
    finally:
        handle.remove()
    assert max(sizes) == min(chunk, 200 - run.decode)
    for part, whole in zip(parts, run_perplexity(small, tokenizer, run), strict=True):
        assert (part.tokens, part.chunk, whole.chunk) == (whole.tokens, chunk, None)
        assert part.nll == pytest.approx(whole.nll, abs=1e-5)
        for start, (count, nats) in whole.buckets.items():
            assert part.buckets[start] == [count, pytest.approx(nats, abs=1e-2)]


def test_buckets_hold_every_token_and_its_nats(small: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(" ".join(filler_words() * 2), encoding="utf-8")
    (row,) = run_perplexity(small, tokenizer, PerplexityRun(str(path), 2500, windows=1))
    counts = {start: count for start, (count, _) in row.buckets.items()}
    assert counts == {"0": 1023, "1024": 1024, "2048": 452}
    assert sum(nats for _, nats in row.buckets.values()) == pytest.approx(row.nll * row.tokens)


def test_a_finished_window_is_not_scored_again(
    small: Any, tokenizer: Any, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "perplexity.jsonl"
    run = PerplexityRun(text, length=200)
    first = list(run_perplexity(small, tokenizer, run, out=out))
    data = out.read_bytes()
    out.write_bytes(data[: data.rindex(b"\n", 0, -1) + 20])
    again = list(run_perplexity(small, tokenizer, run, out=out))
    assert again[:2] == first[:2]
    assert replace(again[2], seconds=0.0) == replace(first[2], seconds=0.0)
    assert read_perplexity_rows(out) == again


def test_another_text_in_the_same_file_is_another_measurement(
    small: Any, tokenizer: Any, tmp_path: Path
) -> None:
    path, out = tmp_path / "book.txt", tmp_path / "perplexity.jsonl"
    for words in (filler_words()[:300], filler_words()[300:600]):
        path.write_text(" ".join(words), encoding="utf-8")
        list(run_perplexity(small, tokenizer, PerplexityRun(str(path), 200), out=out))
    first, second = read_perplexity_rows(out)
    assert first.digest != second.digest


ROW = PerplexityRow(
    "m", "dense", {}, "t", "d", 100, 100, 0, None, 0, 10, 2.0, {"0": [10, 20.0]}, 1, 1.0, {}
)


def test_the_summary_pairs_windows_with_those_of_dense() -> None:
    dense = [replace(ROW, window=w, nll=2.0 + w) for w in range(3)]
    other = [replace(row, method="hip", nll=row.nll + 0.1 + 0.01 * row.window) for row in dense]
    alone = replace(ROW, method="hip", window=9, nll=50.0)
    lines = {line.method: line for line in summarize_perplexity([*dense, *other, alone])}
    assert lines["dense"].difference is None
    assert lines["dense"].perplexity == pytest.approx(math.exp(3.0))
    assert lines["hip"].difference == pytest.approx(0.11)
    low, high = mean_interval([0.1, 0.11, 0.12])
    assert lines["hip"].difference_low == pytest.approx(low)
    assert lines["hip"].difference_high == pytest.approx(high)
    assert lines["hip"].gaps == pytest.approx({0: 0.1, 1: 0.11, 2: 0.12})
    assert (lines["hip"].nats[9], lines["dense"].gaps) == (50.0, {})


def test_the_summary_keeps_texts_and_models_apart() -> None:
    one = [ROW, replace(ROW, method="hip", nll=2.5)]
    other = [replace(row, text="u", nll=row.nll + row.nll) for row in one]
    third = [replace(row, model="n", nll=1.0) for row in one]
    lines = summarize_perplexity([*one, *other, *third])
    assert [(line.method, line.windows, line.gaps) for line in lines] == [
        ("dense", 1, {}),
        ("hip", 1, {0: 0.5}),
        ("dense", 1, {}),
        ("hip", 1, {0: 1.0}),
        ("dense", 1, {}),
        ("hip", 1, {0: 0.0}),
    ]


def test_a_t_interval_is_right_at_the_end_of_the_table_and_beyond() -> None:
    # 97.5% quantiles: 2.228 with 10 degrees of freedom, 2.2010 with 11, 2.0423 with 30.
    for freedom, quantile in ((10, 2.228), (11, 2.2010), (30, 2.0423)):
        values = [0.0] * freedom + [1.0]
        low, high = mean_interval(values)
        spread = math.sqrt(1 / (freedom + 1)) / math.sqrt(freedom + 1)
        assert (high - low) / 2 / spread == pytest.approx(quantile, abs=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "lengths: expected 1 or more, got 0"),
        ({"stride": 201}, "stride: expected 1..200 .the length., got 201"),
        ({"decode": 200}, "decode: expected 0..199, got 200"),
    ],
)
def test_a_run_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PerplexityRun("t", 200), **change)


def test_a_missing_or_short_text_is_refused(small: Any, tokenizer: Any, text: str) -> None:
    with pytest.raises(ValueError, match="text: expected a UTF-8 file, got 'nowhere'"):
        run_perplexity(small, tokenizer, PerplexityRun("nowhere", 200))
    with pytest.raises(ValueError, match="expected at least 1000 tokens .a window., got 701"):
        run_perplexity(small, tokenizer, PerplexityRun(text, 1000))
