"""Calibration text: where it comes from, what is held out, its identity; by default the target writes it itself.

How it writes is in `self_text.py`. Letters: N samples of L tokens.
"""

import gzip
import hashlib
import importlib
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from quasar_core.config import QuantizeConfig
from quasar_core.decode.text import render, text_of
from quasar_core.draft.successors import width_of
from quasar_core.errors import QuasarError, UsageError, foreign_errors
from quasar_core.files import is_file, opened, parse_json, read_text, require_characters
from quasar_core.quantize.conversation import text_opening
from quasar_core.quantize.logit_rows import Likeliest
from quasar_core.quantize.self_text import write_self_text
from quasar_core.quantize.text_batch import NOTHING, Asked
from quasar_core.quantize.text_writers import Writer
from quasar_core.records import Progress, no_progress

HELD_OUT_ROWS = 32
# Of a held-out row of greedy text, the first tokens are sampled, so that rows differ.
GREEDY_FROM = 32
GREEDY_LENGTH = 256
# Names that the hub serves: repository, file, and for a zip its member.
HUB_TEXTS = {
    "wikitext2": ("ggml-org/ci", "wikitext-2-raw-v1.zip", "wikitext-2-raw/wiki.train.raw"),
    "c4": ("allenai/c4", "en/c4-train.00000-of-01024.json.gz", None),
}
GENERIC = "generic"  # Python's own language reference, prose and code in English: half a million characters
_MAX_DOCUMENTS = 20_000


def held_out_rows(config: QuantizeConfig) -> int:
    """Count the rows that fidelity is measured on, of held-out and of greedy text each."""
    return min(config.fidelity_rows, HELD_OUT_ROWS)


@dataclass(frozen=True)
class Calibration:
    """Samples [N, L] to calibrate on, held-out rows [n, L] of the same kind, and greedy self-written rows.

    Of what the target wrote itself, more is known: the `likeliest` tokens behind each of the samples', and of the
    held-out rows what they leave behind its last block, [n, L − 1, hidden].
    """

    name: str
    samples: torch.Tensor
    held_out: torch.Tensor
    greedy: torch.Tensor
    seed: int
    likeliest: Likeliest | None = None
    held_out_hidden: torch.Tensor | None = None

    @classmethod
    def of_tensors(cls, name: str, tensors: Mapping[str, torch.Tensor], seed: int) -> "Calibration":
        """What `tensors` were taken from."""
        found = Likeliest(tensors["likeliest"], tensors["chances"]) if "likeliest" in tensors else None
        hidden = tensors.get("held_out_hidden")
        return cls(name, tensors["samples"], tensors["held_out"], tensors["greedy"], seed, found, hidden)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Collect what is to be kept."""
        found = {"samples": self.samples, "held_out": self.held_out, "greedy": self.greedy}
        if self.likeliest is not None:
            found |= {"likeliest": self.likeliest.tokens, "chances": self.likeliest.chances}
        return found if self.held_out_hidden is None else {**found, "held_out_hidden": self.held_out_hidden}

    def identity(self) -> dict[str, Any]:
        """Collect what the checkpoint records: name, hash of the token ids, seed, number of tokens."""
        digest = hashlib.sha256(self.samples.to(torch.int64).numpy().tobytes()).hexdigest()
        return {"name": self.name, "sha256": digest, "seed": self.seed, "tokens": self.samples.numel()}


def load_calibration(
    writer: Writer,
    tokenizer: PreTrainedTokenizerBase,
    config: QuantizeConfig,
    max_context: int,
    progress: Progress = no_progress,
    kept: Path | None = None,
    by_target: bool = False,
) -> Calibration:
    """Load the calibration that `--calibration` names; a folder `kept` keeps the model's text as it is written.

    Where the writer is the target, what its passes find is returned, too.
    """
    length = min(config.calibration_length, max_context)
    given = None  # cut first: a text that is too short is refused before the model writes any
    if config.calibration != "self":
        given = _cut_samples(read_documents(config.calibration), tokenizer, config, length)
    greedy = write_self_text(
        writer,
        tokenizer,
        held_out_rows(config),
        min(GREEDY_LENGTH, max_context),
        config.seed + 1,
        greedy_from=GREEDY_FROM,
        progress=progress,
        stage="writing held-out text",
        kept=kept,
    )
    found = hidden = None
    if given is None:
        rows = config.texts + held_out_rows(config)
        asked = Asked(config.texts, width_of(writer.vocab_size), hidden=True) if by_target else NOTHING
        text = write_self_text(writer, tokenizer, rows, length, config.seed, progress=progress, kept=kept, asked=asked)
        given = text.tokens[: config.texts], text.tokens[config.texts :]
        found, hidden = text.likeliest, text.hidden
    samples, held_out = given
    name = calibration_name(config.calibration)
    return Calibration(name, samples, held_out, greedy.tokens, config.seed, found, hidden)


def calibration_name(calibration: str) -> str:
    """Name the calibration as a checkpoint does: a file goes by its name, since its folder is this machine's."""
    return Path(calibration).name


