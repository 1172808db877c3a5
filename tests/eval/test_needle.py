"""The needle samples: a pure function of their arguments, with the length and depth asked for."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from lowcontext.eval import NeedleSample, NeedleTask, make_sample
from lowcontext.eval.haystack import _english_words, haystack_words, insertion_point
from lowcontext.eval.words import NOISE, filler_words, key_words, plain_words, template_words

ROOM = 16
KNOWN = [("jepuzun", "788636254"), ("gunurin", "767778278")]


@pytest.fixture(scope="module")
def bpe() -> Any:
    """A byte-level BPE tokenizer of 700 tokens, trained on a few of the haystack's words."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [" ".join(filler_words()[:300]), *NOISE], vocab_size=700, special_tokens=["<|end|>"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<|end|>", bos_token="<|end|>"
    )


@pytest.fixture(params=["words", "noise", "file"])
def haystack(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param != "file":
        return str(request.param)
    path = tmp_path / "book.txt"
    path.write_text("It was a cold day; the clocks struck thirteen. Nobody looked up! " * 9)
    return str(path)


def needle_offset(sample: NeedleSample) -> float:
    """Where the asked needle starts, as a share of the prompt's characters."""
    return sample.prompt.index(f"{sample.key} is {sample.expected}") / len(sample.prompt)


@pytest.mark.parametrize("task", ["single", "multikey"])
def test_the_same_arguments_give_the_same_sample(tokenizer: Any, task: str, haystack: str) -> None:
    kind = NeedleTask(task, haystack)
    first = make_sample(tokenizer, kind, length=600, depth=30, seed=4)
    assert make_sample(tokenizer, kind, length=600, depth=30.0, seed=4) == first
    for change in ({"seed": 5}, {"depth": 40}, {"length": 700}):
        other = make_sample(tokenizer, kind, **({"length": 600, "depth": 30, "seed": 4} | change))
        assert other.expected != first.expected


@pytest.mark.parametrize("length", [300, 1024, 3000])
@pytest.mark.parametrize("task", ["single", "multikey"])
def test_the_prompt_fills_the_asked_length_and_never_more(
    tokenizer: Any, bpe: Any, task: str, haystack: str, length: int
) -> None:
    for kind in (tokenizer, bpe):
        asked = length if kind is tokenizer else 2 * length
        sample = make_sample(kind, NeedleTask(task, haystack, ROOM), length=asked, depth=50, seed=1)
        assert sample.input_ids == kind(sample.prompt)["input_ids"]
        assert asked - max(2, 0.01 * asked) <= len(sample.input_ids) + ROOM <= asked


def test_words_fill_the_length_exactly_with_the_retrieval_tokenizer(tokenizer: Any) -> None:
    for length in (256, 1000, 4096):
        sample = make_sample(tokenizer, NeedleTask(), length=length, depth=10, seed=2)
        assert len(sample.input_ids) == length - ROOM


@pytest.mark.parametrize("task", ["single", "multikey"])
def test_the_needle_stands_at_the_asked_depth(tokenizer: Any, task: str, haystack: str) -> None:
    places = []
    for depth in (0, 25, 50, 75, 100):
        sample = make_sample(
            tokenizer, NeedleTask(task, haystack), length=2048, depth=depth, seed=3
        )
        places.append(needle_offset(sample))
        assert abs(places[-1] - (0.05 + 0.9 * depth / 100)) < 0.06
    assert places == sorted(places)


def test_multikey_has_four_needles_with_four_keys_and_four_values(tokenizer: Any) -> None:
    sample = make_sample(tokenizer, NeedleTask("multikey"), length=1024, depth=50, seed=0)
    words = sample.prompt.split()
    numbers = [word.strip(".") for word in words if word.strip(".").isdigit()]
    keys = [word for word in words if word in key_words()]
    assert len(numbers) == len(set(numbers)) == 4
    assert len(set(keys)) == 4
    assert sample.prompt.count(sample.expected) == 1


def test_the_prompt_ends_with_the_needles_own_words(tokenizer: Any) -> None:
    sample = make_sample(tokenizer, NeedleTask(), length=512, depth=50, seed=0)
    assert sample.prompt.endswith(f"he magic number of {sample.key} is")


def test_a_chat_template_wraps_the_question_and_leaves_the_answer_open(bpe: Any) -> None:
    bpe.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    try:
        sample = make_sample(bpe, NeedleTask(), length=1500, depth=50, seed=0)
    finally:
        bpe.chat_template = None
    assert sample.prompt.startswith("[user]Below lies")
    assert sample.prompt.endswith(f"[assistant]The magic number of {sample.key} is")
    assert 1485 <= len(sample.input_ids) + ROOM <= 1500


def test_a_length_without_room_for_the_frame_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"length: expected at least \d+ tokens .* got 60"):
        make_sample(tokenizer, NeedleTask(), length=60, depth=0, seed=0)


def test_a_length_of_just_the_frame_is_accepted(tokenizer: Any) -> None:
    with pytest.raises(ValueError) as error:
        make_sample(tokenizer, NeedleTask(), length=60, depth=0, seed=0)
    least = int(str(error.value).split("at least ")[1].split()[0])
    sample = make_sample(tokenizer, NeedleTask(), length=least, depth=0, seed=0)
    assert len(sample.input_ids) == least - ROOM


