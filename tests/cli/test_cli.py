"""The command line: starting, exit codes, one clear sentence for each bad input, progress.

`run(arguments)` is the entry point without the exit.
"""

import os
import re
import resource
import subprocess
import sys

import pytest

import quasar_core
from quasar_cli.main import run
from quasar_core import openmp, store
from quasar_core.errors import QuasarError, UsageError
from quasar_core.records import no_progress

pytest_plugins = ["helpers.cli_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home")

# Starting


SLOW_TO_IMPORT = {"torch", "transformers", "huggingface_hub", "numpy", "matplotlib"}


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["models"]], ids=" ".join)
def test_what_computes_nothing_loads_no_torch(arguments: list[str]) -> None:
    program = f"import sys; from quasar_cli.main import run; code = run({arguments}); "
    program += f"print(code, *sorted({SLOW_TO_IMPORT} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "0"


NOT_FOR_AN_ANSWER = ("torch._dynamo", "transformers.modeling_utils", "quasar_core.quantize", "quasar_core.bench.steps")


@pytest.mark.usefixtures("compiled_at_home")
def test_an_answer_waits_for_no_library_that_it_does_not_need() -> None:
    asked = ["generate", "--model", "demo", "--verify", "full", "--max-new-tokens", "2", "hi"]
    program = f"import sys; from quasar_cli.main import run; code = run({asked}); "
    program += f"print(code, *(m for m in sys.modules if m.startswith({NOT_FOR_AN_ANSWER})), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "0"


@pytest.mark.parametrize(
    ("chosen", "held"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["nothing", "a count", "a policy"],
)
def test_threads_that_wait_soon_sleep_unless_somebody_chose_otherwise(chosen: dict[str, str], held: str) -> None:
    program = "import os, sys; from quasar_cli.main import run; run(['models']); "
    program += "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    others = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment = others | chosen
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{held} False"


def test_other_programs_wait_as_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # put back behind the test
    openmp.sleep_soon()
    assert openmp.environment_of_others()["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setattr(openmp, "_chosen", set())
    openmp.sleep_soon()
    assert os.environ["GOMP_SPINCOUNT"] == "3000"
    assert openmp.environment_of_others() == {n: v for n, v in os.environ.items() if n != "GOMP_SPINCOUNT"}


@pytest.mark.machine
def test_help_answers_in_half_a_second() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "quasar_cli", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(seconds() for _ in range(2)) < 0.5


@pytest.mark.parametrize(
    "command", ["quantize", "generate", "chat", "bench", "models", "models use", "models remove", "inspect", "doctor"]
)
def test_every_command_has_help_and_takes_verbose_and_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--verbose" in shown
    assert "--json" in shown


COMMANDS = (
    "quantize",
    "generate",
    "chat",
    "bench",
    "bench show",
    "bench compare",
    "bench plot",
    "bench simulate",
    "bench steps",
    "models",
    "models add",
    "models use",
    "models push",
    "models export",
    "models remove",
    "inspect",
    "doctor",
)


def _is_one_name(line: str) -> bool:
    """An option with its choices, or a list of names, neither of which is broken."""
    return len(line.split()) <= 2 and len(line) < 60


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_an_example_and_is_whole_at_60_and_40_columns(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(columns: str) -> set[str]:
        monkeypatch.setenv("COLUMNS", columns)
        assert run([*command.split(), "-h"]) == 0
        shown = capsys.readouterr().out
        page, _, lines = shown.partition("Examples:")
        assert lines
        assert all(len(line) <= int(columns) or _is_one_name(line) for line in page.splitlines())
        assert max(map(len, lines.splitlines())) <= max(int(columns), 60)  # which are typed as they stand
        assert "…" not in shown
        return set(shown.split())

    assert words("60") == words("80") == words("40")


@pytest.mark.parametrize("command", [*COMMANDS, "serve", "deploy", "bench report"])
def test_help_names_no_types_of_python(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), "-h"]) == 0
    named = re.findall(r"<[^>]*>", capsys.readouterr().out)
    assert all("|" in choices for choices in named), named


def test_choices_are_shown_as_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--help"]) == 0
    shown = capsys.readouterr().out
    for choices in ("full|quantized|exact", "none|ngram", "auto|float32|bfloat16|float16"):
        assert choices in shown


def test_nothing_asked_for_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert capsys.readouterr().out.startswith("Usage: quasar")


def test_completion_knows_commands_and_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    def completed(words: str) -> str:
        environment = {**os.environ, "_QUASAR_COMPLETE": "complete_bash", "COMP_WORDS": words}
        environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
        program = "from quasar_cli.main import main; main()"
        return subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
        ).stdout

    assert "generate" in completed("quasar gen").split()
    assert "--verify" in completed("quasar generate --ver").split()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"quasar {quasar_core.__version__}")


