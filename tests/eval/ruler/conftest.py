"""Small files of questions in the two formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowcontext.eval.ruler import Sources


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("questions")
    contexts = [f"The river of land {i} is named Ruva{i}. It runs for {i} days." for i in range(9)]
    squad = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": context,
                        "qas": [
                            {
                                "question": f"Which river runs in land {i}?",
                                "answers": [{"text": f"Ruva{i}"}, {"text": f"Ruva{i}"}],
                            },
                            {"question": "Who knows?", "answers": []},
                        ],
                    }
                ]
            }
            for i, context in enumerate(contexts)
        ]
    }
    hotpot = [
        {
            "question": f"Where was the maker of boat {i} born?",
            "answer": f"Dalo{i}",
            "context": [
                [f"Boat {i}", [f"Boat {i} was made by Mira{i}.", " It is red."]],
                [f"Mira{i}", [f"Mira{i} was born in Dalo{i}."]],
            ],
        }
        for i in range(9)
    ]
    (folder / "squad.json").write_text(json.dumps(squad))
    (folder / "hotpot.json").write_text(json.dumps(hotpot))
    return Sources(squad=str(folder / "squad.json"), hotpot=str(folder / "hotpot.json"))


@pytest.fixture(scope="session")
def questions_file(sources: Sources) -> Path:
    return Path(str(sources.squad))
