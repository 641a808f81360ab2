"""`quasar generate` and `quasar chat`, with a stand-in for the models: what is asked of them, what is printed where."""

import gc
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.stand_ins import StandInGenerator, type_lines

from quasar_cli.main import run
from quasar_core.config import GenerationConfig
from quasar_core.errors import QuasarError

pytest_plugins = ["helpers.cli_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home")

# generate


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_collector_leaves_alone_what_was_loaded(
    command: str, stand_in_pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks through all of PyTorch for a quarter of a second, and would in the midst of an answer."""
    type_lines(monkeypatch, "/exit")
    asked: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: asked.append("freeze"))
    assert run([command, *(["--prompt", "x"] if command == "generate" else [])]) == 0
    assert asked == ["freeze"]


def test_an_assistant_is_loaded_for_the_drafts_that_ask_it(stand_in_pair: SimpleNamespace) -> None:
    assert run(["generate", "--prompt", "x", "--draft", "assistant", "--assistant", "small"]) == 0
    assert (stand_in_pair.asked.draft, stand_in_pair.asked.assistant) == ("assistant", "small")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--assistant", "small"], "--assistant goes with --draft assistant, not with --draft"),
        (["--draft", "assistant"], "--draft assistant needs --assistant MODEL, a small model of the same vocabulary."),
    ],
)
def test_an_assistant_that_is_not_asked_or_missing_is_refused(
    options: list[str], sentence: str, stand_in_pair: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "--prompt", "x", *options]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_generate_streams_text_to_stdout_and_statistics_to_stderr(
    stand_in_pair: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "--prompt", "abc"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "[bold]Hé 4\n"
    assert "loading ...\n" in shown.err
    for fact in ("7 (end of text)", "12.0 tokens/s", "3.00 (2 steps)", "0.75 (3 of 4 draft tokens)", "5 of 6 tokens"):
        assert fact in shown.err
    assert "exact: the full-precision model's own output" in shown.err
    assert "dtype: why" not in shown.err


def test_an_answer_that_the_context_ends_says_so(
    stand_in_pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = StandInGenerator.generate
    cut = lambda *arguments: replace(answer(*arguments), finish_reason="length")  # noqa: E731
    monkeypatch.setattr(StandInGenerator, "generate", cut)
    assert run(["generate", "--prompt", "abc", "-n", "7"]) == 0
    assert "7 (length)" in capsys.readouterr().err
    assert run(["generate", "--prompt", "abc", "-n", "8"]) == 0
    assert "7 (the context is full)" in capsys.readouterr().err


def test_where_passes_may_round_otherwise_the_promise_says_so(
    stand_in_pair: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in_pair.rounds_alike = False
    assert run(["generate", "--prompt", "abc"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "own output, but where its two best tokens are a rounding of 16 bits apart" in said
    assert run(["generate", "--prompt", "abc", "--verify", "full"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "model; as without drafts, but where its two best tokens are a rounding of 16 bits apart" in said
    assert run(["generate", "--prompt", "abc", "--verify", "full", "--draft", "none"]) == 0
    assert "full: decided by the full-precision model\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"), [(["abc"], True), (["--prompt", "abc"], True), (["-"], False), ([], False)]
)
def test_a_pipe_beside_a_prompt_is_said_not_to_be_read(
    stand_in_pair: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: bool,
) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"piped\n")
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        assert run(["generate", *arguments]) == 0
    assert ("note: what comes through the pipe is not read, as the prompt is given" in capsys.readouterr().err) is told


def test_generate_forwards_every_option(stand_in_pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[GenerationConfig] = []

    class Watched(StandInGenerator):
        def __init__(self, pair: Any, config: GenerationConfig, progress: Any) -> None:
            seen.append(config)
            super().__init__(pair, config)

    monkeypatch.setattr("quasar_core.api.decoding.Generator", Watched)
    for name in "ab":
        Path(name).write_text("a text to draft from", encoding="utf-8")
    decoding = (
        "--max-new-tokens 9 --verify quantized --draft ngram --draft-from a --draft-from b --num-draft-tokens 7 "
        "--ngram-max 5 --ngram-min 2 "
        "--window 6 --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.2 --seed 8 "
        "--stop A --stop B --no-processors --no-trees --fidelity 0.97"
    )
    models = (
        "--model org/m --verifier v --no-target --device cuda:1 --dtype float16 --kernel reference "
        "--max-context 77 --trust-remote-code"
    )
    assert run(["generate", "--prompt", "x", *decoding.split(), *models.split()]) == 0
    config = seen[0]
    sampling = (0.5, 3, 0.9, 0.1, 1.2, 8)
    assert (config.max_new_tokens, config.verify, config.draft, config.num_draft_tokens) == (9, "quantized", "ngram", 7)
    assert (config.ngram_max, config.ngram_min, config.window, config.stop) == (5, 2, 6, ("A", "B"))
    assert tuple(vars(config.sampling).values()) == sampling
    assert config.draft_from == ("a", "b")
    assert not config.processors
    assert not config.trees
    assert config.fidelity == 0.97
    assert vars(stand_in_pair.asked) == {
        "model": "org/m",
        "verifier": "v",
        "assistant": None,
        "verify": "quantized",
        "draft": "ngram",
        "use_target": False,
        "device": "cuda:1",
        "dtype": "float16",
        "kernel": "reference",
        "max_context": 77,
        "trust_remote_code": True,
        "check_digest": False,
        "fast": False,
        "compress": None,
        "max_memory": None,
        "max_device_memory": None,
        "offload": "auto",
    }


def test_a_context_of_drafts_that_is_absurd_is_wrong_usage(
    stand_in_pair: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "--prompt", "x", "--ngram-max", "1000000000"]) == 2
    assert "--ngram-max must be at most 64, not 1000000000." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "tokens"), [(["--raw"], 3), (["--chat"], 4), (["--system", "12345"], 8), (["--no-stream"], 4)]
)
def test_how_the_prompt_is_encoded(
    stand_in_pair: SimpleNamespace, capsys: pytest.CaptureFixture[str], options: list[str], tokens: int
) -> None:
    assert run(["generate", "--prompt", "abc", "--no-stats", *options]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"[bold]Hé {tokens}\n"
    assert "tokens/s" not in shown.err


def test_the_prompt_comes_from_stdin_or_a_file(
    stand_in_pair: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, "12345")
    (tmp_path / "prompt.txt").write_text("1234567")
    assert run(["generate", "--prompt", "-", "--raw"]) == 0
    assert run(["generate", "--prompt-file", "prompt.txt", "--raw"]) == 0
    assert capsys.readouterr().out == "[bold]Hé 5\n[bold]Hé 7\n"


def test_a_pipe_that_holds_no_text_is_refused(
    stand_in_pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait"), "utf-8"))
    assert run(["generate"]) == 2
    assert capsys.readouterr().err == "Error: The prompt is not UTF-8 text: it holds the byte \\xe9.\n"


@pytest.mark.parametrize("command", [["generate", "x"], ["generate", "x", "-v"], ["chat"]], ids=" ".join)
def test_answers_that_are_not_kept_are_told(
    command: list[str],
    stand_in_pair: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = "draft memory: not kept: the disk is full"
    stand_in_pair.notes.append(told)
    type_lines(monkeypatch, "x\n")
    assert run(command) == 0
    assert capsys.readouterr().err.count(told) == 1


def test_an_answer_is_whole_where_its_trace_cannot_be_written(
    stand_in_pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise QuasarError("t.json cannot be written: No space left on device.")

    monkeypatch.setattr("quasar_core.api.decoding.trace_of", lambda *_: None)
    monkeypatch.setattr("quasar_core.api.decoding.write_trace", fail)
    assert run(["generate", "123", "--raw", "--trace", "t.json"]) == 1
    assert capsys.readouterr().out == "[bold]Hé 3\n"


def test_a_byte_order_mark_is_no_part_of_a_prompt(
    stand_in_pair: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, "\ufeff12345")
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf1234567\r\n")
    assert run(["generate", "--raw"]) == 0
    assert run(["generate", "--prompt-file", "prompt.txt", "--raw"]) == 0
    assert capsys.readouterr().out == "[bold]Hé 5\n[bold]Hé 7\n"


def test_the_prompt_is_an_argument_or_comes_through_a_pipe(
    stand_in_pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "123", "--raw"]) == 0
    type_lines(monkeypatch, "12345\n")  # as echo writes it
    assert run(["generate", "--raw"]) == 0
    type_lines(monkeypatch, "1\n\n")
    assert run(["generate", "-", "--raw"]) == 0
    assert capsys.readouterr().out == "[bold]Hé 3\n[bold]Hé 5\n[bold]Hé 2\n"
    type_lines(monkeypatch, "")
    assert run(["generate"]) == 2
    assert "The prompt is empty." in capsys.readouterr().err


def test_without_a_prompt_in_a_terminal_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert run(["generate"]) == 2
    assert capsys.readouterr().err.startswith("Error: Give a prompt: quasar generate 'PROMPT'")


def test_generate_json_is_one_document_with_counts_and_seconds(
    stand_in_pair: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "--prompt", "abc", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    names = "model verifier verify verified_by draft prompt_token_ids token_ids text finish_reason stats"
    assert list(document) == names.split()
    assert (document["model"], document["verifier"]) == ("demo", "demo-gptq-4bit-g128")
    assert (document["prompt_token_ids"], document["token_ids"]) == ([1, 1, 1, 1], [5, 6, 7])
    assert (document["text"], document["finish_reason"]) == ("[bold]Hé 4", "eos")
    counts = {"new_tokens": 7, "steps": 2, "drafted": 4, "accepted": 3, "confirms": 1, "confirm_accepted": 5}
    seconds = {"prefill_s": 0.1, "decode_s": 0.5, "ttft_s": 0.1, "peak_memory_bytes": 1_500_000}
    derived = {"acceptance_length": 3.0, "acceptance_rate": 0.75, "tokens_per_s": 12.0}
    assert document["stats"].items() >= (counts | seconds | derived).items()


def test_the_lossy_mode_is_never_shown_without_its_agreement(
    stand_in_pair: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "--prompt", "abc", "--verify", "quantized"]) == 0
    assert "not lossless; measured agreement with the target 0.947" in capsys.readouterr().err
    assert run(["generate", "--prompt", "abc", "--verify", "quantized", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agreement"] == 0.9471
    assert run(["generate", "--prompt", "abc", "--verify", "gated", "--fidelity", "0.99"]) == 0
    assert "not lossless; the full-precision model's own choice is expected of 0.99" in capsys.readouterr().err
    assert run(["generate", "--prompt", "abc", "--verify", "gated", "--temperature", "1"]) == 2
    stand_in_pair.fidelity = None
    assert run(["generate", "--prompt", "abc", "--verify", "quantized"]) == 0
    assert "its agreement with the target was not measured" in capsys.readouterr().err


def test_verbose_says_what_was_chosen(stand_in_pair: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--prompt", "abc", "-v"]) == 0
    assert "- dtype: why\n" in capsys.readouterr().err


def test_the_hub_id_of_a_bare_name_is_printed(
    stand_in_pair: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "--prompt", "abc", "--model", "Qwen3-8B"]) == 0
    assert "Qwen3-8B is Qwen/Qwen3-8B.\n" in capsys.readouterr().err


# chat


def test_chat_keeps_the_conversation_until_reset(
    stand_in_pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resets = StandInGenerator.resets
    type_lines(monkeypatch, "abc\n\nde\n/reset\nf\n/help\n/exit\nnever\n")
    assert run(["chat", "--system", "12"]) == 0
    shown = capsys.readouterr()
    # 2 + 3; with the answer `[bold]Hé 5` (10) and the message `de` 17; after /reset 2 + 1
    assert shown.out == "[bold]Hé 5\n[bold]Hé 17\n[bold]Hé 3\n"
    assert "(the conversation is forgotten)" in shown.err
    assert StandInGenerator.resets == resets + 1


def test_chat_json_lists_the_turns(
    stand_in_pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, "abc\nde\n")
    assert run(["chat", "--json"]) == 0
    turns = json.loads(capsys.readouterr().out)["turns"]
    assert [turn["text"] for turn in turns] == ["[bold]Hé 3", "[bold]Hé 15"]


@pytest.mark.parametrize("options", [[], ["--json"], ["--no-stream"], ["--trace"]])
def test_what_waits_is_shown_in_a_terminal_alone(
    options: list[str], stand_in_pair: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "--prompt", "x", "--show-unconfirmed", *options]) == 2
    assert "--show-unconfirmed draws in a terminal" in " ".join(capsys.readouterr().err.split())
