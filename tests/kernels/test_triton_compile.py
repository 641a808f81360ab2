"""Every Triton kernel compiles for Ampere, Ada, Hopper and Blackwell, here too, where there is no GPU."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = (80, 86, 89, 90, 120)
PROGRAMS = 4  # of the packed kernel that share a multiprocessor; zeros beside scales may cost one


def why_not_compiled() -> str | None:
    """Triton's compiler for NVIDIA comes with its wheel for Linux, and not with every build."""
    found = find_spec("triton")
    if found is None or found.origin is None:
        return "Triton is not installed"
    assembler = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    return None if assembler.exists() else f"this Triton has no {assembler.name}"


@pytest.mark.skipif(why_not_compiled() is not None, reason=str(why_not_compiled()))
@pytest.mark.parametrize(
    ("target", "launches"),
    [(90, "some"), *(pytest.param(t, "all", marks=pytest.mark.slow) for t in (80, 86, 89, 90, 120))],
)
def test_kernels_compile(tmp_path: Path, target: int, launches: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "compile_triton.py"), str(target), launches]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    found = defaultdict(list)
    for line in run.stdout.splitlines():
        launch = json.loads(line)
        found[launch["kernel"]].append(launch)
    assert len(found) == 21, sorted(found)
    for launch in (*found["_dense_kernel"], *found["_w8a8_kernel"]) if target == 90 else ():
        assert launch["wgmma"], "the product is not on Hopper's tensor cores"
    for launch in (launch for launches in found.values() for launch in launches):
        assert launch["waits"] == launch["overlaps"], "a launch that may begin early waits, once"
    kinds = {
        (launch["is_tree"], launch["turns"], launch["merged"] > 0, launch["capped"])
        for launch in found["_attend_kernel"]
    }
    assert kinds >= {(False, False, False, False), (True, False, False, False), (False, True, True, False)}
    if launches == "all":
        assert kinds >= {(*kind, False) for kind in product((False, True), repeat=3)}
        assert kinds >= {(is_tree, False, False, True) for is_tree in (False, True)}
    for launch in found["_attend_kernel"]:
        assert launch["spilled"] == 0, "attention keeps its sums in registers, whatever it takes in"
    check_routed(found, launches, is_small=target in (86, 89, 120))
    for launch in found["_packed_kernel"]:
        assert not launch["wgmma"], "rows of eight are Ampere's instruction on every GPU"
        # Of 2 bits and more than eight rows, a program on sm_120 that may begin early keeps two numbers in memory.
        assert launch["spilled"] <= (8 if launch["bits"] == 2 and launch["is_wide"] else 0)
    for launch in (launch for launch in found["_packed_kernel"] if launch["stored"] == 1):
        # One tells all lanes who is last; codes stay in the registers that they were unpacked in.
        assert launch["shuffles"] <= 1 or launch["slots"] or launch["norms"]
    narrow = [launch for launch in found["_packed_kernel"] if not launch["is_wide"] and launch["stored"] == 1]
    assert {launch["bits"] for launch in narrow} >= {4}
    for launch in (launch for launch in narrow if launch["bits"] > 2):
        assert launch["programs"] >= PROGRAMS - launch["has_zeros"], "too few share a multiprocessor"


def check_routed(found: Mapping[str, list[dict[str, Any]]], launches: str, is_small: bool) -> None:
    """Products of chosen experts, at the sizes of Qwen3-30B-A3B, in all widths and for few tokens and many.

    A multiprocessor that `is_small` has 100 KB.
    """
    routed = [*found["_routed_kernel"], *found["_routed_packed_kernel"]]
    kinds = {(launch["bits"], launch["places"], launch["gated"]) for launch in routed}
    widths = product((16, 4, 8), (128, 512)) if launches == "all" else ((16, 128), (4, 512))
    assert kinds >= {(*width, gated) for width in widths for gated in (False, True)}
    for launch in (*routed, *found["_choose_kernel"]):
        assert launch["spilled"] == 0, "which experts run is found out in registers"
    for launch in routed:
        assert launch["programs"] >= 2 - (launch["bits"] == 16 and is_small), "one alone waits for its weights"
        assert launch["copied_by_16"], "an expert's address is known to be a multiple of 16"
        assert not launch["copied_by_4"]  # rows of few inputs may be copied by 8
