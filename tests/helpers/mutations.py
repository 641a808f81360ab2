"""Files damaged on purpose: every kind of damage that a disk, an editor or an attacker does, chosen by a number."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What may stand in JSON in place of a value. The sizes stay small enough to be tried: absurd ones have their own tests.
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    7,
    2**31,
    2**63,
    10**30,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "-1",
    "\0",
    "\ud800",
    "é" * 300,
    [],
    [None],
    [[1]],
    ["x", 1],
    {},
    {"x": 1},
    {"x": {"y": []}},
)
DEEP = 100_000  # lists within one another


def damage(path: Path, number: int) -> str:
    """Damage a file in a way that `number` chooses; what was done, in a few words."""
    chance = random.Random(number)
    kinds: list[Callable[[Path, random.Random], str]] = [_flip, _cut, _insert, _repeat]
    if path.suffix in (".json", ".jsonl"):
        kinds = [*kinds, *[_change_json] * 16, _nest]
    if path.suffix == ".safetensors":
        kinds = [_flip_header, _cut, _change_header, _change_header, _change_header, _insert]
    kinds.append(_replace_whole)
    return chance.choice(kinds)(path, chance)


def _flip(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 1, 4, 32))):
        content[chance.randrange(len(content))] = chance.randrange(256)
    path.write_bytes(content)
    return "bytes changed"


def _cut(path: Path, chance: random.Random) -> str:
    content = path.read_bytes()
    length = chance.choice((0, 1, 7, 8, 9, len(content) // 2, len(content) - 1, chance.randrange(len(content))))
    path.write_bytes(content[:length])
    return f"cut to {length} bytes"


def _insert(path: Path, chance: random.Random) -> str:
    content = path.read_bytes()
    piece = chance.choice((b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"{", b"]", b'"', b"\n" * 99))
    at = chance.choice((0, len(content), chance.randrange(len(content) + 1)))
    path.write_bytes(content[:at] + piece + content[at:])
    return f"{piece[:4]!r} inserted at {at}"


def _repeat(path: Path, chance: random.Random) -> str:
    path.write_bytes(path.read_bytes() * 2)
    return "written twice"


def _replace_whole(path: Path, chance: random.Random) -> str:
    text = chance.choice(("", "null", "[]", "{}", "0", '"x"', "NaN", "[{}]", '{"a": 1, "a": 2}', "\ufeff{}", "{% for"))
    path.write_text(text)
    return f"replaced by {text!r}"


def _nest(path: Path, chance: random.Random) -> str:
    opening, closing = chance.choice((("[", "]"), ('{"a":', "}")))
    deep = opening * DEEP + "0" + closing * DEEP
    path.write_text(chance.choice((deep, f'{{"a": {deep}}}')))
    return f"{DEEP} times {opening}"


def _change_json(path: Path, chance: random.Random) -> str:
    lines = path.read_text("utf-8").split("\n") if path.suffix == ".jsonl" else [path.read_text("utf-8")]
    at = chance.choice([i for i, line in enumerate(lines) if line.strip()])
    content = json.loads(lines[at])
    done = change(content, chance)
    lines[at] = json.dumps(content)
    path.write_text("\n".join(lines))
    return done


def _flip_header(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    for _ in range(chance.choice((1, 1, 8))):
        content[chance.randrange(8 + length)] = chance.randrange(256)
    path.write_bytes(content)
    return "bytes of the header changed"


def _change_header(path: Path, chance: random.Random) -> str:
    """The header alone, and the length before it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    done = change(header, chance)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return done


def change(content: Any, chance: random.Random) -> str:
    """Change one value of a JSON document in place: another value, a key less, one more, one moved."""
    places = list(_places(content, ""))
    if not places:
        return "nothing to change"
    owner, key, where = chance.choice(places)
    action = chance.choice(("swap", "swap", "swap", "swap", "remove", "rename", "copy"))
    if action == "remove":
        del owner[key]
    elif action == "rename" and isinstance(owner, dict):
        owner[f"{key}x"] = owner.pop(key)
    elif action == "copy":
        owner[key] = chance.choice(places)[0]  # may hold itself
        if _holds_itself(content):
            owner[key] = None
    else:
        owner[key] = chance.choice(VALUES)
    return f"{action} {where}"


def _places(content: Any, where: str) -> Iterator[tuple[Any, Any, str]]:
    """Every value of a document by its owner and key; of a long list or object, some at its ends."""
    if not isinstance(content, dict | list):
        return
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    for key in keys if len(keys) < 60 else [*keys[:20], *keys[-20:]]:
        yield content, key, f"{where}/{key}"
        yield from _places(content[key], f"{where}/{key}")


def _holds_itself(content: Any) -> bool:
    try:
        json.dumps(content)
    except (ValueError, RecursionError):
        return True
    return False
