"""A small standard Llama that solves needle retrieval by construction.

It is a yardstick for machines without real weights: dense attention answers every needle prompt,
attention to the sink and a recent window alone cannot. It says nothing about how a method fares on
a trained model; see ``docs/retrieval-checkpoint.md``.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from lowcontext.eval import retrieval_weights as weights
from lowcontext.eval import ruler_vocabulary, ruler_weights
from lowcontext.eval.circuits import Shape
from lowcontext.eval.retrieval_tokenizer import (
    BOS,
    EOS,
    PAD,
    build_vocabulary,
    topic_tokens,
    write_tokenizer,
)

KINDS = ("needle", "ruler")


def write_retrieval_checkpoint(folder: str | Path, *, seed: int = 0, kind: str = KINDS[0]) -> Path:
    """Writes the retrieval checkpoint as a Hugging Face model folder.

    The folder loads with ``AutoModelForCausalLM.from_pretrained`` and
    ``AutoTokenizer.from_pretrained``; the same seed gives the same bytes.

    Args:
        folder: Where to write; made if missing. Files of the same names are replaced.
        seed: Seed of the token codes.
        kind: ``"needle"`` (single and multi-key needles; small), or ``"ruler"`` (all tasks of the
            RULER suite but the questions; larger).

    Returns:
        The folder.

    Raises:
        TypeError: If ``seed`` is not an int.
        ValueError: If ``kind`` is unknown.

    Example:
        >>> import tempfile
        >>> folder = write_retrieval_checkpoint(tempfile.mkdtemp())
        >>> (folder / "model.safetensors").exists()
        True
    """
    from safetensors.torch import save_file

    if not isinstance(seed, int):
        raise TypeError(f"seed: expected int, got {type(seed).__name__}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    ids, config, state = (_needle if kind == "needle" else _ruler)(seed)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    special = {"bos_token_id": ids[BOS], "eos_token_id": ids[EOS], "pad_token_id": ids[PAD]}
    _write_json(path / "config.json", config | special)
    _write_json(path / "generation_config.json", {"do_sample": False, **special})
    write_tokenizer(path, ids, max_length=weights.MAX_POSITIONS, join_hyphens=kind == "ruler")
    return path


Parts = tuple[dict[str, int], dict[str, object], dict[str, Tensor]]


def _needle(seed: int) -> Parts:
    ids = build_vocabulary()
    vocabulary = weights.Vocabulary(
        size=len(ids),
        bos=ids[BOS],
        eos=ids[EOS],
        stop=ids["."],
        topic=[ids[token] for token in topic_tokens()],
    )
    shape = Shape(
        hidden=weights.HIDDEN,
        heads=weights.HEADS,
        kv_heads=weights.KV_HEADS,
        head_dim=weights.HEAD_DIM,
        intermediate=weights.INTERMEDIATE,
        theta=weights.ROPE_THETA,
        first_slow=weights.SLOW_PAIRS.start,
    )
    config = _config(len(ids), shape, weights.LAYERS)
    return ids, config, weights.build_weights(vocabulary, seed=seed)


def _ruler(seed: int) -> Parts:
    ids = ruler_vocabulary.build_vocabulary()
    config = _config(len(ids), ruler_weights.SHAPE, ruler_weights.LAYERS)
    words = ruler_vocabulary.words_of(ids)
    return ids, config, ruler_weights.build_ruler_weights(words, seed=seed)


def _config(vocab_size: int, shape: Shape, layers: int) -> dict[str, object]:
    """Returns config.json; RoPE and dtype are named both ways, for transformers 4.57 and 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": weights.MAX_POSITIONS,
        "rms_norm_eps": weights.NORM_EPS,
        "rope_theta": shape.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