# Errors


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (QuasarError("It failed."), 1, "Error: It failed.\n"),
        (UsageError("--bits is [wrong]."), 2, "Error: --bits is [wrong].\n"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 1, "Error: The GPU's memory is too small"),
        (MemoryError(), 1, "Error: This machine's memory is too small"),
        (
            ValueError("first\nsecond"),
            1,
            "Error: Internal error: ValueError: first second; run again with -v",
        ),
    ],
)
def test_an_error_is_one_sentence_on_stderr(
    error: Exception,
    code: int,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(store, "list_pairs", fail)
    assert run(["models"]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(sentence)
    assert shown.err.count("\n") == 1
    assert run(["models", "-v"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "list_pairs", interrupt)
    assert run(["models"]) == 130


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize", "demo", "--bits", "5"], "--bits must be 2, 3, 4, 8, a fraction between them, or auto, not 5."),
        (["quantize", "demo", "--group-size", "100"], "--group-size must be one of 32, 64, 128, -1, not 100."),
        (["quantize", "demo", "--backend", "magic"], "--backend must be one of native, optimum, not magic."),
        (["quantize", "nobody-knows-it"], "nobody-knows-it is neither a folder here nor a model whose organisation"),
        (["generate", "--prompt", "x", "--model", "./nowhere"], "There is no folder ./nowhere, and a hub id"),
        (["generate", "--prompt", "x", "--prompt-file", "y"], "Give the prompt once: as PROMPT, with --prompt"),
        (["generate", "x", "--prompt", "y"], "Give the prompt once: as PROMPT, with --prompt"),
        (["generate", "x", "--json", "--trace"], "--trace draws in the terminal: with --json, name a file for it."),
        (["generate", " "], "The prompt is empty."),
        (["generate", "--promt", "x"], "No such option: --promt"),
        (["generate", "x", "--max-new-tokens", "many"], "--max-new-tokens must be a whole number, not many."),
        (["quantize"], "Missing argument 'MODEL'; see quasar quantize --help."),
        (["quantise"], "No such command 'quantise'"),
        (["generate", "--prompt", " \n"], "The prompt is empty."),
        (["generate", "--prompt-file", "missing.txt"], "missing.txt does not exist."),
        (["generate", "--prompt", "x", "--raw", "--system", "s"], "--system is part of the chat template"),
        (
            ["generate", "--prompt", "x", "--verify", "maybe"],
            "--verify must be one of full, quantized, exact, gated, not maybe.",
        ),
        (["generate", "--prompt", "x", "--window", "wide"], "--window must be auto or a whole number, not wide."),
        (["generate", "--prompt", "x", "--num-draft-tokens", "0"], "--num-draft-tokens must be auto or from 1 to 64"),
        (["generate", "--prompt", "x", "--top-p", "2"], "--top-p must be from 0 to 1, not 2.0."),
        (["chat", "--temperature", "-1"], "--temperature must be from 0 to 100, not -1.0."),
        (["bench", "--dataset", "demo", "--temperature", "nan"], "--temperature must be from 0 to 100, not nan."),
        (["generate", "--trace", "out.txt", "Hi"], "--trace must be a .json file, not out.txt."),
        (["generate", "x", "--model", "demo", "--draft-from", "nowhere.txt"], ""),
        (["inspect"], "No pair is current: name a CHECKPOINT"),
        (["inspect", "nothing"], "nothing is neither a folder here nor a recorded pair; the recorded pairs: none."),
        (["models", "export", "nothing"], "nothing is neither a folder here nor a recorded pair; the"),
        (["inspect", "nothing", "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, not tpu."),
        (["models", "use", "nothing"], "There is no pair nothing; the recorded pairs: none."),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"Error: {words}")
    assert shown.err.count("\n") == 1


def test_an_unknown_option_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--promt", "x"]) == 2
    assert "No such option: --promt" in capsys.readouterr().err


@pytest.mark.parametrize("threads", ["0", "abc", "-3", "4,0", "1.5"])
def test_a_number_of_threads_that_is_none_is_refused(
    threads: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """OpenMP would say so in words of its own, and go on with another."""
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert run(["models"]) == 2
    assert capsys.readouterr().err == f"Error: OMP_NUM_THREADS must be a number of threads, not {threads}.\n"


@pytest.mark.parametrize("threads", ["", " 2 ", "4,2", "04"])
def test_what_openmp_takes_is_taken(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert run(["models"]) == 0


def test_a_command_may_follow_one_that_read_the_standard_input() -> None:
    program = "import sys; from quasar_cli.main import run; run(['models']); sys.stdin.readline(); "
    program += "sys.exit(run(['models']))"
    done = subprocess.run([sys.executable, "-c", program], input="a\nb\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_the_process_exits_with_the_code() -> None:
    command = [sys.executable, "-m", "quasar_cli", "quantize", "demo", "--bits", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: --bits must be 2, 3, 4, 8, a fraction between them, or auto, not 5.\n"


# The console


def test_progress_is_a_line_per_stage_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from quasar_cli.console import progress_bar

    with progress_bar() as progress:
        for stage, done in (("layers", 0), ("layers", 1), ("packing", 0), ("packing", 1)):
            progress(stage, done, 1)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "layers ...\npacking ...\n")


def test_progress_in_a_terminal_has_a_bar_with_an_eta(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from quasar_cli.console import progress_bar

    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar() as progress:
        progress("layers", 3, 12)
    shown = capsys.readouterr()
    assert shown.out == ""
    for part in ("layers", "3/12", "ETA"):
        assert part in shown.err


def test_progress_that_nobody_watches_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    no_progress("layers", 0, 1)
    assert capsys.readouterr() == ("", "")
