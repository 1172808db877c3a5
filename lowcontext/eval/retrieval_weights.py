r"""The weights of the retrieval checkpoint, written down instead of trained.

Residual stream, 512 dims (every entry of a code or hash is +1 or -1, so RMSNorm divides by a
constant that is known in advance and folded into the next matrix)::

    0 constant 32 | 1 BOS flag 2 | 2 topic flag 0.25 | 3 smeared topic | 64.. codes C0..C4 of this
    token and of the 4 before it, 64 dims each | 384.. query hash QH | 416.. key hash KH | 448.. OUT

    layer 0   head o = 1..4 copies the code of the token o places back into C_o
    MLP 0     QH[t] = hash(t-3..t), KH[t] = hash(t-4..t-1): parity of four code bits, 32 times
    layer 1   head 0 averages the topic flag over the recent past (sigma 12 tokens)
    layer 2   head 0 attends where KH equals the own QH, and copies C0 from there into OUT:
              logit = 256 <QH, KH>/32 + 128 topic_q topic_k,   against 268.8 for BOS
    lm_head   reads OUT; BOS writes nothing there, and then EOS has the largest logit

The other heads (recent tokens, BOS, uniform) are what a trained model has most of; nothing reads
them. RoPE with theta 1e12 gives both kinds of pairs of dims: the fast ones tell distances apart,
the 17 slow ones turn less than 0.32 rad over 131072 tokens and carry content.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 512, 3, 4, 2, 64
INTERMEDIATE = 288
MAX_POSITIONS = 131072
ROPE_THETA = 1e12
NORM_EPS = 1e-6

CONST, BOS_FLAG, TOPIC_FLAG, TOPIC = 0, 1, 2, 3
CODE, QUERY_HASH, KEY_HASH, OUT = 64, 384, 416, 448
CODE_DIM, HASH_BITS, NGRAM = 64, 32, 4

CONST_VALUE, BOS_VALUE, TOPIC_VALUE, OUT_VALUE = 32.0, 2.0, 0.25, 2.0
SCALE = HEAD_DIM**-0.5
PAIRS = HEAD_DIM // 2
FAST_PAIRS = range(8)  # offset heads: 54.4 nats between the asked distance and any other
SLOW_PAIRS = range(15, 32)  # content; the last pair holds the topic and the BOS logit
OFFSET_LOGIT = 96.0  # per fast pair
OFFSET_SINK_GAP = 20.0  # an offset before the first token falls back on BOS
# Smear: sum of a_i (1 - cos w_i d) is d^2 / (2 * 12^2) near 0 and stays large out to 131072.
SMEAR_LOGITS = {4: 4.12, 5: 12.0, 6: 18.0, 7: 18.0, 8: 18.0, 9: 18.0, 10: 18.0, 11: 18.0, 12: 18.0}
NARROW_LOGITS = {2: 3.0, 3: 3.0, 4: 3.0} | dict.fromkeys(range(5, 13), 6.0)
WIDE_LOGITS = dict.fromkeys(range(7, 13), 12.0)
MATCH_LOGIT = 256.0
TOPIC_STRENGTH = 0.5  # of MATCH_LOGIT: how local relevance is; fixed before any method was run
BOS_STRENGTH = 1.05  # of MATCH_LOGIT: what an n-gram without a match attends to
ANSWER_LOGIT, STOP_LOGIT, NO_MATCH_LOGIT = 60.0, 66.0, 12.0  # margins: 18 and more
MAX_CODE_OVERLAP = 28  # of 64: keeps every other token's logit under 44% of the answer's


@dataclass(frozen=True)
class Vocabulary:
    """What the weights need to know of the tokenizer: ids by their part in the task."""

    size: int
    bos: int
    eos: int
    stop: int
    topic: list[int]


def rope_frequencies() -> Tensor:
    """Returns the rotation per token of each pair of dims, float64 [32]."""
    return ROPE_THETA ** (-torch.arange(PAIRS, dtype=torch.float64) / PAIRS)


def draw_codes(count: int, seed: int) -> Tensor:
    """Draws one +-1 code per token, no two of which agree in more than 46 of the 64 bits.

    Args:
        count: Number of tokens.
        seed: Seed of the draw.

    Returns:
        Codes, float32 [count, 64].
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        return torch.randint(0, 2, (n, CODE_DIM), generator=generator).float() * 2 - 1

    codes = draw(count)
    pending = torch.arange(count)
    while pending.numel():
        overlap = codes[pending] @ codes.T  # [P, count]
        overlap[torch.arange(pending.numel()), pending] = -CODE_DIM
        pending = pending[overlap.amax(dim=1) > MAX_CODE_OVERLAP]
        codes[pending] = draw(pending.numel())
    return codes


