"""The Triton kernels compile for every architecture without spills and within shared memory.

The handful of configurations is `bench.kernels_report.REPRESENTATIVE`; all of them, in minutes:

    python -m bench.kernels_report --all
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator

import pytest
from at_once import AtOnce, at_once, wanted

pytest.importorskip("triton", reason="the Triton backend is optional")

KERNELS = {
    *("prefill", "decode", "combine", "token_scores", "lse", "soft_vote", "quantize"),
    *("window_lse", "window_sums", "slash", "block_means", "antidiagonal"),
    *("topk_row", "digits", "topk_counts", "topk_ids"),
    *("mass_row", "mass_tops", "mass_digits", "mass_ties", "mass_keep"),
    *("line_counts", "line_lists", "line_tiles", "line_columns"),
    *("stale", "tile_lists", "rows", "tree", "stage", "kept", "tile_votes", "tile_list"),
    *("rotate", "list_keys", "gather_moved"),
}
# Kernels that read queries, keys or values.
READERS = {"prefill", "decode", "token_scores", "quantize", "window_lse", "window_sums"}
READERS |= {"stale", "block_means", "antidiagonal", "rows", "tree", "stage"}
READERS |= {"rotate", "gather_moved"}


@pytest.fixture(scope="module")
def reports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AtOnce]:
    """The report of each architecture."""
    command = ["bench.kernels_report", "--json", "--arch"]
    commands = {arch: [*command, str(arch)] for arch in wanted(request, "arch")}
    with at_once(commands, tmp_path_factory.mktemp("reports")) as started:
        yield started


@pytest.mark.skipif(
    platform.system() != "Linux", reason="triton ships its assembler for Linux alone"
)
@pytest.mark.parametrize(
    ("arch", "tensor_cores"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")]
)
def test_kernels_compile_without_spills_and_within_shared_memory(
    arch: int, tensor_cores: str, reports: AtOnce
) -> None:
    done = reports[arch]
    assert done.stdout, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"] for line in lines} == KERNELS
    for line in lines:
        assert line["spilled"] == 0, line
        assert line["shared"] <= line["limit"], line
        assert "serialized" not in line["products"], line
        if line["kernel"] == "prefill" and "bfloat16" in line["config"]:
            assert line["products"] == tensor_cores, line
        if line["kernel"] in ("prefill", "decode") and "bfloat16" in line["config"]:
            assert line["ahead"] >= 2, f"expected the copies of a tile ahead, got {line}"
        # 2 bytes at a time is what is left where the alignment of a row gets lost.
        wide = re.fullmatch(r"\d+x16", line["rows"]) is not None
        assert wide == (line["kernel"] in READERS), f"expected loads of 16 bytes, got {line}"
        if line["kernel"] == "token_scores" and "float32" not in line["config"]:
            assert line["products"] == "mma.sync", line
        if "float32" in line["config"]:
            assert line["products"] == "", f"expected IEEE products, got {line}"
    assert done.returncode == 0, done.stderr


PTX = """
$L__BB0_1:
	cp.async.wait_group 	0;
	@%p1 bra 	$L__BB0_4;
$L__BB0_2:
	cp.async.wait_group 	1;
	@%p2 bra 	$L__BB0_2;
$L__BB0_3:
	cp.async.wait_group 	2;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 0;
	@%p3 bra 	$L__BB0_3;
	wgmma.wait_group.sync.aligned 0;
	@%p4 bra 	$L__BB0_1;
$L__BB0_4:
"""


def test_copies_ahead_are_those_of_the_innermost_loops_with_products() -> None:
    from lowcontext.ops.triton.resources import copies_in_flight

    assert copies_in_flight(PTX) == 2
    assert copies_in_flight(PTX.replace("wait_group 	2", "wait_group 	0")) == 0
    assert copies_in_flight(PTX.replace("mma_async", "fence")) is None


SASS = """
	//## File "/tmp/attend.py", line 43
        /*1430*/              @!P2 LDG.E.128 R32, desc[UR10][R18.64] ;
        /*21a0*/                   LDGSTS.E.BYPASS.LTC128B.128 [R165], desc[UR10][R34.64], P6 ;
        /*2390*/                   LDGDEPBAR ;
	//## File "/tmp/attend.py", line 103
        /*1410*/              @!P1 LDG.E R88, desc[UR10][R14.64] ;
        /*1420*/                   LDG.E.U16.CONSTANT R8, desc[UR10][R14.64] ;
        /*1440*/                   LDGSTS.E.64 [R165+0x80], desc[UR10][R34.64] ;
        /*3870*/                   LDS.128 R76, [R143+UR15] ;
"""


def test_loads_are_told_by_their_width_and_their_line() -> None:
    from lowcontext.ops.triton.resources import global_loads

    rows, lists = ("/tmp/attend.py", 43), ("/tmp/attend.py", 103)
    widths = [(*rows, 16), (*rows, 16), (*lists, 4), (*lists, 2), (*lists, 8)]
    assert global_loads(SASS) == widths
