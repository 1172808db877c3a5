"""The retrieval checkpoint, written and loaded once, and the figures that a test saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowcontext.eval import write_retrieval_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_retrieval_checkpoint(tmp_path_factory.mktemp("retrieval"))


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Figures by the names of the files they are saved to."""
    from matplotlib.figure import Figure

    figures: dict[str, Any] = {}
    save = Figure.savefig

    def keep(figure: Any, target: Path, *args: Any, **options: Any) -> None:
        figures[Path(target).name] = figure
        save(figure, target, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures
