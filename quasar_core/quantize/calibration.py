"""Calibration text: where it comes from, what is held out, its identity; by default the target writes it itself.

A chat model writes both sides of a conversation: it starts where its template opens a user's turn, and where a turn
ends the template's own tokens open the next one (Magpie, Xu et al., 2024). A base model starts from a token drawn at
random. Rows are sampled in batches, seeded. Letters: N samples of L tokens, B rows of a batch.
"""

import gzip
import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quasar_core.config import QuantizeConfig
from quasar_core.decode.text import render, text_of
from quasar_core.errors import QuasarError, UsageError, foreign_errors
from quasar_core.files import is_file, opened, parse_json, read_text, require_characters
from quasar_core.models.base import refuse_odd_logits
from quasar_core.models.hf.cache import PreallocatedCache, RecurrentCache, recurrent_layers
from quasar_core.quantize.malloc import return_freed_memory
from quasar_core.quantize.text_log import TextLog
from quasar_core.records import Progress, no_progress

# Keys and values of the rows that are written at once.
CACHE_BYTES, DEVICE_CACHE_BYTES = 500_000_000, 4_000_000_000
# Attention's copies grow by a token a step, and leave holes in the heap that no later one fits.
STEPS_BETWEEN_RETURNS = 16
_MARK = "QUASAR-MARK"


@dataclass(frozen=True)
class TurnTokens:
    """Token ids that open a conversation, and those that follow a user's and an assistant's turn."""

    opening: list[int]
    after_user: list[int]
    after_assistant: list[int]
    ends: frozenset[int]


def turn_tokens(tokenizer: PreTrainedTokenizerBase) -> TurnTokens | None:
    """Read off the chat template, by rendering marked messages; None without a template or a marked rendering."""
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        return None
    user, assistant = f"{_MARK}-1", f"{_MARK}-2"
    messages = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": assistant},
        {"role": "user", "content": f"{_MARK}-3"},
    ]
    try:
        text = render(tokenizer, messages)
        asked = render(tokenizer, messages[:1], add_generation_prompt=True)
    except QuasarError:  # what no conversation can be written with is written without one
        return None
    if not (user in asked and user in text and assistant in text and messages[2]["content"] in text):
        return None
    opening = text.split(user)[0]
    after_user = asked.split(user)[1]
    after_assistant = text.split(assistant)[1].split(messages[2]["content"])[0]
    end = tokenizer.eos_token_id

    def without_end(piece: str) -> list[int]:
        ids = list(tokenizer(piece, add_special_tokens=False)["input_ids"])
        return ids[1:] if ids[:1] == [end] else ids

    return TurnTokens(without_end(opening), without_end(after_user), without_end(after_assistant), frozenset([end]))


@torch.inference_mode()
def write_self_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    length: int,
    seed: int,
    greedy_from: int | None = None,
    progress: Progress = no_progress,
    stage: str = "writing calibration text",
    kept: Path | None = None,
) -> torch.Tensor:
    """Write token ids [rows, length] at temperature 1; with `greedy_from`, greedy from that position on.

    In the folder `kept` it is kept as it is written: a call after one that was interrupted goes on, to the same text.
    Raises QuasarError where the model's logits are not numbers.
    """
    turns = turn_tokens(tokenizer)
    batches = []
    device = str(model.device)
    text = {"rows": rows, "length": length, "seed": seed, "greedy_from": greedy_from, "device": device}
    at_once = rows_at_once(model, length, model.device.type != "cpu")
    for begin in range(0, rows, at_once):
        count = min(at_once, rows - begin)
        generator = torch.Generator(model.device).manual_seed(seed * 1_000_003 + begin)
        log = None
        if kept is not None:
            log = TextLog(kept, f"seed-{seed}-row-{begin}", {**text, "begin": begin, "count": count})

        def report(tokens: int, begin: int = begin) -> None:
            progress(stage, begin * length + tokens, rows * length)

        batches.append(_finished_batch(model, turns, count, length, generator, greedy_from, log, report))
    return torch.cat(batches)


def cache_bytes(on_device: bool) -> int:
    """Bound what the keys and values may take, in the memory of a GPU or of the CPU."""
    return DEVICE_CACHE_BYTES if on_device else CACHE_BYTES


