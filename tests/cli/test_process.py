"""The command line as a process of its own: streams that are full or closed, and a variable that is no number."""

import os
import subprocess
import sys

import pytest

pytest_plugins = ["helpers.cli_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home")


def run_in_a_process(shell: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process whose streams `shell` redirects."""
    command = f'"$0" -m quasar_cli "$@" {shell}'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )


@pytest.mark.parametrize("arguments", [["models", "--json"], ["--help"]])
def test_an_output_that_is_full(arguments: list[str]) -> None:
    done = run_in_a_process("> /dev/full", *arguments)
    assert (done.returncode, done.stderr) == (1, "Error: The output cannot be written: No space left on device.\n")


def test_an_output_that_nobody_reads() -> None:
    done = run_in_a_process("| true; exit ${PIPESTATUS[0]}", "models", "--json")
    assert (done.returncode, done.stderr) in ((0, ""), (1, ""))  # written before or after the reader has gone


@pytest.mark.parametrize("stream", ["<&-", ">&-"])
def test_streams_that_are_closed(stream: str) -> None:
    done = run_in_a_process(stream, "generate", "--model", "demo", "--prompt", "-")
    assert (done.returncode, done.stderr) == (2, "Error: The prompt is empty.\n")


def test_a_variable_of_the_hubs_client_that_is_no_number() -> None:
    done = run_in_a_process("", "models", HF_HUB_DOWNLOAD_TIMEOUT="soon")
    sentence = "Error: HF_HUB_DOWNLOAD_TIMEOUT must be a whole number of seconds, not soon.\n"
    assert (done.returncode, done.stderr) == (2, sentence)
