"""The script that measures a real model asks for arms, questions and options that there are."""

from argparse import Namespace
from pathlib import Path

import pytest

from quasar_core.bench.arms import parse_arms
from tools.measure_real import commands


@pytest.mark.parametrize("server", [None, "/bin/llama-server"])
def test_its_commands(server: str | None) -> None:
    options = Namespace(model=Path("m"), verifier=Path("v"), out=Path("o"), llama_server=server, gguf=None, quick=False)
    bench, show, report = commands(options, Path("o/m.json"))
    arms = parse_arms(bench[bench.index("--arms") + 1])
    assert any(arm.program == "llama.cpp" for arm in arms) == (server is not None)
    assert ("--llama-server" in bench) == (server is not None)
    assert bench[bench.index("--limit") + 1] == "78"
    assert show[:3] == ["bench", "show", "o/m.json"]
    assert report[-1] == "o/m.html"
