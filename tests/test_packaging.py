"""A machine without a compiler, a tree without an installation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, without any built extension."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("lowcontext", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def run(tree: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_broken_compiler_leaves_a_working_package_that_says_so(tree: Path) -> None:
    build = run(tree, "setup.py", "build_ext", "--inplace", CXX="/bin/false", CC="/bin/false")
    assert build.returncode == 0, build.stderr
    assert "building without the native extension" in build.stderr + build.stdout
    info = run(tree, "-m", "lowcontext", "info")
    assert info.returncode == 0, info.stderr
    assert "the extension is not built" in " ".join(info.stdout.split())
    code = (
        "import torch, lowcontext\n"
        "q = torch.randn(1, 4, 70, 64)\n"
        "out = lowcontext.attention(q, q, q)\n"
        "print(lowcontext.__file__, bool(out.isfinite().all()))\n"
    )
    ran = run(tree, "-W", "always", "-c", code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(tree / "lowcontext" / "__init__.py"), "True"]
    assert "slow PyTorch reference" in ran.stderr


def test_the_version_is_the_same_everywhere() -> None:
    import lowcontext

    shown = run(ROOT, "setup.py", "--version").stdout.strip().splitlines()[-1]
    assert shown == lowcontext.__version__
