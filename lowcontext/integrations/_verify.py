"""verify=True: a patched model that lists every key must compute what the unpatched one does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowcontext.index import BlockIndex
from lowcontext.methods import LayerContext, Method

_PROMPT = 48
_STEPS = 2
_TOLERANCE = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}


@dataclass(frozen=True)
class Everything(Method):
    """Lists every key, so that the sparse path computes dense attention."""

    name: ClassVar[str] = "everything"

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """All tiles for blocks of 16 queries."""
        return self._index(q, k, 16)

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """All tiles for each query."""
        return self._index(q, k, 1)

    @staticmethod
    def _index(q: Tensor, k: Tensor, block_q: int) -> BlockIndex:
        Lq, Lk = q.shape[2], k.shape[2]
        _, Nq = BlockIndex.query_blocks(Lq, Lk, block_q)
        keep = torch.ones(1, 1, Nq, -(-Lk // 16), dtype=torch.bool, device=q.device)
        return BlockIndex.from_blocks(keep, (block_q, 16))


def outputs(model: PreTrainedModel) -> Tensor:
    """First output of a prompt of 48 random tokens and two decode steps: [1, 50, ...]."""
    embeddings = model.get_input_embeddings()
    vocabulary = int(embeddings.num_embeddings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, _PROMPT + _STEPS), generator=generator)
    ids = ids.to(embeddings.weight.device)  # type: ignore[arg-type]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            result = model(input_ids=ids[:, :_PROMPT], use_cache=True)
            parts, cache = [result[0]], result.past_key_values
            for step in range(_PROMPT, _PROMPT + _STEPS):
                result = model(
                    input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True
                )
                parts.append(result[0])
                cache = result.past_key_values
    finally:
        model.train(training)
    return torch.cat(parts, dim=1)


def compare(reference: Tensor, got: Tensor) -> None:
    """Raises RuntimeError if the outputs differ by more than the tolerance of their dtype."""
    tolerance = _TOLERANCE.get(reference.dtype, 1e-4)
    largest = float(reference.float().abs().max())
    difference = (reference.float() - got.float()).abs()
    worst = float(difference.max())
    # Written so that NaN fails.
    if not worst <= tolerance * largest:
        position = int(difference.flatten(2).amax(-1)[0].argmax())
        raise RuntimeError(
            f"verify: expected outputs within {tolerance:g} of the largest, {largest:.4g}, got a "
            f"difference of {worst:.4g} at position {position} of {_PROMPT} prompt tokens and "
            f"{_STEPS} decode steps; the model's attention is not plain causal softmax. It was "
            "left unpatched"
        )
