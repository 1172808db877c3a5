"""Questions with their documents, from local files in the formats of SQuAD and of HotpotQA."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        question: Its text.
        answers: Accepted answers; one is enough.
        documents: Texts that answer it.
    """

    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Collection:
    """The questions of a file and all its documents."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]

    def others(self, question: Question) -> list[str]:
        """Returns the documents that are not the question's own."""
        own = set(question.documents)
        return [document for document in self.documents if document not in own]


def read_collection(path: str, form: str) -> Collection:
    """Reads a file of questions.

    Args:
        path: A JSON file.
        form: ``"squad"`` (``data / paragraphs / qas``, questions without an answer left out) or
            ``"hotpot"`` (a list of ``question, answer, context: [[title, sentences]]``).

    Returns:
        Its questions and documents.

    Raises:
        ValueError: If the file cannot be read as that, or has fewer than two documents.
    """
    return _read(path, form, Path(path).stat().st_mtime_ns if Path(path).is_file() else 0)


@lru_cache(maxsize=2)
def _read(path: str, form: str, _changed: int) -> Collection:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        questions = _squad(content) if form == "squad" else _hotpot(content)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{form}: expected a JSON file in the format of {form}, got {path!r} ({error!r})"
        ) from error
    documents = dict.fromkeys(text for question in questions for text in question.documents)
    if len(documents) < 2:
        raise ValueError(
            f"{form}: expected two documents or more, got {len(documents)} in {path!r}"
        )
    return Collection(tuple(questions), tuple(documents))


def _squad(content: Any) -> list[Question]:
    return [
        Question(
            item["question"].strip(),
            tuple(dict.fromkeys(answer["text"] for answer in item["answers"])),
            (paragraph["context"],),
        )
        for article in content["data"]
        for paragraph in article["paragraphs"]
        for item in paragraph["qas"]
        if item["answers"]
    ]


def _hotpot(content: Any) -> list[Question]:
    return [
        Question(
            item["question"].strip(),
            (item["answer"],),
            tuple(f"{title}. {''.join(sentences).strip()}" for title, sentences in item["context"]),
        )
        for item in content
    ]
