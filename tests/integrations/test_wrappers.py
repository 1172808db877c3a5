"""What else touches a model: PEFT, accelerate, gradient checkpointing, tensor parallelism."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import greedy, left_padded, logits, prompt, tiny

import lowcontext

SPARSE = {"sink": 2, "window": 8, "block_q": 8, "block_k": 8}
ROOT = Path(__file__).parents[2]


def with_lora(model: Any) -> Any:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("order", ["patch, wrap", "wrap, patch"])
@pytest.mark.parametrize("method", ["dense", "streaming_llm"])
def test_lora_before_and_after_patching_is_the_same(order: str, method: str) -> None:
    ids = prompt(40)
    options = SPARSE if method == "streaming_llm" else {}
    plain = with_lora(tiny("llama"))
    before = logits(plain, ids)
    if order == "wrap, patch":
        model = lowcontext.patch_model(with_lora(tiny("llama")), method, **options)
    else:
        model = with_lora(lowcontext.patch_model(tiny("llama"), method, **options))
    difference = (logits(model, ids) - before).abs().max()
    assert difference <= 1e-5 if method == "dense" else difference > 1e-3
    if method == "dense":
        assert torch.equal(greedy(model, ids), greedy(plain, ids))
    lowcontext.unpatch_model(model)
    assert torch.equal(logits(model, ids), before)


def test_merging_lora_keeps_the_patch() -> None:
    ids = prompt(40)
    model = lowcontext.patch_model(with_lora(tiny("llama")), "streaming_llm", **SPARSE)
    expected = logits(model, ids)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=1e-5)
    lowcontext.unpatch_model(merged)


def test_lora_adapters_are_saved_without_a_trace(tmp_path: Path) -> None:
    model = lowcontext.patch_model(with_lora(tiny("llama")), "streaming_llm", **SPARSE)
    model.save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        assert b"lowcontext" not in file.read_bytes().replace(str(ROOT).encode(), b""), file


@pytest.mark.parametrize("where", ["cpu offload", "disk offload"])
def test_offloaded_weights_give_the_same(where: str, tmp_path: Path) -> None:
    import accelerate

    ids, mask = left_padded([prompt(30)[0], prompt(12, seed=2)[0]])
    expected_model = lowcontext.patch_model(tiny("llama"), "streaming_llm", **SPARSE)
    expected = logits(expected_model, ids, mask)
    tokens = greedy(expected_model, ids, attention_mask=mask)
    model = tiny("llama")
    cpu = torch.device("cpu")
    if where == "cpu offload":
        model = accelerate.cpu_offload(model, execution_device=cpu)
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=cpu)
    lowcontext.patch_model(model, "streaming_llm", **SPARSE)
    assert torch.equal(logits(model, ids, mask), expected)
    assert torch.equal(greedy(model, ids, attention_mask=mask), tokens)
    lowcontext.unpatch_model(model)
    assert torch.equal(logits(model, ids[:1]), logits(tiny("llama"), ids[:1]))


def test_a_device_map_gives_the_same(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    plain, ids = tiny("llama"), prompt(40)
    plain.save_pretrained(tmp_path / "model")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    lowcontext.patch_model(model, "dense")
    torch.testing.assert_close(logits(model, ids), logits(plain, ids), rtol=0, atol=1e-5)
    assert torch.equal(greedy(model, ids), greedy(plain, ids))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_dense_model_equal_those_of_the_unpatched_one(checkpointing: bool) -> None:
    ids = prompt(20)
    gradients = []
    for patch in (False, True):
        model = tiny("gemma3").train()
        if patch:
            lowcontext.patch_model(model, "dense")
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_works_after_unpatching() -> None:
    model, ids = tiny("llama").train(), prompt(20)
    model.gradient_checkpointing_enable()
    lowcontext.patch_model(model, "streaming_llm", **SPARSE)
    with pytest.raises(NotImplementedError, match="unpatch_model"):
        model(input_ids=ids, labels=ids)
    lowcontext.unpatch_model(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_density_is_the_share_of_pairs_that_are_read() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="patch_model"), lowcontext.measure_density(model):
        pass
    lowcontext.patch_model(
        model, "streaming_llm", sink=0, window=8, block_q=1, block_k=8, dense_layers=1
    )
    with lowcontext.measure_density(model) as density:
        assert density.prefill != density.prefill  # NaN
        logits(model, prompt(40))
        # Layer 0 reads all 820 pairs, layer 1 the last 8 keys of each query: 36 + 32 * 8 = 292.
        assert density.prefill == pytest.approx((820 + 292) / (2 * 820))
        assert density.decode != density.decode
        greedy(model, prompt(40), new=2)
    # generate reads the prompt again, and one decode step: 41 pairs in layer 0, 8 in layer 1.
    assert density.prefill == pytest.approx((820 + 292) / (2 * 820))
    assert density.decode == pytest.approx((41 + 8) / (2 * 41))
    assert greedy(model, prompt(40)).shape == (1, 8)
    assert density.decode == pytest.approx((41 + 8) / (2 * 41))


def test_density_of_windows_is_not_counted_and_padding_is_not_either() -> None:
    model = lowcontext.patch_model(tiny("gemma3"), "dense")
    ids, mask = left_padded([prompt(20)[0], prompt(12, seed=2)[0]])
    with lowcontext.measure_density(model) as density:
        logits(model, ids, mask)
    assert density.prefill == 1.0
    assert density._pairs["prefill"] == 4 * (20 * 21 // 2 + 12 * 13 // 2)


TENSOR_PARALLEL = """
import sys
import torch
import torch.distributed as dist
from tiny_models import greedy, logits, prompt
from transformers import LlamaForCausalLM
import lowcontext

