"""What the demo model reads: the standard library of the running interpreter, and chats made from it.

A document is one source file, one help topic, or one chat. Files are split into train and held-out by a hash of
their path, so the split does not depend on the order of a directory listing.
"""

import ast
import hashlib
import io
import keyword
import random
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.04
MAX_FILE_BYTES = 400_000
# Tables of characters, and pages of escaped strings: bytes that teach nothing about Python.
SKIPPED_PARTS = ("site-packages", "encodings", "pydoc_data", "__pycache__", "dist-packages")


@dataclass(frozen=True)
class Corpus:
    """Texts of source files, train and held-out, and the functions found in the train files."""

    train: list[str]
    held_out: list[str]
    functions: list["Function"]


@dataclass(frozen=True)
class Function:
    """A function of the standard library: its name, its source without its docstring, and its docstring."""

    name: str
    source: str
    docstring: str


def read_corpus() -> Corpus:
    """Read the interpreter's standard library, the same file contents once."""
    train, held_out, functions, seen = [], [], [], set()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in SKIPPED_PARTS for part in relative.parts) or path.stat().st_size > MAX_FILE_BYTES:
            continue
        text = _read_source(path)
        if len(text) < 200 or text in seen:
            continue
        seen.add(text)
        if _unit_hash(relative.as_posix()) < HELD_OUT_SHARE:
            held_out.append(text)
        else:
            train.append(text)
            functions.extend(find_functions(text))
    return Corpus(train, held_out, functions)


def _read_source(path: Path) -> str:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):  # files that exist to test exactly this
        return ""


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def find_functions(text: str) -> list[Function]:
    """Functions of 3 to 24 lines, dedented, docstring taken out."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []
    lines = text.splitlines()
    return [f for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) if (f := _cut_function(node, lines))]


def _cut_function(node: ast.FunctionDef, lines: list[str]) -> Function | None:
    docstring = ast.get_docstring(node) or ""
    drop = range(0)
    if docstring:
        first = node.body[0]
        drop = range(first.lineno - 1, first.end_lineno or first.lineno)
        if len(node.body) == 1:
            return None
    kept = [lines[i][node.col_offset :] for i in range(node.lineno - 1, node.end_lineno or 0) if i not in drop]
    source = "\n".join(line.rstrip() for line in kept)
    if not 3 <= len(kept) <= 24 or len(source) > 900 or len(docstring) > 500:
        return None
    return Function(node.name, source, docstring)


def make_chats(functions: list[Function], seed: int) -> Iterator[list[dict[str, str]]]:
    """One chat for each function, of a kind drawn at random: most answers can be read off the question."""
    rng = random.Random(seed)
    kinds = [_rename, _repeat, _continue, _describe, _write, _add_docstring, _rename_twice]
    for function in rng.sample(functions, len(functions)):
        chat = rng.choice(kinds)(function, rng)
        if chat:
            yield [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(chat)]


def _code(source: str) -> str:
    return f"```python\n{source}\n```"


def _pick_identifier(source: str, rng: random.Random) -> str | None:
    names = {t.string for t in _tokens(source) if t.type == tokenize.NAME}
    plain = sorted(n for n in names if len(n) > 2 and n not in _KEYWORDS and source.count(n) < 12)
    return rng.choice(plain) if plain else None


def _tokens(source: str) -> list[tokenize.TokenInfo]:
    try:
        return list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, IndentationError, SyntaxError):
        return []


_KEYWORDS = frozenset([*keyword.kwlist, "self", "cls"])
_NEW_NAMES = (
    "result",
    "value",
    "item",
    "node",
    "data",
    "entry",
    "buffer",
    "count",
    "total",
    "index",
    "path",
    "name",
    "text",
    "record",
    "config",
    "handler",
    "state",
    "offset",
    "limit",
    "width",
    "token",
    "parent",
    "child",
    "target",
    "source",
    "stream",
    "window",
    "cursor",
)


def _rename(function: Function, rng: random.Random) -> list[str] | None:
    old = _pick_identifier(function.source, rng)
    if not old:
        return None
    new = rng.choice(_NEW_NAMES)
    ask = rng.choice(
        ["Rename `{}` to `{}`:", "Replace `{}` by `{}` in this function:", "Change the name `{}` to `{}`."]
    )
    return [f"{ask.format(old, new)}\n{_code(function.source)}", _code(_replace_name(function.source, old, new))]


def _replace_name(source: str, old: str, new: str) -> str:
    return re.sub(rf"\b{re.escape(old)}\b", new, source)


def _rename_twice(function: Function, rng: random.Random) -> list[str] | None:
    first = _rename(function, rng)
    if not first:
        return None
    renamed = first[1].removeprefix("```python\n").removesuffix("\n```")
    old = _pick_identifier(renamed, rng)
    if not old:
        return None
    new = rng.choice(_NEW_NAMES)
    return [*first, f"Now rename `{old}` to `{new}`.", _code(_replace_name(renamed, old, new))]


def _repeat(function: Function, rng: random.Random) -> list[str]:
    ask = rng.choice(["Repeat this code.", "Copy this function.", "Print this code again:"])
    return [f"{ask}\n{_code(function.source)}", _code(function.source)]


def _continue(function: Function, rng: random.Random) -> list[str] | None:
    lines = function.source.splitlines()
    if len(lines) < 5:
        return None
    cut = rng.randrange(2, len(lines) - 1)
    return [f"Complete this function:\n{_code(chr(10).join(lines[:cut]))}", _code(function.source)]


def _describe(function: Function, rng: random.Random) -> list[str] | None:
    if not function.docstring:
        return None
    ask = rng.choice(["What does `{}` do?", "Explain the function `{}`.", "Summarise `{}` in its docstring."])
    return [f"{ask.format(function.name)}\n{_code(function.source)}", function.docstring]


def _write(function: Function, rng: random.Random) -> list[str] | None:
    if not function.docstring:
        return None
    ask = rng.choice(["Write a function `{}`.", "Write the Python function `{}`."])
    return [f"{ask.format(function.name)} {function.docstring}", _code(function.source)]


def _add_docstring(function: Function, rng: random.Random) -> list[str] | None:
    lines = function.source.splitlines()
    if not function.docstring or "\n" in function.docstring or not lines[0].endswith(":"):
        return None
    body = next((line for line in lines[1:] if line.strip()), "    ")
    indent = body[: len(body) - len(body.lstrip())]
    documented = "\n".join([lines[0], f'{indent}"""{function.docstring}"""', *lines[1:]])
    return [f'Add the docstring "{function.docstring}"\n{_code(function.source)}', _code(documented)]