def rows_at_once(model: PreTrainedModel, length: int, on_device: bool) -> int:
    """Count the rows of `length` tokens whose keys and values fill `cache_bytes`, at least one."""
    return max(1, cache_bytes(on_device) // (token_bytes(model, model.dtype.itemsize) * length))


def token_bytes(model: PreTrainedModel, element: int) -> int:
    """Count the bytes of a token's keys and values in all layers, of so many bytes a number."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * element)


def _finished_batch(
    model: PreTrainedModel,
    turns: TurnTokens | None,
    count: int,
    length: int,
    generator: torch.Generator,
    greedy_from: int | None,
    log: TextLog | None,
    report: Callable[[int], None],
) -> torch.Tensor:
    """Return one batch [count, length], read where an earlier run has written it."""
    recurrent = recurrent_layers(model.config) is not None
    if log is None:
        return _write_batch(model, turns, count, length, generator, greedy_from, log, report)
    tokens = log.finished()
    if tokens is None:
        # States of recurrent layers are too large to be kept every few seconds: such a batch is written at one go.
        within = None if recurrent else log
        tokens = _write_batch(model, turns, count, length, generator, greedy_from, within, report)
        log.finish(tokens)
    return tokens


def _write_batch(
    model: PreTrainedModel,
    turns: TurnTokens | None,
    count: int,
    length: int,
    generator: torch.Generator,
    greedy_from: int | None,
    log: TextLog | None,
    report: Callable[[int], None],
) -> torch.Tensor:
    """Write one batch [count, length]: every row gets a token a step, sampled or forced by the template."""
    conversation = _Conversations(turns, count)
    cache = _new_cache(model, length)
    written = log.resume(cache, generator) if log and isinstance(cache, PreallocatedCache) else []
    if written:
        for tokens in written[len(turns.opening) if turns else 1 :]:
            conversation.direct(tokens[:, 0])
        cache.rollback(len(written) - 1)
        logits = _next_logits(model, written[-1], cache)
    else:
        # A token of each row at a time: for the last of several, PyTorch's CPU product copies the head for every row.
        written = list(_opening(model, turns, count, generator)[:, :length].split(1, dim=1))
        for tokens in written:
            logits = _next_logits(model, tokens, cache)
    while len(written) < length:
        refuse_odd_logits(logits)
        if greedy_from is not None and len(written) >= greedy_from:
            chosen = logits.argmax(dim=-1)
        else:
            chosen = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
        written.append(conversation.direct(chosen)[:, None])
        logits = _next_logits(model, written[-1], cache)
        if log and isinstance(cache, PreallocatedCache):
            log.keep(written, cache, generator)
        if len(written) % STEPS_BETWEEN_RETURNS == 0:
            return_freed_memory()
        report(count * len(written))
    return torch.cat(written, dim=1).cpu()


def _new_cache(model: PreTrainedModel, length: int) -> PreallocatedCache | RecurrentCache:
    """Make what holds the rows' keys and values, or the states of recurrent layers."""
    if recurrent_layers(model.config):
        return RecurrentCache(model.config, length)
    return PreallocatedCache(model.config.get_text_config().num_hidden_layers, length)


def _opening(model: PreTrainedModel, turns: TurnTokens | None, count: int, generator: torch.Generator) -> torch.Tensor:
    """Make what every row begins with [count, T]: the template's tokens, else a token drawn at random."""
    if turns:
        return torch.tensor([turns.opening] * count, device=model.device)
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(vocab, (count, 1), generator=generator, device=model.device)


def _next_logits(
    model: PreTrainedModel, inputs: torch.Tensor, cache: PreallocatedCache | RecurrentCache
) -> torch.Tensor:
    """Pass the next token of each row, [B, 1], and return float32 logits [B, V]."""
    return model(input_ids=inputs, past_key_values=cache, use_cache=True).logits[:, -1].float()  # type: ignore[no-any-return]


class _Conversations:
    """Whose turn it is in each row, and the template's tokens that must come next."""

    def __init__(self, turns: TurnTokens | None, rows: int) -> None:
        self.turns = turns
        self.user_speaks = [True] * rows
        self.forced: list[list[int]] = [[] for _ in range(rows)]

    def direct(self, chosen: torch.Tensor) -> torch.Tensor:
        """Replace sampled tokens by forced ones where a turn has just ended."""
        if self.turns is None:
            return chosen
        tokens = chosen.tolist()
        for row, token in enumerate(tokens):
            if self.forced[row]:
                tokens[row] = self.forced[row].pop(0)
            elif token in self.turns.ends:
                after = self.turns.after_user if self.user_speaks[row] else self.turns.after_assistant
                self.forced[row] = list(after)
                self.user_speaks[row] = not self.user_speaks[row]
        return torch.tensor(tokens, device=chosen.device)


HELD_OUT_ROWS = 32
# Of a held-out row of greedy text, the first tokens are sampled, so that rows differ.
GREEDY_FROM = 32
GREEDY_LENGTH = 256
# Names that the hub serves: repository, file, and for a zip its member.
HUB_TEXTS = {
    "wikitext2": ("ggml-org/ci", "wikitext-2-raw-v1.zip", "wikitext-2-raw/wiki.train.raw"),
    "c4": ("allenai/c4", "en/c4-train.00000-of-01024.json.gz", None),
}
_MAX_DOCUMENTS = 20_000


def held_out_rows(config: QuantizeConfig) -> int:
    """Count the rows that fidelity is measured on, of held-out and of greedy text each."""
    return min(config.fidelity_rows, HELD_OUT_ROWS)


@dataclass(frozen=True)
class Calibration:
    """Samples [N, L] to calibrate on, held-out rows [n, L] of the same kind, and greedy self-written rows."""

    name: str
    samples: torch.Tensor
    held_out: torch.Tensor
    greedy: torch.Tensor
    seed: int

    def identity(self) -> dict[str, Any]:
        """Collect what the checkpoint records: name, hash of the token ids, seed, number of tokens."""
        digest = hashlib.sha256(self.samples.to(torch.int64).numpy().tobytes()).hexdigest()
        return {"name": self.name, "sha256": digest, "seed": self.seed, "tokens": self.samples.numel()}


def load_calibration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: QuantizeConfig,
    max_context: int,
    progress: Progress = no_progress,
    kept: Path | None = None,
) -> Calibration:
    """Load the calibration that `--calibration` names; a folder `kept` keeps the model's text as it is written."""
    length = min(config.calibration_length, max_context)
    given = None  # cut first: a text that is too short is refused before the model writes any
    if config.calibration != "self":
        given = _cut_samples(read_documents(config.calibration), tokenizer, config, length)
    greedy = write_self_text(
        model,
        tokenizer,
        held_out_rows(config),
        min(GREEDY_LENGTH, max_context),
        config.seed + 1,
        greedy_from=GREEDY_FROM,
        progress=progress,
        stage="writing held-out text",
        kept=kept,
    )
    if given is None:
        rows = config.samples + held_out_rows(config)
        ids = write_self_text(model, tokenizer, rows, length, config.seed, progress=progress, kept=kept)
        given = ids[: config.samples], ids[config.samples :]
    samples, held_out = given
    return Calibration(calibration_name(config.calibration), samples, held_out, greedy, config.seed)


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
    wanted = (config.samples + held_out_rows(config)) * length
    for document in documents:
        tokens += encode(document, tokenizer)
        if len(tokens) > 8 * wanted:
            break
    windows = len(tokens) // length
    if windows < 2:
        raise UsageError(
            f"--calibration {config.calibration} holds {len(tokens)} tokens; at least {2 * length} are needed "
            f"for samples of {length} tokens (--seq-len)."
        )
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(config.seed))
    held_out = min(held_out_rows(config), max(1, windows // 5))
    rows = torch.tensor(tokens[: windows * length]).view(windows, length)
    return rows[order[held_out:][: config.samples]], rows[order[:held_out]]


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
    path = Path(name)
    if not is_file(path):
        known = ", ".join([*(["self"] if flag == "--calibration" else []), *HUB_TEXTS])
        raise UsageError(f"{flag} must be a file or one of {known}; {name} is neither.")
    if path.suffix not in (".jsonl", ".json"):
        yield read_text(path, kind=UsageError)
        return
    with opened(path, kind=UsageError) as file:
        try:
            yield from _read_json_lines(io.TextIOWrapper(file, encoding="utf-8"), path.name)
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error


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
