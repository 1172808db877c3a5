"""The documents tell the truth: their code runs, their commands exist."""

from __future__ import annotations

import doctest
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_method_of_add_a_method_passes_the_contract(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "add-a-method.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    name = re.search(r"lowcontext/methods/(\w+)\.py", code).group(1)
    shutil.copytree(
        ROOT / "lowcontext", tmp_path / "lowcontext", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "tests" / "methods", tmp_path / "tests" / "methods")
    shutil.copy(ROOT / "tests" / "budgets.py", tmp_path / "tests" / "methods")
    (tmp_path / "lowcontext" / "methods" / f"{name}.py").write_text(code)
    (tmp_path / "tests" / "methods" / f"test_{name}.py").write_text("")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", name],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[3-9]\d passed", done.stdout)


@pytest.mark.parametrize(
    "module",
    [
        "lowcontext.index",
        "lowcontext.ops",
        "lowcontext.ops.block_scores",
        "lowcontext.ops.vertical_slash",
        "lowcontext.methods",
        "lowcontext.integrations",
        "lowcontext.integrations.calibrate",
    ],
)
def test_docstring_examples_run(module: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(module))
    assert failed == 0


@pytest.mark.parametrize("name", ["sparse_attention", "attention", "BlockIndex", "get_method"])
def test_public_docstrings_have_a_runnable_example(name: str) -> None:
    import lowcontext

    assert doctest.DocTestFinder().find(getattr(lowcontext, name))[0].examples


def test_the_commands_of_the_readme_are_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_between_documents_lead_somewhere() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