def build_weights(vocabulary: Vocabulary, *, seed: int) -> dict[str, Tensor]:
    """Builds the state dict of the ``LlamaForCausalLM``.

    Args:
        vocabulary: Ids of the special tokens and of the topic tokens.
        seed: Seed of the token codes, the only random part.

    Returns:
        State dict, float32, in the naming of transformers.
    """
    codes = draw_codes(vocabulary.size, seed)
    embedding = torch.zeros(vocabulary.size, HIDDEN)
    embedding[:, CONST] = CONST_VALUE
    embedding[:, CODE : CODE + CODE_DIM] = codes
    embedding[vocabulary.bos, BOS_FLAG] = BOS_VALUE
    embedding[vocabulary.topic, TOPIC_FLAG] = TOPIC_VALUE

    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(HIDDEN)}
    attention = (
        _offset_attention(codes[vocabulary.bos]),
        _smear_attention(),
        _match_attention(codes[vocabulary.bos]),
    )
    for layer, block in enumerate(attention):
        prefix = f"model.layers.{layer}."
        state |= {f"{prefix}self_attn.{name}.weight": w for name, w in block.items()}
        mlp = _hash_mlp() if layer == 0 else _empty_mlp()
        state |= {f"{prefix}mlp.{name}.weight": w for name, w in mlp.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN)
    state["lm_head.weight"] = _output_head(codes, vocabulary)
    return state


def _rms(codes: int, *, hashes: bool = False, bos: bool = False, out: bool = False) -> float:
    """Returns the divisor of RMSNorm for a residual holding so many codes."""
    energy = CONST_VALUE**2 + codes * CODE_DIM + 2 * HASH_BITS * hashes
    energy += BOS_VALUE**2 * bos + OUT_VALUE**2 * CODE_DIM * out
    return math.sqrt(energy / HIDDEN + NORM_EPS)


def _projections() -> dict[str, Tensor]:
    return {
        "q_proj": torch.zeros(HEADS * HEAD_DIM, HIDDEN),
        "k_proj": torch.zeros(KV_HEADS * HEAD_DIM, HIDDEN),
        "v_proj": torch.zeros(KV_HEADS * HEAD_DIM, HIDDEN),
        "o_proj": torch.zeros(HIDDEN, HEADS * HEAD_DIM),
    }


def _constant_keys(k: Tensor, pairs: range, rms: float) -> None:
    """Gives every key of one kv head (``k`` [64, 512]) the value 1 on the given pairs."""
    k[list(pairs), CONST] = rms / CONST_VALUE


def _distance_queries(q: Tensor, logits: dict[int, float], rms: float, offset: int = 0) -> None:
    """Lets one head (``q`` [64, 512]) add ``a_i cos(w_i (distance - offset))`` for each pair i."""
    frequencies = rope_frequencies()
    for pair, logit in logits.items():
        angle = -offset * float(frequencies[pair])
        weight = logit / SCALE * rms / CONST_VALUE
        q[pair, CONST] = weight * math.cos(angle)
        q[pair + PAIRS, CONST] = weight * math.sin(angle)


def _copy(target: Tensor, row: int, column: int, weight: float) -> None:
    """Writes ``weight`` times the identity of one code at ``target[row.., column..]``."""
    steps = torch.arange(CODE_DIM)
    target[row + steps, column + steps] = weight


