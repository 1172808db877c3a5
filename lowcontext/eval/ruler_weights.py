r"""The weights of the checkpoint of kind ``ruler``: several values, several keys, chains, counts.

Written down, not trained. Residual stream: flags and figures in the first 64 dims, then codes and
hashes of +1 and -1 (``SLOTS``). C0..C4 are the codes of a token and of the four before it::

    layer 0   heads copy C1..C4
    MLP 0     hashes by parity of code bits: of four tokens (ends here, ended one before), of two
              (the same), of a name's two words (from its last word, from the value behind it)
    layer 1   h0 attends to the same token: the mass left for BOS is 8 / (8 + count)
              h1 finds "answer": the prompt is over   h2 averages the topic flag (sigma 12)
              h3 copies the name that stood before the last "="
    MLP 1     log(1 + count / 8), for words of a list
    layer 2   h0 finds "are" behind "answer": an answer of several parts is due; copies the
              token before it, which tells what is asked
    layer 3   h0 sums the codes of the parts said   h2 sums the hashes of the names asked for
    layer 4   h0 continues a part: the token behind the last match of one token and of four
              the others begin one:  h1 the next name of a chain   h2 a value of a name asked for,
              not said yet   h3 the word with the largest count, not said yet
    lm_head   a part is continued before one is begun; nothing to begin, or enough said, gives EOS
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from lowcontext.eval.circuits import Attention, Mlp, Shape
from lowcontext.eval.retrieval_weights import NORM_EPS, TOPIC_STRENGTH, draw_codes
from lowcontext.eval.ruler_vocabulary import Words

SHAPE = Shape(
    hidden=1024,
    heads=4,
    kv_heads=2,
    head_dim=128,
    intermediate=768,
    theta=1e36,  # ten fast pairs tell distances apart, 54 turn less than 0.32 rad over 131072
    first_slow=10,
)
LAYERS = 5
CODE_BITS, HASH_BITS, NAME_BITS, NGRAM = 64, 32, 38, 4

(
    CONST,
    BOS_FLAG,
    TOPIC_FLAG,
    TOPIC,
    PART,
    WORD,
    ABSENT,
    COUNT,
    SQUARE,
    ASKED,
    DUE,
    SAID_SHARE,
    EQUALS,
    ENOUGH,
) = range(14)
CONST_VALUE = 32.0


def _slots() -> dict[str, range]:
    sizes = {f"C{i}": CODE_BITS for i in range(NGRAM + 1)}
    sizes |= {"ends": HASH_BITS, "ended": HASH_BITS, "pair": HASH_BITS, "pair_before": HASH_BITS}
    sizes |= {"name": NAME_BITS, "name_before": NAME_BITS, "names": NAME_BITS}
    sizes |= {"source": CODE_BITS, "mode": CODE_BITS, "said": CODE_BITS}
    sizes |= {"continue": CODE_BITS, "begin": CODE_BITS}
    slots, start = {}, 64
    for name, size in sizes.items():
        slots[name] = range(start, start + size)
        start += size
    return slots


SLOTS = _slots()

# Logits, in nats.
OFFSET_LOGIT, OFFSET_GAP = 96.0, 20.0
SAME_LOGIT, SAME_SINK = 60.0, 8.0  # a token that stands here 8 times shares with BOS in halves
FLAG_LOGIT = 50.0
SMEAR_LOGITS = {1: 0.03, 2: 0.45, 3: 5.0} | dict.fromkeys(range(4, 10), 18.0)
NEAR_LOGITS = {2: 30.0} | dict.fromkeys(range(3, 10), 30.0)
SUM_SINK = 40.0  # weight of BOS beside the parts said: their mean becomes nearly a sum
MATCH_LOGIT = 256.0
TOPIC_LOGIT = TOPIC_STRENGTH * MATCH_LOGIT
RANK_LOGIT, STEP, OVER, LARGEST = 300.0, 0.65, 0.3, 8.0
SAID_LOGIT, ORDER_LOGIT, IDLE_LOGIT = 90.0, 80.0, 20000.0
COUNT_UNIT = 8.0
COUNT_KNOTS = 25  # half octaves: counts to 8 * 4096
CONTINUE_LOGIT, BEGIN_LOGIT, WHOLE_LOGIT = 80.0, 60.0, 40.0
STOP_LOGIT, NOTHING_LOGIT = 36.0, 12.0
ENOUGH_SLOPE, ENOUGH_LOGIT = 100.0, 160.0


def build_ruler_weights(words: Words, *, seed: int) -> dict[str, Tensor]:
    """Builds the state dict of the ``LlamaForCausalLM``.

    Args:
        words: Ids by their part in the tasks.
        seed: Seed of the token codes, the only random part.

    Returns:
        State dict, float32, in the naming of transformers.
    """
    return _Builder(words, draw_codes(words.size, seed)).build()


class _Builder:
    """The layers, and what they need of the vocabulary."""

    def __init__(self, words: Words, codes: Tensor) -> None:
        self.words, self.codes = words, codes
        self.one = torch.zeros(1, SHAPE.hidden)
        self.one[0, CONST] = 1 / CONST_VALUE

    def build(self) -> dict[str, Tensor]:
        words = self.words
        embedding = torch.zeros(words.size, SHAPE.hidden)
        embedding[:, CONST] = CONST_VALUE
        embedding[:, list(SLOTS["C0"])] = self.codes
        embedding[words.bos, BOS_FLAG] = 2.0
        for column, ids in ((TOPIC_FLAG, words.topic), (PART, words.parts), (WORD, words.words)):
            embedding[ids, column] = 1.0
        state = {
            "model.embed_tokens.weight": embedding,
            "model.norm.weight": torch.ones(SHAPE.hidden),
        }
        bos = embedding[words.bos].clone()
        for layer in range(LAYERS):
            attention = self.attention(layer)
            bos = attention.pin_bos(bos, BOS_FLAG, NORM_EPS)
            mlp = self.mlp(layer)
            bos = mlp.run(bos, NORM_EPS)
            prefix = f"model.layers.{layer}."
            state |= {f"{prefix}self_attn.{n}.weight": w for n, w in attention.state().items()}
            state |= {f"{prefix}mlp.{n}.weight": w for n, w in mlp.state().items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                state[f"{prefix}{norm}.weight"] = torch.ones(SHAPE.hidden)
        state["lm_head.weight"] = self.head()
        return state

    def attention(self, layer: int) -> Attention:
        rms = _rms("C0") if layer == 0 else _rms(*_after(layer))
        attention = Attention(SHAPE, rms, self.one)
        fill = (self.offsets, self.counts, self.due, self.sums, self.parts)[layer]
        fill(attention)
        return attention

    def mlp(self, layer: int) -> Mlp:
        rms = _rms(*_CODES) if layer == 0 else _rms(*_after(layer + 1))
        mlp = Mlp(SHAPE, rms, self.one)
        if layer == 0:
            _hashes(mlp)
        elif layer == 1:
            self.log_count(mlp)
        elif layer == LAYERS - 1:
            self.enough(mlp)
        return mlp

    def offsets(self, a: Attention) -> None:
        """Layer 0: head h reads the code h + 1 tokens back, or BOS where there is none."""
        fast = range(8)
        value = range(CODE_BITS)
        for head in range(SHAPE.kv_heads):
            a.show_distance(head)
            a.value(head, value, slot("C0"))
            a.bos_value[head, list(value)] = self.codes[self.words.bos]
        for head in range(SHAPE.heads):
            a.ask_distance(head, dict.fromkeys(fast, OFFSET_LOGIT), offset=head + 1)
            a.sink(head, len(fast) * OFFSET_LOGIT - OFFSET_GAP)
            a.write(head, value, SLOTS[f"C{head + 1}"], 1.0)

    def counts(self, a: Attention) -> None:
        """Layer 1: how often this token stood here, whether "answer" did; topic; name set last."""
        content = SHAPE.slow_dims[:CODE_BITS]
        for head in range(SHAPE.kv_heads):
            a.key(head, content, slot("C0"))
        a.ask(0, content, slot("C0") / CODE_BITS, SAME_LOGIT)
        a.sink(0, SAME_LOGIT + math.log(SAME_SINK))
        a.ask(1, content, self.code("answer"), 2 * FLAG_LOGIT)
        a.sink(1, 1.5 * FLAG_LOGIT)
        a.value(0, [0], self.one)
        a.bos_value[0, 1] = 1.0
        a.write(0, [1], [ABSENT], 1.0)
        a.write(1, [0], [ASKED], 1.0)

        a.show_distance(1)
        a.ask_distance(2, SMEAR_LOGITS)
        a.ask_distance(3, NEAR_LOGITS)
        a.ask(3, content, self.code("="), 2 * FLAG_LOGIT)
        a.sink(3, sum(NEAR_LOGITS.values()) + 1.7 * FLAG_LOGIT)
        name = range(2, 2 + CODE_BITS)
        a.value(1, [0], flag(TOPIC_FLAG))
        a.value(1, [1], self.one)
        a.value(1, name, slot("C3"))
        a.write(2, [0], [TOPIC], 1.0)
        a.write(3, [1], [EQUALS], 1.0)
        a.write(3, name, SLOTS["source"], 1.0)
        # Without a name, or without a mode, the code of BOS: the norm stays what it is elsewhere.
        a.bos_value[1, list(name)] = self.codes[self.words.bos]

    def log_count(self, mlp: Mlp) -> None:
        """MLP 1: -log of the mass that BOS kept, by pieces between powers of two; 0 for others."""
        reading = (flag(WORD) - flag(ABSENT) - self.one)[0]
        knots = [2.0 ** (-k / 2) for k in range(COUNT_KNOTS + 1)]
        for column, power, unit in ((COUNT, 1, COUNT_UNIT), (SQUARE, 2, COUNT_UNIT**2)):
            values = [(-math.log(knot)) ** power / unit for knot in knots]
            slope = 0.0
            for (b0, b1), (y0, y1) in zip(pairwise(knots), pairwise(values), strict=True):
                steeper = (y1 - y0) / (b0 - b1)
                mlp.hinge(reading, -b0, steeper - slope, column, sharpness=40.0 / b0)
                slope = steeper

    def enough(self, mlp: Mlp) -> None:
        """MLP 4: positive once as many words are said as the mode asks for; else 0."""
        share = flag(SAID_SHARE) - flag(DUE)
        for word, gate in self.gates().items():
            said = self.words.counted[word] - 0.5
            share = share + (1 - said / (SUM_SINK + said)) * gate
        mlp.hinge(share[0], 0.0, ENOUGH_SLOPE, ENOUGH, sharpness=4000.0)

    def due(self, a: Attention) -> None:
        """Layer 2: whether "are" stood behind "answer", and the token before it."""
        both, value = [SHAPE.slow_dims[0]], range(1, 1 + CODE_BITS)
        a.key(0, both, flag(ASKED) + self.mark("are"))
        a.ask(0, both, self.one, FLAG_LOGIT)
        a.sink(0, 1.75 * FLAG_LOGIT)
        a.value(0, [0], self.one)
        a.value(0, value, slot("C1"))
        a.write(0, [0], [DUE], 1.0)
        a.write(0, value, SLOTS["mode"], 1.0)
        a.bos_value[0, list(value)] = self.codes[self.words.bos]

    def sums(self, a: Attention) -> None:
        """Layer 3: the parts said and the names asked for."""
        both = [SHAPE.slow_dims[0]]
        a.key(0, both, flag(PART) + flag(DUE))
        a.ask(0, both, self.one, FLAG_LOGIT)
        a.sink(0, 2 * FLAG_LOGIT + math.log(SUM_SINK))
        a.value(0, [0], self.one)
        a.value(0, range(1, 1 + CODE_BITS), slot("C0"))
        a.write(0, [0], [SAID_SHARE], 1.0)
        a.write(0, range(1, 1 + CODE_BITS), SLOTS["said"], 1.0)
        a.key(1, both, flag(ASKED) + self.mark("-", of="C1"))
        a.ask(2, both, flag(DUE), FLAG_LOGIT)
        a.sink(2, 2 * FLAG_LOGIT + math.log(SUM_SINK))
        a.value(1, range(NAME_BITS), slot("name"))
        a.write(2, range(NAME_BITS), SLOTS["names"], 1.0)

    def parts(self, a: Attention) -> None:
        """Layer 4: what goes on, and what begins."""
        dims = iter(SHAPE.slow_dims)
        gram, last, pair = ([next(dims) for _ in range(HASH_BITS)] for _ in range(3))
        node, topic = [next(dims)], [next(dims)]
        a.key(0, gram, slot("ended"))
        a.key(0, last, slot("C1")[:HASH_BITS])
        a.key(0, pair, slot("pair_before"))
        a.key(0, node, self.mark(".") + flag(EQUALS))
        a.key(0, topic, flag(TOPIC))
        a.value(0, range(CODE_BITS), slot("C0"))
        a.value(0, range(CODE_BITS, 2 * CODE_BITS), slot("source"))

        a.ask(0, gram, slot("ends") / HASH_BITS, 0.4 * MATCH_LOGIT)
        a.ask(0, last, slot("C0")[:HASH_BITS] / HASH_BITS, MATCH_LOGIT)
        a.ask(0, topic, flag(TOPIC), TOPIC_LOGIT)
        a.sink(0, 0.75 * MATCH_LOGIT)
        a.write(0, range(CODE_BITS), SLOTS["continue"], 2.0)

        follow = (slot("pair") + slot("pair_before")) / HASH_BITS
        a.ask(1, pair, follow, MATCH_LOGIT)
        a.ask(1, node, self.one, MATCH_LOGIT)
        a.ask(1, topic, flag(TOPIC), TOPIC_LOGIT)
        a.sink(1, 2.6 * MATCH_LOGIT)
        a.write(1, range(CODE_BITS, 2 * CODE_BITS), SLOTS["begin"], 2.0)

        dims = iter(SHAPE.slow_dims)
        name = [next(dims) for _ in range(NAME_BITS)]
        code = [next(dims) for _ in range(CODE_BITS)]
        value, topic, count, square = ([next(dims)] for _ in range(4))
        a.key(1, name, slot("name_before"))
        a.key(1, code, slot("C0"))
        a.key(1, value, self.mark("is", of="C1") + flag(PART))
        a.key(1, topic, flag(TOPIC))
        a.key(1, count, COUNT_UNIT * flag(COUNT))
        a.key(1, square, COUNT_UNIT**2 * flag(SQUARE))
        a.value(1, range(CODE_BITS), slot("C0"))

        a.ask(2, name, slot("names") * (SUM_SINK / NAME_BITS), 0.8 * MATCH_LOGIT)
        a.ask(2, code, slot("said") * (-SUM_SINK / CODE_BITS), 1.4 * MATCH_LOGIT)
        a.ask(2, value, flag(DUE), MATCH_LOGIT)
        # Equal candidates in some order; graded, for plain overlaps of codes are often equal.
        grades = torch.linspace(0.0, 2.0, CODE_BITS) / CODE_BITS
        order = (self.codes[self.words.bos] * grades)[:, None]
        a.ask(2, code, order * self.one, ORDER_LOGIT)
        a.ask(2, topic, flag(TOPIC), TOPIC_LOGIT)
        a.sink(2, 2.35 * MATCH_LOGIT)
        a.write(2, range(CODE_BITS), SLOTS["begin"], 2.0)

        # -RANK (count - goal)^2, both logarithms. The goal is LARGEST at first, then STEP under
        # the last count, or just over it where all counts asked for are equal.
        gates = self.gates()
        equal = sum(gates[word] for word in self.words.equal)
        goal = COUNT_UNIT * flag(COUNT) + LARGEST * (self.one - flag(PART))
        goal = goal - STEP * self.one + (STEP + OVER) * equal
        a.ask(3, count, goal, 2 * RANK_LOGIT)
        a.ask(3, square, -self.one, RANK_LOGIT)
        a.ask(3, code, slot("said") * (-SUM_SINK / CODE_BITS), SAID_LOGIT)
        a.ask(3, code, order * equal, ORDER_LOGIT)
        a.sink(3, IDLE_LOGIT, self.one - sum(gates.values()))
        a.write(3, range(CODE_BITS), SLOTS["begin"], 2.0)

    def gates(self) -> dict[int, Tensor]:
        """Readings [1, hidden] of the mode: 1 for its own word, 0 for the others'."""
        ids = [*self.words.counted, self.words.bos]
        dual = torch.linalg.pinv(self.codes[ids].double()).T.float()
        return {word: (dual[i] @ slot("mode"))[None] for i, word in enumerate(self.words.counted)}

    def head(self) -> Tensor:
        words = self.words
        rms = _rms(*_after(LAYERS), "begin", "continue", doubled=2)
        head = torch.zeros(words.size, SHAPE.hidden)
        copied = self.codes @ (slot("continue") / (2.0 * CODE_BITS))
        begun = self.codes @ (slot("begin") / (2.0 * CODE_BITS))
        piece = torch.zeros(words.size, 1)
        piece[words.pieces] = 1.0
        head += piece * CONTINUE_LOGIT * copied
        head += (1 - piece) * (WHOLE_LOGIT * copied + BEGIN_LOGIT * begun)
        stop = sum(copied[i] for i in words.stops)
        nothing = NOTHING_LOGIT * self.one[0] + ENOUGH_LOGIT * flag(ENOUGH)[0]
        head[words.eos] = STOP_LOGIT * stop + nothing
        return head * rms

    def code(self, text: str) -> Tensor:
        """Gives, at every token, the code of a given token over its bits: [bits, hidden]."""
        return self.codes[self.words.marks[text]][:, None] * self.one / CODE_BITS

    def mark(self, text: str, of: str = "C0") -> Tensor:
        """Reads how much a code is that of a given token: [1, hidden], 1 where it is."""
        return (self.codes[self.words.marks[text]] @ slot(of))[None] / CODE_BITS