def _cut_samples(
    documents: Iterator[str | list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerBase,
    config: QuantizeConfig,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut windows of `length` tokens from the joined documents, drawn without overlap: samples, held-out rows."""
    tokens: list[int] = []
    wanted = (config.texts + held_out_rows(config)) * length
    for document in documents:
        tokens += encode(document, tokenizer)
        if len(tokens) > 8 * wanted:
            break
    rows = cut_rows(tokens, text_opening(tokenizer), length)
    if len(rows) < 2:
        raise UsageError(
            f"--calibration {config.calibration} holds {len(tokens)} tokens; at least {2 * length} are needed "
            f"for samples of {length} tokens (--seq-len)."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))
    held_out = min(held_out_rows(config), max(1, len(rows) // 5))
    return rows[order[held_out:][: config.texts]], rows[order[:held_out]]


def cut_rows(tokens: Sequence[int], opening: Sequence[int], length: int) -> torch.Tensor:
    """Cut a text into rows [n, length], each of which begins with `opening`, as every prompt does; the rest is left."""
    own = max(1, length - len(opening))
    count = len(tokens) // own
    rows = torch.tensor(tokens[: count * own]).view(count, own)
    return torch.cat([torch.tensor(opening).long().expand(count, -1), rows], dim=1)[:, :length]


def encode(document: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode a text, or a conversation as the chat template writes it."""
    if isinstance(document, list):
        if tokenizer.chat_template:
            document = render(tokenizer, document)
        else:
            document = "\n".join(message["content"] for message in document)
    with foreign_errors("The tokenizer cannot encode the calibration text"):
        return list(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])


def read_documents(name: str, flag: str = "--calibration") -> Iterator[str | list[dict[str, str]]]:
    """Read documents of a hub text or of a file, plain texts or conversations; `flag` is the option that named it."""
    if name in HUB_TEXTS:
        yield from _read_hub_text(name)
        return
    if name == GENERIC:
        yield from _read_generic_text()
        return
    path = Path(name)
    if not is_file(path, UsageError):
        known = ", ".join([*(["self"] if flag == "--calibration" else []), GENERIC, *HUB_TEXTS])
        raise UsageError(f"{flag} must be a file or one of {known}; {name} is neither.")
    if path.suffix not in (".jsonl", ".json"):
        yield read_text(path, kind=UsageError)
        return
    with opened(path, kind=UsageError) as file:
        try:
            yield from _read_json_lines(io.TextIOWrapper(file, encoding="utf-8"), path.name)
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def _read_generic_text() -> Iterator[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise QuasarError(
            f"This Python comes without its documentation, which is the text {GENERIC} ({error})."
        ) from error
    yield from topics.values()


def _read_hub_text(name: str) -> Iterator[str | list[dict[str, str]]]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, file_name, member = HUB_TEXTS[name]
    try:
        path = Path(hf_hub_download(repository, file_name, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise QuasarError(f"The text {name} could not be fetched from {repository} on the hub: {first}") from error
    try:
        if member:
            with zipfile.ZipFile(path) as archive:
                yield archive.read(member).decode("utf-8")
        else:
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                yield from _read_json_lines(lines, name)
    except (OSError, EOFError, KeyError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise QuasarError(f"The text {name} as fetched from {repository} is not readable ({error}).") from error


def _read_json_lines(lines: Any, where: str) -> Iterator[str | list[dict[str, str]]]:
    for number, line in enumerate(lines, start=1):
        if number > _MAX_DOCUMENTS:
            return
        if line.strip():
            yield _parse_document(line, f"{where}, line {number}")


def _parse_document(line: str, where: str) -> str | list[dict[str, str]]:
    """Parse {"text"}, chat {"messages"} or {"conversations"}, or FastChat {"turns"}; contents may be parts."""
    try:
        record = parse_json(line)
        if isinstance(record.get("text"), str):
            return require_characters(record["text"], where)
        if "messages" in record:
            return [_message(m["role"], m["content"], where) for m in record["messages"]]
        if "conversations" in record:
            roles = {"human": "user", "gpt": "assistant", "system": "system"}
            return [_message(roles[m["from"]], m["value"], where) for m in record["conversations"]]
        return [_message("user", turn, where) for turn in record["turns"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{where}: neither text, messages, conversations nor turns, all of them of text.") from error


def _message(role: Any, content: Any, where: str) -> dict[str, str]:
    if not isinstance(role, str):
        raise TypeError("a role is a text")
    return {"role": role, "content": require_characters(text_of(content), where)}
