"""The rules of docs/design.md that a program can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lowcontext"
FILES = sorted(PACKAGE.rglob("*.py"))

# Layers, lowest first; a module imports lowcontext modules of its own layer or below.
LAYERS = {"_fingerprint": 0, "_version": 0, "index": 0, "ops": 1, "methods": 2, "integrations": 3}
# The package root re-exports; `eval` stands beside the stack and knows none of it.
EVAL = "eval"
CLI = (
    "__main__",
    "cli",
    "_cli_console",
    "_cli_eval",
    "_cli_lm_eval",
    "_cli_measures",
    "_cli_parse",
    "_cli_sweep",
)


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path, everywhere: bool = True) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def lowcontext_layers(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(path) if name.startswith("lowcontext.")}
    return {
        name for name in names if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    own = layer(path)
    if own == "__init__":
        return
    if own == EVAL:
        assert lowcontext_layers(path) <= {EVAL, "_fingerprint"}
        return
    if own in CLI:
        return
    for other in lowcontext_layers(path):
        assert other in LAYERS, f"{path} imports {other}"
        assert LAYERS[other] <= LAYERS[own], f"{path} imports {other}, a layer above it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_transformers_is_imported_at_module_level_only_by_integrations(path: Path) -> None:
    if layer(path) != "integrations":
        top = [name for name in imports(path, everywhere=False) if name.startswith("transformers")]
        assert not top
        if layer(path) not in (EVAL, *CLI):
            assert not [name for name in imports(path) if name.startswith("transformers")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_global_no_assert_no_print_no_bare_except(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno} global"
        assert not isinstance(node, ast.Assert), f"{path}:{node.lineno} assert"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{path} except"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path}:{node.lineno} print"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_tensor_is_made_when_a_module_is_imported(path: Path) -> None:
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                base = node.func.value
                called = isinstance(base, ast.Name) and base.id == "torch"
                assert not called, f"{path}:{node.lineno} calls torch.{node.func.attr} at import"


def test_no_file_is_too_long() -> None:
    sources = [*FILES, *(ROOT / "csrc").rglob("*"), *(ROOT / "bench").rglob("*.py")]
    for path in sources:
        if path.suffix not in (".py", ".cpp", ".h", ".cu", ".cuh", ".inl"):
            continue
        kernels = "csrc" in path.parts or "triton" in path.parts
        lines = len(path.read_text().splitlines())
        assert lines <= (600 if kernels else 400), f"{path}: {lines} lines"


def test_common_headers_are_free_of_torch() -> None:
    for path in (ROOT / "csrc" / "common").rglob("*"):
        assert "torch/" not in path.read_text(), path
        assert "ATen" not in path.read_text(), path


def test_every_native_op_that_returns_tensors_has_a_fake() -> None:
    schemas = (ROOT / "csrc" / "registration.cpp").read_text().replace('"\n      "', "")
    ops = re.findall(r'"(\w+)\([^"]*-> \(?Tensor', schemas)
    assert {"attention", "topk", "hip_stage"} <= set(ops)
    native = "".join(path.read_text() for path in (PACKAGE / "ops").rglob("native.py"))
    for op in ops:
        assert f'"{op}": ' in native or f'"lowcontext::{op}"' in native, op


def test_import_needs_neither_transformers_nor_triton_nor_a_gpu() -> None:
    code = (
        "import sys\n"
        "for name in ('transformers', 'triton', 'matplotlib', 'typer'): sys.modules[name] = None\n"
        "import torch\n"
        "torch.cuda.is_available = None\n"
        "import lowcontext\n"
        "q = torch.randn(1, 2, 8, 16)\n"
        "lowcontext.attention(q, q, q, backend='reference')\n"
        "print(sorted(lowcontext.available_methods())[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "block_topk"


@pytest.mark.parametrize(
    "name", ["BlockIndex", "patch_model", "sparse_attention", "measure_density"]
)
def test_public_names_exist(name: str) -> None:
    import lowcontext

    assert name in lowcontext.__all__
    assert getattr(lowcontext, name).__doc__