_CODES = tuple(f"C{i}" for i in range(NGRAM + 1))
_WRITTEN = (*_CODES, "ends", "ended", "pair", "pair_before", "name", "name_before")


def _after(layer: int) -> tuple[str, ...]:
    """Slots that hold signs at every token when a layer reads the residual stream."""
    return (*_WRITTEN, *(name for name, first in (("source", 2), ("mode", 3)) if layer >= first))


def slot(name: str) -> Tensor:
    """Returns the reading of a slot."""
    return torch.eye(SHAPE.hidden)[list(SLOTS[name])]


def flag(column: int) -> Tensor:
    """Returns the reading of a figure, [1, hidden]."""
    return torch.eye(SHAPE.hidden)[column : column + 1]


def _rms(*filled: str, doubled: int = 0) -> float:
    """Returns the divisor of RMSNorm with these slots filled, the last ``doubled`` with +-2."""
    sizes = [len(SLOTS[name]) for name in filled]
    energy = CONST_VALUE**2 + sum(sizes) + 3 * sum(sizes[len(sizes) - doubled :])
    return math.sqrt(energy / SHAPE.hidden + NORM_EPS)


def _hashes(mlp: Mlp) -> None:
    """MLP 0: hashes of n-grams; place i of one reads bits from 8 i on, so that order matters."""
    readings = [slot(name) for name in _CODES]
    grams = {
        "ends": (0, 1, 2, 3),
        "ended": (1, 2, 3, 4),
        "pair": (0, 1),
        "pair_before": (1, 2),
        "name": (0, 2),
        "name_before": (2, 4),
    }
    for name, places in grams.items():
        for bit, column in enumerate(SLOTS[name]):
            bits = [readings[p][8 * i + bit] for i, p in enumerate(places)]
            mlp.parity(bits, column)
