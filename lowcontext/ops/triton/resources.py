"""Ahead-of-time compilation of a launch, and what it needs of a multiprocessor. No GPU involved."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from lowcontext.ops.triton import attend
from lowcontext.ops.triton.launch import Launch

# Shared memory that one block may use, by compute capability (CUDA programming guide, table of
# technical specifications).
_KILOBYTES = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
SHARED_LIMIT = {capability: size * 1024 for capability, size in _KILOBYTES.items()}

# Suffixes of the opcode of a load, which is one of 4 bytes without them.
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    Args:
        registers: per thread.
        spilled: bytes of local memory per thread, where spilled registers live.
        shared: bytes of shared memory per block.
        ptx: the PTX text.
        warps: warps per block.
        serialized: whether the assembler makes each wgmma wait for the one before.
        in_flight: groups of copies to shared memory that the loops of matrix products leave in
            flight where they wait, in the loop with the fewest; None without such a loop.
        loads: instructions that read global memory, by the bytes that each thread gets.
        row_loads: those of `attend._load_rows`, by which all kernels read queries, keys, values and
            page bounds.
    """

    registers: int
    spilled: int
    shared: int
    ptx: str
    warps: int
    serialized: bool
    in_flight: int | None
    loads: Counter[int]
    row_loads: Counter[int]


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compiles the kernel of a launch as a call on that device would, and reads its resources.

    Args:
        launch: from `launch.plan`, tensors on any device ("meta" will do).
        capability: 80, 90, 100, ...

    Raises:
        RuntimeError: the report of cuobjdump is not in the known form.
    """
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source(launch, target), target, launch.options)
    usage = _usage(compiled.asm["cubin"])
    found = global_loads(_run("nvdisasm", compiled.asm["cubin"], "-c", "-g"))
    return Resources(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
        warps=launch.num_warps,
        serialized=_serialized(compiled.asm["ptx"], capability),
        in_flight=copies_in_flight(compiled.asm["ptx"]),
        loads=Counter(width for _, _, width in found),
        row_loads=Counter(width for *source, width in found if _reads_rows(*source)),
    )


def source(launch: Launch, target: GPUTarget) -> ASTSource:
    """The source with triton's own specialisation: a call finds the kernel in triton's cache."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = launch.args | launch.options
    bound, specialization, options = bind(**given)
    _, *found = kernel._pack_args(backend, given, bound, specialization, options)
    return ASTSource(kernel, *found)


def _usage(cubin: bytes) -> dict[str, int]:
    report = _run("cuobjdump", cubin, "-res-usage")
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    if set(usage) != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump: expected REG, STACK and LOCAL, got {report!r}")
    return usage


def _serialized(ptx: str, capability: int) -> bool:
    """Whether ptxas says so: C7510 and its neighbours, "wgmma instructions are serialized"."""
    if "wgmma.mma_async" not in ptx:
        return False
    report = _run(
        "ptxas", ptx.encode(), "-v", f"--gpu-name=sm_{capability}a", "--output-file=/dev/null"
    )
    return "serialized" in report


def copies_in_flight(ptx: str) -> int | None:
    """The least of cp.async.wait_group in innermost loops with matrix products; None without."""
    lines = ptx.splitlines()
    labels: dict[str, int] = {}
    loops = []
    for number, line in enumerate(lines):
        if label := re.match(r"(\$L__BB\w+):", line):
            labels[label[1]] = number
        elif (jump := re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+)", line)) and jump[1] in labels:
            loops.append((labels[jump[1]], number))
    waits = []
    for first, last in loops:
        body = "\n".join(lines[first:last])
        inner = any(first < a and b < last for a, b in loops)
        if not inner and re.search(r"wgmma.mma_async|mma.sync|tcgen05.mma", body):
            waits += [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", body)]
    return min(waits, default=None)


def global_loads(sass: str) -> list[tuple[str, int, int]]:
    """(file, line, bytes per thread) of each LDG and LDGSTS in the text of `nvdisasm -c -g`."""
    file, number, found = "", 0, []
    for line in sass.splitlines():
        if place := re.search(r'//## File "(.*)", line (\d+)', line):
            file, number = place[1], int(place[2])
        elif load := re.search(r"\bLDG(?:STS)?\.(\S+)", line):
            sizes = [_BYTES[part] for part in load[1].split(".") if part in _BYTES]
            found.append((file, number, max(sizes, default=4)))
    return found


def _reads_rows(file: str, line: int) -> bool:
    """Whether a line is one of `attend._load_rows`."""
    function = attend._load_rows
    first = function.starting_line_number
    return Path(file).name == "attend.py" and 0 <= line - first < len(function.raw_src)


def _run(tool: str, given: bytes, *options: str) -> str:
    """What one of triton's own tools writes about a file."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile() as file:
        file.write(given)
        file.flush()
        done = subprocess.run(
            [path, *options, file.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
    return done.stdout