torch.set_num_threads(1)
path = sys.argv[1]
ids = prompt(60)
model = LlamaForCausalLM.from_pretrained(path, tp_plan="auto").eval()
assert dist.get_world_size() == 2
cache = model(input_ids=ids[:, :8].clone(), use_cache=True).past_key_values
assert cache.layers[0].keys.shape[1] == 1, "expected local heads"

select = {"k": 6, "sink": 2, "local": 4, "chunk": 8, "tail": 4, "page": 2, "coarse": 2}
runs = [("dense", {}), ("streaming_llm", {"sink": 2, "window": 8, "block_q": 8, "block_k": 8})]
for scope in ("layer", "kv_head"):
    for scoring in ("exact", "int4", "pages"):
        runs.append(("tokenselect", {**select, "scope": scope, "scoring": scoring}))
    for cosine, threshold in (("head", 0.3), ("layer", 0.6)):
        cache = {"cache_cosine": cosine, "cache_threshold": threshold, "scoring": "exact"}
        runs.append(("tokenselect", {**select, **cache, "scope": scope}))
runs += [
    ("recycled", {"k": 6, "threshold": 0.3}),
    ("tidaldecode", {"k": 6, "select_layers": [0]}),
    ("quest", {"budget": 16, "page": 4, "dense_layers": 0}),
]
for method, options in runs:
    alone = lowcontext.patch_model(LlamaForCausalLM.from_pretrained(path).eval(), method, **options)
    with lowcontext.patched(model, method, **options):
        torch.testing.assert_close(logits(model, ids), logits(alone, ids), rtol=0, atol=1e-5)
        seen = []
        for each in (model, alone):
            with lowcontext.measure_selection(each) as selection:
                tokens = greedy(each, ids, new=24, min_new_tokens=24)
            steps = selection.count("cache_hits")
            seen.append((tokens.tolist(), steps and selection.mean("cache_hits")))
    assert seen[0] == seen[1], (method, options, seen)
    if "cache_threshold" in options or method == "recycled":
        assert 0 < seen[0][1] < 1, (method, options, seen[0])
print("rank", dist.get_rank(), "passed")
dist.destroy_process_group()
"""


def test_tensor_parallel_ranks_equal_one_process(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    script = tmp_path / "tensor_parallel.py"
    script.write_text(TENSOR_PARALLEL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "model")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for number, (rank, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert rank.returncode == 0, output
        assert f"rank {number} passed" in output
