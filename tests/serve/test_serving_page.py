"""The examples of docs/serving.md do what they say, against a server of the demo model."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from helpers.serving import demo_pair, serving

from quasar_core.serve.fields import IDLE, LABELS

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- run: (\w+) -->\n```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with serving(demo_pair()) as running:
        yield running


@pytest.mark.parametrize(("language", "code"), EXAMPLES, ids=[str(number) for number in range(len(EXAMPLES))])
def test_examples_run(server: Any, language: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ADDRESS in code
    code = code.replace(ADDRESS, server.url)
    if language == "curl":
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        output = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout
        assert output.endswith("data: [DONE]\n\n")
    else:
        pytest.importorskip("openai")
        exec(compile(code, "docs/serving.md", "exec"), {})
        assert capsys.readouterr().out.strip()


def test_the_page_names_every_field_that_is_read() -> None:
    source = "".join(path.read_text() for path in (Path(__file__).parents[2] / "quasar_core" / "serve").glob("*.py"))
    read = set(re.findall(r'fields\.\w+\("(\w+)"', source)) - {"role", "content", "tool_calls"}
    read -= {"return_token_strs", "add_special_tokens", "model", "prompt", "tokens"}
    assert read <= set(re.findall(r"`(\w+)`", PAGE))
    assert set(re.findall(r"`(\w+)`", PAGE)) >= LABELS
    assert not set(IDLE) & read
