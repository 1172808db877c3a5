"""The samples of the RULER suite: pure, of the asked length, and solvable from their text alone."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowcontext.eval.ruler import TASKS, Sources, available_tasks, make_ruler_sample
from lowcontext.eval.words import NOISE, filler_words


@pytest.fixture(scope="module")
def bpe() -> Any:
    """A byte-level BPE tokenizer of 500 tokens with a chat template."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [" ".join(filler_words()[:300]), *NOISE], vocab_size=500, special_tokens=["<|end|>"]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|end|>")
    fast.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return fast


def solve(task: str, prompt: str) -> set[str]:
    """Answers a task by reading the text, with a program per family."""
    head, _, question = prompt.rpartition("Question:")
    if task.startswith("niah"):
        asked = re.findall(r"[\w-]+", question.split("Answer:")[0].split(" of ")[1])
        pairs = re.findall(r"magic (?:number|code) of (\S+) is (\S+)\.", head)
        return {value for key, value in pairs if key in asked}
    if task == "vt":
        text = head.split("Now the text.")[1]
        number = re.search(r"hold (\d+)\?", question).group(1)
        names: dict[str, str] = {}
        for name, what in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
            names[name] = names.get(what, what)
        return {name for name, value in names.items() if value == number}
    if task == "cwe":
        words = re.findall(r"\d+\. (\w+)", head.split("Now the list.")[1])
        return {word for word, _ in Counter(words).most_common(10)}
    if task == "fwe":
        words = head.split("most often.")[1].split()
        return {word for word, _ in Counter(w for w in words if w != "...").most_common(3)}
    if task == "qa_1":
        land = re.search(r"land (\d+)", question).group(1)
        return set(re.findall(rf"land {land} is named (\w+)\.", head))
    boat = re.search(r"boat (\d+)", question).group(1)
    maker = re.search(rf"Boat {boat} was made by (\w+)", head)
    return set(re.findall(rf"{maker.group(1)} was born in (\w+)\.", head))


@pytest.mark.parametrize("length", [3000, 6000])
@pytest.mark.parametrize("task", TASKS)
def test_the_answers_follow_from_the_text_alone(
    tokenizer: Any, sources: Sources, task: str, length: int
) -> None:
    for seed in (0, 1):
        sample = make_ruler_sample(tokenizer, task, length=length, seed=seed, sources=sources)
        assert solve(task, sample.prompt) == set(sample.answers)
        assert len(sample.answers) == {
            "niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3
        }.get(task, 1)  # fmt: skip


@pytest.mark.parametrize("length", [2000, 6000])
@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_room_fill_the_length_and_never_more(
    tokenizer: Any, bpe: Any, sources: Sources, task: str, length: int
) -> None:
    for kind in (tokenizer, bpe):
        asked = length if kind is tokenizer else 2 * length
        sample = make_ruler_sample(kind, task, length=asked, seed=3, sources=sources)
        total = len(sample.input_ids) + TASKS[task].answer_room
        assert 0.99 * asked <= total <= asked
        special = kind is tokenizer
        assert sample.input_ids == kind(sample.prompt, add_special_tokens=special)["input_ids"]


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_a_function_of_its_arguments(
    tokenizer: Any, sources: Sources, task: str
) -> None:
    first = make_ruler_sample(tokenizer, task, length=2500, seed=4, sources=sources)
    assert make_ruler_sample(tokenizer, task, length=2500, seed=4, sources=sources) == first
    other = make_ruler_sample(tokenizer, task, length=2500, seed=5, sources=sources)
    assert other.answers != first.answers


def test_the_first_seeds_ask_different_questions(tokenizer: Any, sources: Sources) -> None:
    samples = [
        make_ruler_sample(tokenizer, "qa_1", length=800, seed=seed, sources=sources)
        for seed in range(9)
    ]
    assert len({sample.answers[0] for sample in samples}) == 9


def test_needles_stand_in_the_text_of_the_user(tokenizer: Any, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("It was a cold day; the clocks struck thirteen. " * 9)
    given = Sources(haystack=str(book))
    sample = make_ruler_sample(tokenizer, "niah_single_2", length=3000, seed=0, sources=given)
    assert "clocks struck" in sample.prompt
    noise = make_ruler_sample(tokenizer, "niah_single_1", length=3000, seed=0, sources=given)
    assert "clocks struck" not in noise.prompt
    assert NOISE[0] in noise.prompt


def test_a_haystack_of_needles_has_no_key_twice(tokenizer: Any) -> None:
    for task in ("niah_multikey_2", "niah_multikey_3"):
        prompt = make_ruler_sample(tokenizer, task, length=8192, seed=0).prompt
        keys = re.findall(r"Note that the magic \w+ of (\S+) is", prompt)
        assert len(keys) > 30
        assert len(keys) == len(set(keys))


def test_counts_of_frequent_words_fall_with_the_square_of_the_rank(tokenizer: Any) -> None:
    prompt = make_ruler_sample(tokenizer, "fwe", length=8192, seed=0).prompt
    words = prompt.split("most often.")[1].split("Question:")[0].split()
    counts = [count for _, count in Counter(words).most_common(4)]
    for rank, count in enumerate(counts, start=1):
        assert count == int(len(words) * 6 / 3.141592653589793**2 / rank**2)


def test_common_words_come_thirty_times_and_others_three(tokenizer: Any) -> None:
    prompt = make_ruler_sample(tokenizer, "cwe", length=8192, seed=0).prompt
    words = re.findall(r"\d+\. (\w+)", prompt.split("Now the list.")[1])
    counts = Counter(Counter(words).values())
    assert counts[30] == 10
    assert counts[3] > 50
    assert set(counts) <= {30, 3, 1}
    assert counts[1] <= 2


def test_tasks_without_their_file_are_left_out_or_refused(sources: Sources, tokenizer: Any) -> None:
    assert available_tasks(sources) == tuple(TASKS)
    assert len(TASKS) == 13
    assert available_tasks(replace(sources, hotpot=None)) == tuple(TASKS)[:-1]
    with pytest.raises(ValueError, match="expected --squad FILE with task 'qa_1', got none"):
        make_ruler_sample(tokenizer, "qa_1", length=2000, seed=0)
    with pytest.raises(ValueError, match="tasks: expected one of niah_single_1, .* got 'niah'"):
        make_ruler_sample(tokenizer, "niah", length=2000, seed=0)


def test_a_file_of_another_format_is_refused(sources: Sources, tokenizer: Any) -> None:
    for wrong in (replace(sources, hotpot=sources.squad), replace(sources, hotpot="nowhere.json")):
        with pytest.raises(
            ValueError, match="hotpot: expected a JSON file in the format of hotpot"
        ):
            make_ruler_sample(tokenizer, "qa_2", length=2000, seed=0, sources=wrong)


def test_a_length_without_room_for_the_frame_is_refused(tokenizer: Any) -> None:
    for task in available_tasks(Sources()):
        with pytest.raises(ValueError, match=rf"expected at least \d+ tokens for task '{task}'"):
            make_ruler_sample(tokenizer, task, length=150, seed=0)