@pytest.mark.parametrize("depth", [-1, 100.5])
def test_a_depth_outside_the_haystack_is_refused(tokenizer: Any, depth: float) -> None:
    with pytest.raises(ValueError, match="depth: expected 0..100"):
        make_sample(tokenizer, NeedleTask(), length=512, depth=depth, seed=0)


def test_unknown_tasks_and_haystacks_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="task: expected one of single, multikey, several:COUNT, thread:COUNT, got 'qa'",
    ):
        NeedleTask("qa")
    with pytest.raises(
        ValueError, match="haystack: expected one of words, noise, wonderwords or a text"
    ):
        make_sample(tokenizer, NeedleTask(haystack="hay.txt"), length=512, depth=0, seed=0)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(ValueError, match="haystack: expected a text file with words"):
        make_sample(tokenizer, NeedleTask(haystack=str(empty)), length=512, depth=0, seed=0)


def test_a_text_of_endless_words_is_refused_not_cut_short(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("z" * 90)
    with pytest.raises(ValueError, match="expected a haystack of words under 5 tokens"):
        make_sample(tokenizer, NeedleTask(haystack=str(path)), length=512, depth=0, seed=0)


def test_a_needle_goes_to_the_end_of_a_sentence_where_there_is_one() -> None:
    words = ["a", "b", "c.", "d", "e", "f.", "g", "h"]
    assert [insertion_point(words, depth) for depth in (0, 15, 50, 70, 100)] == [0, 3, 6, 6, 8]
    assert insertion_point(["x"] * 100, 50) == 50


def test_word_lists_do_not_overlap() -> None:
    lists = [template_words(), key_words(), filler_words()]
    assert [len(words) for words in lists[1:]] == [256, 1500]
    assert sum(map(len, lists)) == len({word for words in lists for word in words})
    assert not set(plain_words()) & {*key_words(), *filler_words()}


def test_several_needles_are_all_asked_for_and_spread_from_the_asked_depth(tokenizer: Any) -> None:
    for depth in (0, 60):
        sample = make_sample(
            tokenizer, NeedleTask("several:3", answer_room=32), length=2048, depth=depth, seed=0
        )
        assert 2027 <= len(sample.input_ids) + 32 <= 2048
        keys = sample.key.split(", ")
        assert len(set(sample.answers)) == len(keys) == 3
        starts = [
            sample.prompt.index(f"number of {key} is {value}.") / len(sample.prompt)
            for key, value in zip(keys, sample.answers, strict=True)
        ]
        wanted = [0.05 + 0.9 * (depth + (100 - depth) * i / 3) / 100 for i in range(3)]
        assert all(abs(start - want) < 0.06 for start, want in zip(starts, wanted, strict=True))
        assert sample.prompt.endswith(f"{keys[0]}, {keys[1]} and {keys[2]} are")


def test_a_thread_is_followed_link_by_link_to_its_answer(tokenizer: Any) -> None:
    for seed in range(5):
        sample = make_sample(tokenizer, NeedleTask("thread:4"), length=1500, depth=25, seed=seed)
        links = dict(re.findall(r"trail from (\w+) leads to (\w+)\.", sample.prompt))
        assert len(links) == 8
        place = sample.key
        first = sample.prompt.index(f"from {place} leads") / len(sample.prompt)
        assert abs(first - 0.275) < 0.08
        for _ in range(4):
            place = links[place]
        assert [place] == sample.answers
        assert place not in links


@pytest.mark.parametrize("name", ["several", "several:0", "thread:x", "single:2", "thread:101"])
def test_a_count_is_needed_just_where_it_counts(name: str) -> None:
    with pytest.raises(ValueError, match="task: expected one of single, multikey, several:COUNT"):
        NeedleTask(name)


def test_single_and_multikey_samples_stay_as_they_were(tokenizer: Any) -> None:
    samples = [
        make_sample(tokenizer, NeedleTask(task), length=600, depth=30, seed=4)
        for task in ("single", "multikey")
    ]
    assert [(s.key, s.expected) for s in samples] == KNOWN


def test_wonderwords_are_english_words_in_an_order_of_the_seed(tokenizer: Any) -> None:
    pytest.importorskip("wonderwords", reason="an optional package, for this haystack only")
    first, second = (haystack_words("wonderwords", 50, random.Random(seed)) for seed in (0, 1))
    assert first == haystack_words("wonderwords", 50, random.Random(0)) != second
    task = NeedleTask(haystack="wonderwords")
    sample = make_sample(tokenizer, task, length=1024, depth=50, seed=0)
    assert sample.expected in sample.prompt
    assert 1024 - 16 - 10 <= len(sample.input_ids) <= 1024 - 16


def test_wonderwords_without_the_package_say_what_to_install(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    _english_words.cache_clear()
    with pytest.raises(RuntimeError, match="pip install wonderwords"):
        make_sample(tokenizer, NeedleTask(haystack="wonderwords"), length=512, depth=0, seed=0)
