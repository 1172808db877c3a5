"""Greedy answers with their times and their memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WARMUP_TOKENS = 256

Stats = Callable[[], Mapping[str, float]]


class TokenClock:
    """A logits processor that changes nothing and notes when each token's logits are there.

    A streamer would not do: transformers may hand tokens to it one step late.
    """

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[0, 0].item()  # waits for the device
        self.times.append(time.perf_counter())
        return scores


class PeakMemory:
    """Peak memory since the last ``reset``.

    The bytes that PyTorch allocated on the GPUs that hold weights, summed; without a GPU the
    resident memory of the process, which the kernel measures and resets (``/proc/self``): weights
    and the interpreter included.
    """

    def __init__(self, model: Any) -> None:
        self._gpus = {x.device for x in model.parameters() if x.device.type == "cuda"}
        self._usable = True

    def reset(self) -> None:
        """Starts over."""
        for gpu in self._gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        if self._gpus:
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._usable = False

    def mib(self) -> float | None:
        """The peak in MiB, None where nothing measures it."""
        if self._gpus:
            return sum(torch.cuda.max_memory_allocated(gpu) for gpu in self._gpus) / 2**20
        if not self._usable:
            return None
        status = Path("/proc/self/status").read_text()
        peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
        return int(peaks[0]) / 1024 if peaks else None


@dataclass(frozen=True)
class Answer:
    """What the model made of one prompt.

    Attributes:
        text: The decoded new tokens, without special ones.
        new_tokens: Their number, an end-of-sequence token included.
        ttft_s: From the call of ``generate`` until the logits of the first token are there.
        tpot_s: Mean time from one token's logits to the next one's; None with one token.
        peak_mib: See ``PeakMemory``.
        stats: What the caller's ``stats`` returned.
    """

    text: str
    new_tokens: int
    ttft_s: float
    tpot_s: float | None
    peak_mib: float | None
    stats: dict[str, float]


class Answerer:
    """A model that answers prompts one by one; a short untimed generation comes first.

    Args:
        model: A Hugging Face causal LM, patched or not.
        tokenizer: Its tokenizer.
        chunk: Prefill in chunks of so many tokens; None for one pass.
        stats: Called after every answer and after the warm-up.
    """

    def __init__(self, model: Any, tokenizer: Any, chunk: int | None, stats: Stats | None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.chunk, self.stats = chunk, stats
        self.memory = PeakMemory(model)
        self.warm = False

    def answer(self, ids: list[int], max_new_tokens: int) -> Answer:
        """Generates greedily from a prompt's tokens."""
        if not self.warm:
            self._generate(ids[:WARMUP_TOKENS], max_new_tokens=2)
            self._read_stats()
            self.warm = True
        self.memory.reset()
        tokens, times = self._generate(ids, max_new_tokens=max_new_tokens)
        steps = len(times) - 2
        return Answer(
            text=self.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            new_tokens=len(tokens),
            ttft_s=times[1] - times[0],
            tpot_s=(times[-1] - times[1]) / steps if steps else None,
            peak_mib=self.memory.mib(),
            stats=self._read_stats(),
        )

    def _generate(self, ids: list[int], *, max_new_tokens: int) -> tuple[list[int], list[float]]:
        """Returns the new tokens, and the times of the start and of each of them."""
        input_ids = torch.tensor([ids], device=self.model.device)
        eos = self.model.generation_config.eos_token_id
        options: dict[str, Any] = {
            "eos_token_id": self.tokenizer.eos_token_id if eos is None else eos
        }
        pad = self.tokenizer.pad_token_id
        options["pad_token_id"] = self.tokenizer.eos_token_id if pad is None else pad
        if self.chunk is not None:
            options["prefill_chunk_size"] = self.chunk
        clock = TokenClock()
        output = self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            logits_processor=[clock],
            **options,
        )
        return output[0, len(ids) :].tolist(), clock.times

    def _read_stats(self) -> dict[str, float]:
        return dict(self.stats()) if self.stats else {}


def check_counts(
    lengths: tuple[int, ...], samples: int, *, chunk: int | None, limit: int | None = None
) -> None:
    """Refuses lengths, samples, a prefill chunk and a limit that are not positive.

    Raises:
        ValueError: One of them is below 1, or there is no length.
    """
    if not lengths:
        raise ValueError("lengths: expected at least one value, got none")
    for name, value in (("lengths", min(lengths)), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    for name, most in (("chunk", chunk), ("limit", limit)):
        if most is not None and most < 1:
            raise ValueError(f"{name}: expected 1 or more, or None, got {most}")


def max_positions(model: Any) -> int | None:
    """Positions that the model was made for, None if its configuration does not say."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    limit: int | None = getattr(config or model.config, "max_position_embeddings", None)
    return limit


def check_model(model: Any, tokenizer: Any, longest: int) -> None:
    """Refuses what would fail or mislead later.

    Raises:
        ValueError: If ``longest`` exceeds the model's positions, or if the tokenizer has no
            end-of-sequence token.
    """
    limit = max_positions(model)
    if limit is not None and longest > limit:
        raise ValueError(
            f"lengths: expected at most {limit} (the model's max_position_embeddings), "
            f"got {longest}; drop it, or load the model with RoPE scaling that reaches it"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer: expected one with an end-of-sequence token, got none; "
            "set tokenizer.eos_token to the token that ends an answer"
        )