def _offset_attention(bos_code: Tensor) -> dict[str, Tensor]:
    """Builds layer 0: head h reads the code h + 1 tokens back, or BOS where there is none."""
    w = _projections()
    rms, rms_bos = _rms(1), _rms(1, bos=True)
    sink = len(FAST_PAIRS) * OFFSET_LOGIT - OFFSET_SINK_GAP
    for head in range(KV_HEADS):
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        k = w["k_proj"][rows]
        _constant_keys(k, FAST_PAIRS, rms)
        k[list(FAST_PAIRS), BOS_FLAG] = -rms / BOS_VALUE  # BOS takes part at no distance
        k[PAIRS - 1, BOS_FLAG] = rms_bos / BOS_VALUE
        _copy(w["v_proj"], head * HEAD_DIM, CODE, rms)
        w["v_proj"][rows, BOS_FLAG] = (rms_bos - rms) / BOS_VALUE * bos_code  # exact there too
    for head in range(HEADS):
        q = w["q_proj"][head * HEAD_DIM : (head + 1) * HEAD_DIM]
        _distance_queries(q, dict.fromkeys(FAST_PAIRS, OFFSET_LOGIT), rms, offset=head + 1)
        q[PAIRS - 1, CONST] = sink / SCALE * rms / CONST_VALUE
        _copy(w["o_proj"], CODE + (head + 1) * CODE_DIM, head * HEAD_DIM, 1.0)
    return w


def _smear_attention() -> dict[str, Tensor]:
    """Builds layer 1: head 0 averages the topic flag over recent tokens; the rest is unread."""
    w = _projections()
    rms = _rms(1 + NGRAM, hashes=True)
    for head in range(KV_HEADS):
        k = w["k_proj"][head * HEAD_DIM : (head + 1) * HEAD_DIM]
        _constant_keys(k, range(SLOW_PAIRS.start), rms)
    for head, logits in enumerate((SMEAR_LOGITS, NARROW_LOGITS, WIDE_LOGITS)):
        _distance_queries(w["q_proj"][head * HEAD_DIM : (head + 1) * HEAD_DIM], logits, rms)
    w["v_proj"][0, TOPIC_FLAG] = rms / TOPIC_VALUE
    _copy(w["v_proj"], HEAD_DIM, CODE, rms)
    w["o_proj"][TOPIC, 0] = 1.0
    return w


def _match_attention(bos_code: Tensor) -> dict[str, Tensor]:
    """Builds layer 2: head 0 finds the n-gram that ends here and copies what followed it."""
    w = _projections()
    rms, rms_bos = _rms(1 + NGRAM, hashes=True), _rms(1 + NGRAM, hashes=True, bos=True)
    slow = [*SLOW_PAIRS][:-1]
    hash_dims = torch.tensor(slow + [pair + PAIRS for pair in slow])
    topic_dim, bos_dim = PAIRS - 1, HEAD_DIM - 1
    bits = torch.arange(HASH_BITS)

    per_bit = math.sqrt(MATCH_LOGIT / HASH_BITS / SCALE) * rms
    topic = math.sqrt(TOPIC_STRENGTH * MATCH_LOGIT / SCALE) * rms
    bos = math.sqrt(BOS_STRENGTH * MATCH_LOGIT / SCALE)
    q, k, v = (w[name] for name in ("q_proj", "k_proj", "v_proj"))
    q[hash_dims, QUERY_HASH + bits] = per_bit
    q[topic_dim, TOPIC] = topic
    q[bos_dim, CONST] = bos * rms / CONST_VALUE
    k[hash_dims, KEY_HASH + bits] = per_bit
    k[topic_dim, TOPIC] = topic
    k[bos_dim, BOS_FLAG] = bos * rms_bos / BOS_VALUE
    # BOS has a hash and a code like any token: both are taken out, so it matches and says nothing.
    bos_hash = _parity(bos_code.expand(NGRAM, CODE_DIM)) * (rms_bos_ratio() ** 2)
    k[hash_dims, BOS_FLAG] = -per_bit * bos_hash / BOS_VALUE
    _copy(v, 0, CODE, rms)
    v[:CODE_DIM, BOS_FLAG] = -rms * bos_code / BOS_VALUE
    _copy(w["o_proj"], OUT, 0, OUT_VALUE)

    for head in range(KV_HEADS):
        _constant_keys(k[head * HEAD_DIM : (head + 1) * HEAD_DIM], range(SLOW_PAIRS.start), rms)
    k[HEAD_DIM + bos_dim, BOS_FLAG] = rms_bos / BOS_VALUE
    _copy(v, HEAD_DIM, CODE, rms)
    _distance_queries(q[HEAD_DIM : 2 * HEAD_DIM], NARROW_LOGITS, rms)
    q[2 * HEAD_DIM + bos_dim, CONST] = 20.0 / SCALE * rms / CONST_VALUE
    _distance_queries(q[3 * HEAD_DIM : 4 * HEAD_DIM], WIDE_LOGITS, rms)
    return w


