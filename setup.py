"""Builds the native extension `lowcontext._C`; the metadata is in pyproject.toml.

`python setup.py build_ext --inplace` builds it in the source tree. Where there is no working compiler, the
install goes on without it: the package then has its PyTorch and Triton backends.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
TORCH_TARGET = (
    "0x020b000000000000"  # the stable ABI of torch 2.11: one binary serves it and later versions
)


def native_build() -> dict[str, object]:
    """Returns the setup() arguments that build the extension; none of them where torch is missing."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        print(f"warning: building without the native extension: {error}", file=sys.stderr)
        return {}

    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    cuda_sources = list(ROOT.glob("csrc/cuda/*.cu"))
    with_cuda = (
        bool(cuda_sources)
        and torch.version.cuda is not None
        and cpp_extension.CUDA_HOME is not None
    )
    if with_cuda:
        sources += [*cuda_sources, *ROOT.glob("csrc/cuda/*.cpp")]

    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    if with_cuda:
        defines.append("-DUSE_CUDA")
    cxx = [
        "-O3",
        "-std=c++17",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-Wall",
        "-Wno-maybe-uninitialized",
    ]
    extension_type = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    extension = extension_type(
        "lowcontext._C",
        [str(source.relative_to(ROOT)) for source in sorted(sources)],
        extra_compile_args={"cxx": cxx + defines, "nvcc": ["-O3", "-std=c++17", *defines]},
        py_limited_api=True,
        optional=True,
    )

    class BuildNative(cpp_extension.BuildExtension):
        """Builds the extension, or warns and leaves it out."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # a broken toolchain shows as almost any exception
                self.warn(f"building without the native extension: {error}")

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                self.warn(f"building without the native extension: {error}")
                self.extensions = []

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildNative.with_options(no_python_abi_suffix=False)},
    }


setup(**native_build())
