"""Pattern files: the published schema, and errors that name the place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lowcontext
from lowcontext import LayerContext
from lowcontext.methods._patterns import HeadPattern, read_patterns, write_patterns

SCHEMA = (
    '[{"0": ["vertical_and_slash", 1000, 6096, 0.9623493552207947],\n'
    '  "1": ["vertical_and_slash", 3500, 100, 22000000]},\n'
    ' {"0": ["stream_llm", 100, 800, 0.93], "1": ["block_sparse", 8, 1, 0]}]\n'
)


@pytest.mark.parametrize("indent", [None, 2])
def test_published_files_load_in_both_styles_with_float_and_int_scores(
    tmp_path: Path, indent: int | None
) -> None:
    file = tmp_path / "patterns.json"
    file.write_text(json.dumps(json.loads(SCHEMA), indent=indent))
    table = read_patterns(file)
    assert table[0][1] == HeadPattern("vertical_and_slash", 3500, 100, 22000000.0)
    assert [p.kind for p in table[1]] == ["stream_llm", "block_sparse"]
    assert read_patterns(write_patterns(table, tmp_path / "again.json")) == table
    method = lowcontext.get_method("minference", patterns=str(file))
    assert str(method).startswith(f"minference(patterns={file} #")
    file.write_text(SCHEMA.replace("3500", "3000"))
    assert str(lowcontext.get_method("minference", patterns=str(file))) != str(method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[1].pop("1"), r'layer 1: expected heads "0" to "1".* "1" is missing'),
        (
            lambda t: t[1].update({"2": t[1].pop("1")}),
            r'layer 1: .*"1" is missing, "2" is too many',
        ),
        (lambda t: t[0].update({"x": t[0]["0"]}), r"layer 0: expected heads .*got 'x'"),
        (lambda t: t[0]["1"].__setitem__(0, "spiral"), r'layer 0, head "1": expected a pattern .*'),
        (lambda t: t[0]["1"].pop(), r'layer 0, head "1": expected \[pattern, a, b, score\]'),
        (lambda t: t[0]["0"].__setitem__(1, "many"), r'layer 0, head "0": a: expected an int'),
        (lambda t: t[1]["0"].__setitem__(2, -1), r'layer 1, head "0": b: expected an int'),
        (lambda t: t[1]["0"].__setitem__(2, 0), r'layer 1, head "0": b: expected a window'),
        (lambda t: t[1]["1"].__setitem__(3, None), r'layer 1, head "1": score: expected a number'),
        (lambda t: t.__setitem__(0, []), r"layer 0: expected an object"),
        (lambda t: t.clear(), r"expected an array with one object per layer, got \[\]"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_place(
    tmp_path: Path, change, message: str
) -> None:
    table = json.loads(SCHEMA)
    change(table)
    file = tmp_path / "patterns.json"
    file.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=f"patterns: {file}: {message}"):
        lowcontext.get_method("minference", patterns=file)
    file.write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        lowcontext.get_method("minference", patterns=file)


def test_a_file_for_another_model_is_an_error_that_names_layer_and_heads() -> None:
    q, k = torch.randn(1, 4, 200, 16), torch.randn(1, 2, 200, 16)
    table = [{str(h): ["vertical_and_slash", 40, 100, 1.0] for h in range(4)}] * 3
    method = lowcontext.get_method("minference", patterns=table, min_length=0)
    with pytest.raises(ValueError, match="expected 4 layers as in the model, got 3; layer 3 is"):
        list(method.parts(q, k, LayerContext(layer_idx=3, num_layers=4)))
    with pytest.raises(ValueError, match="expected 4 layers as in the model, got 3"):
        list(method.parts(q, k, LayerContext(layer_idx=0, num_layers=4)))
    with pytest.raises(ValueError, match="layer 1: expected 2 query heads as in the model, got 4"):
        list(method.parts(q[:, :2], k, LayerContext(layer_idx=1, num_layers=3)))


def test_missing_heads_get_the_published_default_only_with_parity() -> None:
    table = [{"0": ["stream_llm", 4, 64, 1.0], "2": ["stream_llm", 4, 64, 1.0]}]
    with pytest.raises(ValueError, match='"1" is missing'):
        lowcontext.get_method("minference", patterns=table)
    method = lowcontext.get_method("minference", patterns=table, parity="minference")
    layer = method.layer_patterns(LayerContext(), 3)
    assert layer[1] == HeadPattern("vertical_and_slash", 1000, 6096)
    assert str(method).startswith("minference(patterns=<1 layers of 3 heads> #")
