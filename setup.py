"""Builds the native extension `lowcontext._C`; the metadata is in pyproject.toml.

`python setup.py build_ext --inplace` builds it in the source tree. Where there is no working
compiler, the install goes on without it: the package then has its PyTorch and Triton backends.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
# The stable ABI of torch 2.11: one binary serves that version and later ones.
TORCH_TARGET = "0x020b000000000000"


def native_build() -> dict[str, Any]:
    """The setup() arguments that build the extension; none where torch is missing."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        print(f"warning: building without the native extension: {error}", file=sys.stderr)
        return {}

    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    flags = ["-O3", "-std=c++17", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    flags += ["-fvisibility=hidden", "-fno-math-errno", "-g0", "-Wno-maybe-uninitialized"]
    extension = cpp_extension.CppExtension(
        "lowcontext._C",
        [str(source.relative_to(ROOT)) for source in sorted(sources)],
        extra_compile_args={"cxx": flags},
        py_limited_api=True,
        optional=True,
    )

    class BuildNative(cpp_extension.BuildExtension):
        """Builds the extension, or warns and leaves it out."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # a broken toolchain shows as almost any exception
                self.warn(f"building without the native extension: {error}")
                self.extensions = []

        def get_outputs(self) -> list[str]:
            return [path for path in super().get_outputs() if Path(path).exists()]

        def copy_extensions_to_source(self) -> None:
            self.extensions = [
                each
                for each in self.extensions
                if (Path(self.build_lib) / self.get_ext_filename(each.name)).exists()
            ]
            super().copy_extensions_to_source()

    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildNative}}


setup(**native_build())
