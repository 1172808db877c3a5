"""How a model rotates queries and keys, read from its modules and checked by running them."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowcontext.methods.base import Rotary
from lowcontext.ops.rotary import rotate_to

# Their frequencies change with the length of the sequence.
_DYNAMIC = ("dynamic", "longrope")


@dataclass(frozen=True, eq=False)
class RotarySource:
    """Where the frequencies of a layer are; read at each call, for they move with the model.

    Args:
        module: the model's rotary embedding.
        buffer: name of its frequencies.
        interleaved: pairs are neighbouring channels.
    """

    module: nn.Module
    buffer: str
    interleaved: bool

    def facts(self) -> Rotary:
        """The rotation as methods see it."""
        inv_freq = getattr(self.module, self.buffer)
        return Rotary(inv_freq.to(torch.float32), self.interleaved)


def rotary_source(model: PreTrainedModel, attention: nn.Module) -> RotarySource:
    """How `attention`, a module of `model`, rotates.

    The model's own embedding and its family's own rotation are run on a random vector, in the two
    known layouts of pairs: what fits neither is refused.

    Raises:
        NotImplementedError: no rotary embedding, frequencies that change with the length, or a
            rotation of another form.
    """
    name = type(model).__name__
    embeddings = [m for n, m in model.named_modules() if n.split(".")[-1] == "rotary_emb"]
    if not embeddings:
        raise _refusal(f"{name} has no module rotary_emb")
    embedding: Any = embeddings[0]
    layer_type = _layer_type(model.config, attention)
    kind = getattr(embedding, "rope_type", "default")
    buffer = "inv_freq"
    if isinstance(kind, dict):
        kind, buffer = kind.get(layer_type, "default"), f"{layer_type}_inv_freq"
    if kind in _DYNAMIC:
        raise _refusal(f"{name} has rope_type {kind!r}, whose frequencies change with the length")
    inv_freq = getattr(embedding, buffer, None)
    if inv_freq is None:
        raise _refusal(f"{type(embedding).__name__} has no {buffer}")
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        raise _refusal(f"{type(attention).__module__} has no apply_rotary_pos_emb")
    size = getattr(attention, "head_dim", None) or 2 * inv_freq.shape[0]
    expected = _rotated(embedding, rotate, layer_type, int(size), inv_freq.device)
    frequencies = inv_freq.to(torch.float32)
    for interleaved in (False, True):
        if expected is None or 2 * frequencies.shape[0] > size:
            break
        vector, position, result, scaling = expected
        ours = rotate_to(vector, 0, position, frequencies, interleaved=interleaved)
        ours[..., : 2 * frequencies.shape[0]] *= scaling
        if torch.allclose(ours, result, atol=1e-4):
            return RotarySource(embedding, buffer, interleaved)
    raise _refusal(f"{name} rotates in a form that is not known here")


def _rotated(
    embedding: Any, rotate: Any, layer_type: str | None, size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float] | None:
    """A random vector [1, 1, 1, size], a position, the vector there, and the scaling."""
    if device.type == "meta":
        return None
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(1, 1, 1, size, generator=generator).to(device)
    position = torch.tensor([[1000]], device=device)
    takes_type = "layer_type" in inspect.signature(embedding.forward).parameters
    arguments = {"layer_type": layer_type} if takes_type else {}
    try:
        cos, sin = embedding(vector, position, **arguments)
        result = rotate(vector, vector, cos, sin)[1]
    except (TypeError, ValueError, RuntimeError):
        return None
    name = f"{layer_type}_attention_scaling" if takes_type else "attention_scaling"
    return vector, position[..., None], result, float(getattr(embedding, name, 1.0))


def _layer_type(config: Any, attention: nn.Module) -> str | None:
    types = getattr(config, "layer_types", None)
    index = getattr(attention, "layer_idx", None)
    return types[index] if types and isinstance(index, int) and index < len(types) else None


def _refusal(reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"model: expected rotary embeddings of fixed frequencies, but {reason}; this method moves "
        'rotated keys to other positions, use its positions="original"'
    )