def rms_bos_ratio() -> float:
    """Returns by how much the MLP's normalised input is smaller at BOS than elsewhere."""
    return _rms(1 + NGRAM) / _rms(1 + NGRAM, bos=True)


def _bit(position: int) -> int:
    """Returns which code bit starts the hash for n-gram place ``position`` (order matters)."""
    return 8 * position


def _parity(codes: Tensor) -> Tensor:
    """Returns the hash [32] of an n-gram given newest first, [4, 64]."""
    parts = [codes[i, _bit(i) : _bit(i) + HASH_BITS] for i in range(NGRAM)]
    return torch.stack(parts).prod(dim=0)


def _hash_mlp() -> dict[str, Tensor]:
    """Builds MLP 0: the product of four +-1 bits as a zigzag of their sum.

    The sum s is -4, -2, 0, 2 or 4; the product is 1, -1, 1, -1, 1. That zigzag is
    ``1 - relu(s + 4) + 2 relu(s + 2) - 2 relu(s) + 2 relu(s - 2)`` with every kink on a value s
    can take, where ``silu(8 z) / 8`` equals ``relu(z)`` to 3e-7.
    """
    w = _empty_mlp()
    gate, up, down = w["gate_proj"], w["up_proj"], w["down_proj"]
    rms = _rms(1 + NGRAM)
    unit = rms / CONST_VALUE
    up[:, CONST] = unit
    hinges = ((-4.0, -1.0), (-2.0, 2.0), (0.0, -2.0), (2.0, 2.0))
    always = 2 * HASH_BITS * len(hinges)
    gate[always, CONST] = 32.0 * unit  # silu(32) is 32
    row = 0
    for target, first in ((QUERY_HASH, 0), (KEY_HASH, 1)):
        for bit in range(HASH_BITS):
            sources = [CODE + (first + i) * CODE_DIM + _bit(i) + bit for i in range(NGRAM)]
            for kink, slope in hinges:
                gate[row, sources] = 8.0 * rms
                gate[row, CONST] = -8.0 * kink * unit
                down[target + bit, row] = slope / 8.0
                row += 1
            down[target + bit, always] = 1.0 / 32.0
    up[row + 1 :] = 0.0
    return w


def _empty_mlp() -> dict[str, Tensor]:
    return {
        "gate_proj": torch.zeros(INTERMEDIATE, HIDDEN),
        "up_proj": torch.zeros(INTERMEDIATE, HIDDEN),
        "down_proj": torch.zeros(HIDDEN, INTERMEDIATE),
    }


def _output_head(codes: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Builds lm_head: the copied token wins, the stop token gives EOS, nothing copied gives EOS."""
    head = torch.zeros(vocabulary.size, HIDDEN)
    rms = _rms(1 + NGRAM, hashes=True, out=True)
    per_dim = rms / (OUT_VALUE * CODE_DIM)
    head[:, OUT : OUT + CODE_DIM] = ANSWER_LOGIT * per_dim * codes
    head[vocabulary.eos, OUT : OUT + CODE_DIM] = STOP_LOGIT * per_dim * codes[vocabulary.stop]
    head[vocabulary.eos, CONST] = NO_MATCH_LOGIT * rms / CONST_VALUE
    return head
