"""Calibration text from files and from the hub: every form, every refusal, what is held out, the identity."""

import gzip
import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.chat_text import BEGIN, CHATML, END, NEWLINE, USER, chat_tokenizer
from helpers.hub_server import HubServer, use_hub
from helpers.tiny_models import random_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from quasar_core.config import QuantizeConfig
from quasar_core.errors import QuasarError, UsageError
from quasar_core.quantize import calibration
from quasar_core.quantize.calibration import Calibration, encode, load_calibration, read_documents
from quasar_core.quantize.text_writers import TransformersWriter


@pytest.fixture(autouse=True)
def _short_greedy_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "HELD_OUT_ROWS", 4)
    monkeypatch.setattr(calibration, "GREEDY_LENGTH", 36)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the word `wi`."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def load(
    source: str | Path, tokenizer: object = None, samples: int = 8, seq_len: int = 16, seed: int = 0
) -> Calibration:
    config = QuantizeConfig(calibration=str(source), samples=samples, seq_len=seq_len, seed=seed)
    return load_calibration(
        TransformersWriter(random_model("qwen3").model), tokenizer or word_tokenizer(), config, max_context=128
    )


def text_of(count: int, first: int = 0) -> str:
    """`count` words, each the successor of the one before, so that a window tells where it was cut."""
    return " ".join(f"w{(first + i) % 97}" for i in range(count))


def windows(rows: torch.Tensor) -> set[int]:
    """First words of rows that are runs of successive words."""
    assert ((rows[:, 1:] - rows[:, :-1]) % 97 == 1).all()
    return set(rows[:, 0].tolist())


