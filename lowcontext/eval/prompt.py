"""Prompts of an asked length: the frame of a chat, and a body filled up to the last token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_SHORTFALL = 0.01  # of the asked length

Rendered = tuple[str, list[int]]


@dataclass(frozen=True)
class Room:
    """The tokens there are for one sample.

    Attributes:
        length: Prompt and answer together.
        answer: Left free for the answer.
        task: Name of the task, for messages.
        source: Where the body's words come from, for messages.
    """

    length: int
    answer: int
    task: str
    source: str

    @property
    def prompt(self) -> int:
        """Most tokens of the prompt."""
        return self.length - self.answer


def tokenize(tokenizer: Any, text: str, prefix: str) -> Rendered:
    """Puts a question into the tokenizer's chat template, if it has one, and tokenizes it.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: What the user says.
        prefix: How the answer begins; stands after the template's opening of the answer.

    Returns:
        The whole prompt and its tokens, with the special tokens that belong there.
    """
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = f"{chat}{prefix}"
        return prompt, list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    prompt = f"{text} {prefix}"
    return prompt, list(tokenizer(prompt)["input_ids"])


def fit_frame(render: Callable[[int], Rendered], room: Room) -> Rendered:
    """Returns the prompt without a body.

    Raises:
        ValueError: If it is too long.
    """
    frame = render(0)
    least = len(frame[1]) + room.answer
    if least > room.length:
        raise ValueError(
            f"length: expected at least {least} tokens for task {room.task!r} "
            f"with this tokenizer, got {room.length}"
        )
    return frame


def fill(
    render: Callable[[int], Rendered], room: Room, *, coarse: bool = False
) -> tuple[int, str, list[int]]:
    """Finds the largest body whose prompt fits.

    Args:
        render: The prompt with a body of so many words; a word is one token or more.
        room: What has to fit.
        coarse: Whether more than 1% may be left, to be filled with something else.

    Returns:
        The number of words, the prompt and its tokens; they fill ``room.prompt`` to within 1% of
        the length, never over it.

    Raises:
        ValueError: If the prompt without a body is too long, or one word is over 1% of the length.
    """
    best = fit_frame(render, room)
    fits, frame = 0, len(best[1])
    too_many = room.prompt - frame + 1
    guess = too_many - 1
    while too_many - fits > 1:
        candidate = render(guess)
        used = len(candidate[1])
        if used > room.prompt:
            too_many = guess
        else:
            fits, best = guess, candidate
        if used == room.prompt:
            break
        per_word = max(1.0, (used - frame) / guess)
        step = fits + int((room.prompt - len(best[1])) / per_word)
        guess = min(max(step, fits + 1), too_many - 1)
    allowed = MAX_SHORTFALL * room.length
    if not coarse and len(best[1]) < room.prompt - allowed:
        raise ValueError(
            f"length: expected a haystack of words under {allowed:.0f} tokens, "
            f"got one longer in {room.source!r}; ask for a longer prompt or another text"
        )
    return fits, *best