def test_a_text_file_is_cut_into_windows_that_do_not_overlap(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(text_of(96))
    found = load(tmp_path / "book.txt")
    assert found.samples.shape == (5, 16)
    assert found.held_out.shape == (1, 16), "a fifth is held out"
    assert windows(torch.cat([found.samples, found.held_out])) == {0, 16, 32, 48, 64, 80}
    assert found.greedy.shape == (4, 36)
    again = load(tmp_path / "book.txt")
    assert torch.equal(found.samples, again.samples)
    assert not torch.equal(found.samples, load(tmp_path / "book.txt", seed=1).samples)


def test_windows_begin_as_the_tokenizer_begins_every_text(tmp_path: Path) -> None:
    """As prompts do: some models, such as Gemma, read a text without its first token as another text."""
    tokenizer = word_tokenizer()
    begin = TemplateProcessing(single="w96 $A", special_tokens=[("w96", 96)])
    tokenizer.backend_tokenizer.post_processor = begin
    (tmp_path / "book.txt").write_text(text_of(90))
    found = load(tmp_path / "book.txt", tokenizer)
    rows = torch.cat([found.samples, found.held_out])
    assert rows[:, 0].tolist() == [96] * 6
    assert windows(rows[:, 1:]) == {0, 15, 30, 45, 60, 75}
    assert found.greedy[:, 0].tolist() == [96] * 4


def test_no_more_samples_than_asked_for(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(text_of(97 * 16))
    found = load(tmp_path / "book.txt", samples=3)
    assert len(found.samples) == 3
    assert len(found.held_out) == 4
    assert not windows(found.samples) & windows(found.held_out)


def test_the_identity_is_that_of_the_tokens_and_holds_no_folder(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(text_of(96))
    found = load(tmp_path / "book.txt", seed=3)
    digest = hashlib.sha256(b"".join(int(t).to_bytes(8, "little") for t in found.samples.flatten())).hexdigest()
    assert found.identity() == {"name": "book.txt", "sha256": digest, "seed": 3, "tokens": 5 * 16}


@pytest.mark.parametrize(
    "record",
    [
        {"text": text_of(40)},
        {"messages": [{"role": "user", "content": text_of(20)}, {"role": "assistant", "content": text_of(20, 20)}]},
        {"conversations": [{"from": "human", "value": text_of(20)}, {"from": "gpt", "value": text_of(20, 20)}]},
        {"question_id": 1, "category": "writing", "turns": [text_of(20), text_of(20, 20)]},
    ],
    ids=["plain", "chat", "ShareGPT", "FastChat"],
)
def test_json_lines_in_every_form(record: dict[str, object], tmp_path: Path) -> None:
    """Without a chat template the messages are joined."""
    (tmp_path / "lines.jsonl").write_text(json.dumps(record) + "\n\n" + json.dumps({"text": text_of(40, 40)}) + "\n")
    found = load(tmp_path / "lines.jsonl", seq_len=20)
    assert windows(torch.cat([found.samples, found.held_out])) == {0, 20, 40, 60}


def test_messages_of_parts_are_read_as_their_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    path = tmp_path / "parts.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    assert list(read_documents(str(path))) == [[{"role": "user", "content": "w1 w2"}]]
    picture = json.dumps({"messages": [{"role": "user", "content": [*parts, {"type": "image", "url": "x"}]}]})
    path.write_text(picture)
    with pytest.raises(UsageError, match=r"parts\.jsonl, line 1: neither text"):
        list(read_documents(str(path)))


def test_a_template_that_wants_parts_is_calibrated_with_the_text() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }} {% endfor %}{% endfor %}"
    )
    assert encode([{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}], tokenizer) == [3, 4]


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    turns = [{"turns": ["w10", "w11"]}] * 20
    (tmp_path / "turns.jsonl").write_text("\n".join(json.dumps(turn) for turn in turns))
    found = load(tmp_path / "turns.jsonl", chat_tokenizer(CHATML), seq_len=24)
    one, other = ([BEGIN, USER, NEWLINE, word, END, NEWLINE] for word in (10, 11))
    assert found.samples[0].tolist() == (one + other) * 2


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "empty.txt",
            b"",
            r"--calibration .*empty\.txt holds 0 tokens; at least 32 are needed for samples of 16 tokens",
        ),
        ("short.txt", b"w1 w2 w3", "holds 3 tokens; at least 32 are needed"),
        ("empty.jsonl", b"\n\n", "holds 0 tokens"),
        ("binary.txt", b"\x80\x81\xff", r"binary\.txt is not UTF-8 text \(invalid start byte at byte 0\)"),
        ("binary.jsonl", b'{"text": "\xff"}', r"binary\.jsonl is not UTF-8 text"),
        (
            "broken.jsonl",
            b'{"text": "w1"}\n{"text"',
            r"broken\.jsonl, line 2: neither text, messages, conversations nor",
        ),
        ("list.jsonl", b"[1, 2]", r"list\.jsonl, line 1: neither text"),
        ("other.jsonl", b'{"prompt": "w1"}', r"other\.jsonl, line 1: neither text"),
        ("parts.jsonl", b'{"messages": [{"role": "user", "content": [1]}]}', r"parts\.jsonl, line 1: neither text"),
        ("roles.jsonl", b'{"conversations": [{"from": "cat", "value": "w1"}]}', r"roles\.jsonl, line 1: neither text"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(
    name: str, content: bytes, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model writes any text, which may take hours."""
    monkeypatch.setattr(calibration, "write_self_text", lambda *_, **__: pytest.fail("text is written"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=sentence):
        load(tmp_path / name)


def test_a_name_that_is_neither_is_refused() -> None:
    with pytest.raises(
        UsageError, match="--calibration must be a file or one of self, generic, wikitext2, c4; nowhere is neither"
    ):
        load("nowhere")


def test_self_text_is_the_models_own_and_its_held_out_rows_are_others() -> None:
    found = load("self", samples=6, seq_len=20)
    assert found.samples.shape == (6, 20)
    assert found.held_out.shape == (4, 20)
    assert len({tuple(row) for row in torch.cat([found.samples, found.held_out]).tolist()}) == 10
    assert found.identity()["name"] == "self"


def test_samples_are_no_longer_than_the_context() -> None:
    assert load("self", samples=2, seq_len=512).samples.shape == (2, 128)


def make_wikitext(folder: Path, member: str = "wikitext-2-raw/wiki.train.raw") -> None:
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "wikitext-2-raw-v1.zip", "w") as archive:
        archive.writestr(member, text_of(96))


def test_wikitext2_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wikitext(tmp_path / "ci")
    with HubServer(datasets={"ggml-org/ci": tmp_path / "ci"}) as hub:
        use_hub(monkeypatch, hub, tmp_path / "cache")
        found = load("wikitext2")
    assert windows(torch.cat([found.samples, found.held_out])) == {0, 16, 32, 48, 64, 80}
    assert found.identity()["name"] == "wikitext2"


def test_c4_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(json.dumps({"text": text_of(16, 16 * i), "url": "u"}) + "\n" for i in range(6))
    (tmp_path / "c4" / "en").mkdir(parents=True)
    with gzip.open(tmp_path / "c4" / "en" / "c4-train.00000-of-01024.json.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    with HubServer(datasets={"allenai/c4": tmp_path / "c4"}) as hub:
        use_hub(monkeypatch, hub, tmp_path / "cache")
        found = load("c4")
    assert windows(torch.cat([found.samples, found.held_out])) == {0, 16, 32, 48, 64, 80}


def test_a_hub_that_does_not_have_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer() as hub:
        use_hub(monkeypatch, hub, tmp_path / "cache")
        with pytest.raises(QuasarError, match="The text c4 could not be fetched from allenai/c4 on the hub: "):
            load("c4")


def test_a_text_from_the_hub_that_is_not_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wikitext(tmp_path / "ci", member="other")
    (tmp_path / "c4" / "en").mkdir(parents=True)
    (tmp_path / "c4" / "en" / "c4-train.00000-of-01024.json.gz").write_bytes(b"no gzip")
    with HubServer(datasets={"ggml-org/ci": tmp_path / "ci", "allenai/c4": tmp_path / "c4"}) as hub:
        use_hub(monkeypatch, hub, tmp_path / "cache")
        for name in ("wikitext2", "c4"):
            with pytest.raises(QuasarError, match=f"The text {name} as fetched from .* is not readable"):
                load(name)


def test_a_generic_text_is_at_hand_without_a_download() -> None:
    documents = list(read_documents("generic"))
    assert sum(map(len, documents)) > 300_000
    assert any("lambda_expr" in document for document in documents)
    config = QuantizeConfig(calibration="generic")
    assert (config.calibration_length, QuantizeConfig(calibration="c4").calibration_length) == (512, 2048)
    found = load_calibration(TransformersWriter(random_model("qwen3").model), word_tokenizer(), config, max_context=64)
    assert found.identity()["name"] == "generic"
    assert len(found.samples) == config.samples


def test_a_python_without_its_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(QuasarError, match="This Python comes without its documentation, which is the text generic"):
        list(read_documents("generic"))
