"""The C++ of passes and products as another processor runs it, under an emulator: `tests/neon.py` has the tests use it.

`Emulated` stands where the loaded library stands. Each call is written as one block of memory, with everything that its
pointers reach, and sent to a program that was compiled for the other processor (`emulated.cpp`); what comes back is
copied to where the call's results belong.
"""

import ctypes
import subprocess
from collections.abc import Sequence
from typing import Any

from quasar_core.kernels.cpu.compressed import BITS, STRIP, row_bytes
from quasar_core.kernels.cpu.library import (
    Compressed,
    Experts,
    FusedWeight,
    Layer,
    Model,
    Product,
    Recurrence,
    StatePlace,
)

POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int
_POINTERS = ("model", "tokens", "parents", "cos", "sin", "growth", "states", "recurrent")
_POINTERS += ("given", "rows", "logits", "chosen", "margins", "likeliest", "rule")
_POINTERS += ("strips", "bases", "first", "outliers")
_NUMBERS = ("is_bfloat16", "count", "shown", "position", "capacity", "wanted", "inputs", "outputs", "groups", "group")
_NUMBERS += ("bits", "threads")


PRODUCT, PASS, RULE, BASES, COMPRESS, RESTORE, NORM = range(7)


class Call(ctypes.Structure):
    """As `emulated.cpp` has it."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        *((name, POINTER) for name in (*_POINTERS, "x", "codes", "y")),
        *((name, NUMBER) for name in _NUMBERS),
    )


class Block:
    """A block of memory, what of it are pointers, and where its parts lie in this process."""

    def __init__(self) -> None:
        self.memory = bytearray(ctypes.sizeof(Call))
        self.pointers: list[int] = []
        self.places: dict[int, tuple[int, int]] = {}  # by address: offset, size

    def place(self, address: int | None, size: int) -> int | None:
        """The offset of what lies at an address, copied once."""
        if not address:
            return None
        if address not in self.places:
            self.memory += bytes(-len(self.memory) % 64)
            self.places[address] = len(self.memory), size
            self.memory += ctypes.string_at(address, size)
        return self.places[address][0]

    def point(self, at: int, offset: int | None) -> None:
        """Let the eight bytes at a place be a pointer to an offset, or null."""
        self.memory[at : at + 8] = (offset or 0).to_bytes(8, "little")
        if offset is not None:
            self.pointers.append(at)

    def list_of(self, offsets: Sequence[int | None]) -> int:
        """A list of pointers."""
        self.memory += bytes(-len(self.memory) % 64)
        start = len(self.memory)
        self.memory += bytes(8 * len(offsets))
        for number, offset in enumerate(offsets):
            self.point(start + 8 * number, offset)
        return start


class Emulated:
    """The functions of the library, as far as tests call them."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._models: list[Model] = []

    def quasar_form(self) -> bytes:
        """What it stands for."""
        return b"another processor, emulated"

    def quasar_multiply_codes(self, x: int, codes: int, y: int, *numbers: Any) -> None:
        """A product with packed codes."""
        count, inputs, outputs, groups, group, bits, is_bfloat16, threads = map(int, numbers)
        block, width = Block(), 2 if is_bfloat16 else 4
        at = {
            "x": block.place(x, count * inputs * width),
            "codes": block.place(codes, _stream_size(bits, outputs, groups, group)),
            "y": block.place(y, count * outputs * width),
        }
        names = ("count", "inputs", "outputs", "groups", "group", "bits", "is_bfloat16", "threads")
        values = (count, inputs, outputs, groups, group, bits, is_bfloat16, threads)
        self._run(block, PRODUCT, at, dict(zip(names, values, strict=True)), [y])

    def quasar_choose_bases(self, weight: int, inputs: int, outputs: int, bases: int, first: int, threads: int) -> None:
        """The bases of a weight's strips, and how many outliers each has."""
        block, strips = Block(), -(-outputs // STRIP)
        at = {
            "x": block.place(weight, inputs * outputs * 2),
            "bases": block.place(bases, strips),
            "first": block.place(first, strips * 4),
        }
        self._run(block, BASES, at, {"inputs": inputs, "outputs": outputs, "threads": threads}, [bases, first])

    def quasar_compress(self, weight: int, inputs: int, outputs: int, *parts: Any) -> None:
        """A weight in 12 bits."""
        *places, threads = parts
        bases, first, strips, outliers = places
        block = Block()
        at = {
            "x": block.place(weight, inputs * outputs * 2),
            **_place_compressed(block, Compressed(strips, bases, first, outliers), inputs, outputs),
        }
        self._run(block, COMPRESS, at, {"inputs": inputs, "outputs": outputs, "threads": threads}, [strips, outliers])

    def quasar_restore(self, compressed: Any, inputs: int, outputs: int, weight: int, threads: int) -> None:
        """A compressed weight as it was."""
        block = Block()
        at = {
            "y": block.place(weight, inputs * outputs * 2),
            **_place_compressed(block, compressed._obj, inputs, outputs),
        }
        self._run(block, RESTORE, at, {"inputs": inputs, "outputs": outputs, "threads": threads}, [weight])

    def quasar_multiplies_pairs(self) -> int:
        """No: so attention of prompts is PyTorch's."""
        return 0

    def quasar_rms_norm(
        self, x: int, weight: int | None, y: int, count: int, size: int, eps: float, *more: int
    ) -> None:
        """Norms of rows in bfloat16."""
        rounds_first, threads = more
        block, least = Block(), ctypes.c_float(eps)
        at = {
            "x": block.place(x, count * size * 2),
            "given": block.place(weight, size * 4),
            "growth": block.place(ctypes.addressof(least), 4),
            "y": block.place(y, count * size * 2),
        }
        numbers = {"count": count, "inputs": size, "bits": int(rounds_first), "threads": threads}
        self._run(block, NORM, at, numbers, [y])

    def quasar_pass_new(self, model: Any) -> int:
        """A pass over a model, whose description is kept."""
        self._models.append(model._obj)
        return len(self._models)

    def quasar_pass_delete(self, number: int, is_bfloat16: int) -> None:
        """Nothing: descriptions are small."""

    def quasar_pass_run(self, number: int, is_bfloat16: int, begin: int, end: int, *more: Any) -> None:
        """One pass, over all layers."""
        assert (begin, end) == (0, self._models[number - 1].layers)
        tokens, parents, count, shown, position, cos, sin, growth, states, recurrent, capacity, *results = more
        given, rows, logits, chosen, margins, wanted, likeliest, threads = results
        block, model = Block(), self._models[number - 1]
        layers, width = model.layer[: model.layers], 2 if is_bfloat16 else 4
        sizes = {layer.rope: layer.head_size for layer in layers}
        turns = [
            block.list_of([block.place(a, count * sizes.get(i, 0) * 4) for i, a in enumerate(some)])
            for some in (cos, sin)
        ]
        kept = [
            (address, 2 * layer.kv_heads * capacity * layer.head_size * width)
            for address, layer in zip(states, layers, strict=False)
        ]
        at = {
            "model": _place_model(block, model, width),
            "tokens": block.place(ctypes.addressof(tokens), count * 8),
            "parents": None if parents is None else block.place(ctypes.addressof(parents), count * 4),
            "cos": turns[0],
            "sin": turns[1],
            "growth": block.place(growth, count * 4),
            "states": block.list_of([block.place(*one) for one in kept]),
            "recurrent": _place_states(block, recurrent, [_rule_of(layer) for layer in layers], count, width),
            "given": block.place(given, count * model.hidden * width),
            "rows": block.place(rows, count * model.hidden * width),
            "logits": block.place(logits, shown * model.head.outputs * 4),
            "chosen": block.place(ctypes.addressof(chosen), shown * 8),
            "margins": block.place(ctypes.addressof(margins), shown * 4),
            "likeliest": block.place(ctypes.addressof(likeliest), max(shown * wanted, 1) * 4),
        }
        found = [*(address for address, _ in kept), rows, logits, *map(ctypes.addressof, (chosen, margins, likeliest))]
        found += [getattr(place, name) for place in recurrent or () for name in WRITTEN]
        numbers = dict(zip(_NUMBERS[:6], (is_bfloat16, count, shown, position, capacity, wanted), strict=True))
        self._run(block, PASS, at, {**numbers, "threads": threads}, found)

    def quasar_recur(self, rule: Any, is_bfloat16: int, count: int, place: Any, outputs: int, threads: int) -> None:
        """The rule of a recurrent layer."""
        block, described = Block(), rule._obj
        at = {
            "rule": block.place(ctypes.addressof(described), ctypes.sizeof(Recurrence)),
            "recurrent": _place_states(
                block, (StatePlace * 1)(place._obj), [described], count, 2 if is_bfloat16 else 4
            ),
            "y": block.place(outputs, count * described.values * 4),
        }
        assert at["rule"] is not None
        _place_rule(block, at["rule"], described)
        numbers = {"is_bfloat16": is_bfloat16, "count": count, "threads": threads}
        self._run(block, RULE, at, numbers, [outputs, *(getattr(place._obj, name) for name in WRITTEN)])

    def _run(
        self,
        block: Block,
        kind: int,
        at: dict[str, int | None],
        numbers: dict[str, int],
        found: Sequence[int | None],
    ) -> None:
        """Send a call, and copy what it wrote to the addresses `found`."""
        block.memory[: ctypes.sizeof(Call)] = bytes(Call(kind=kind, **numbers))
        for name, offset in at.items():
            block.point(getattr(Call, name).offset, offset)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        sizes = len(block.memory), len(block.pointers)
        self._process.stdin.write(bytes((ctypes.c_int64 * 2)(*sizes)) + block.memory)
        self._process.stdin.write(bytes((ctypes.c_int64 * sizes[1])(*block.pointers)))
        self._process.stdin.flush()
        result = self._process.stdout.read(sizes[0])
        assert len(result) == sizes[0], "the emulated program ended"
        for address in filter(None, found):
            offset, size = block.places[address]
            ctypes.memmove(address, result[offset : offset + size], size)


def _stream_size(bits: int, outputs: int, groups: int, group: int) -> int:
    return -(-outputs // 32) * groups * (128 + group * 32 * bits // 8)


def _place_model(block: Block, model: Model, width: int) -> int:
    layers = model.layer[: model.layers]
    start = block.place(ctypes.addressof(model), ctypes.sizeof(Model))
    assert start is not None
    vocabulary, own = model.head.outputs, model.inputs_size
    parts = {
        "embedding": vocabulary * model.hidden * width,
        "norm": model.hidden * 4,
        "inputs_embedding": vocabulary * model.layers * own * width,
        "inputs_norm": own * 4,
        "joint_embedding_norm": model.hidden * 4,
        "joint_rows_norm": model.hidden * 4,
    }
    for name, size in parts.items():
        block.point(start + getattr(Model, name).offset, block.place(getattr(model, name), size))
    for name in ("head", "inputs_projection", "joint"):
        _place_products(block, start + getattr(Model, name).offset, getattr(model, name))
    block.point(
        start + Model.layer.offset,
        block.place(ctypes.addressof(model.layer.contents), ctypes.sizeof(Layer) * len(layers)),
    )
    first = block.places[ctypes.addressof(model.layer.contents)][0]
    for number, layer in enumerate(layers):
        _place_layer(block, first + number * ctypes.sizeof(Layer), layer, model)
    return start


def _place_layer(block: Block, start: int, layer: Layer, model: Model) -> None:
    sizes = dict.fromkeys(("input_norm", "out_norm", "mlp_norm", "down_norm", "input_out_norm"), model.hidden * 4)
    sizes |= {"head_norms": (model.heads + layer.kv_heads) * layer.head_size * 4, "activation": 16}
    for name, size in sizes.items():
        block.point(start + getattr(Layer, name).offset, block.place(getattr(layer, name), size))
    for name in ("qkv", "out", "gate_up", "down", "input_gate", "input_out"):
        _place_products(block, start + getattr(Layer, name).offset, getattr(layer, name))
    if layer.experts:
        block.point(start + Layer.experts.offset, _place_experts(block, layer.experts.contents, model))
    if rule := _rule_of(layer):
        at = block.place(ctypes.addressof(rule), ctypes.sizeof(Recurrence))
        assert at is not None
        block.point(start + Layer.recurrence.offset, at)
        _place_rule(block, at, rule)


def _place_experts(block: Block, experts: Experts, model: Model) -> int:
    start, count = block.place(ctypes.addressof(experts), ctypes.sizeof(Experts)), experts.count + experts.shared
    assert start is not None
    sizes = dict.fromkeys(("mlp_out_norm", "router_norm", "norm", "out_norm"), model.hidden * 4)
    sizes |= dict.fromkeys(("correction", "factors"), experts.count * 4)
    for name, size in sizes.items():
        block.point(start + getattr(Experts, name).offset, block.place(getattr(experts, name), size))
    _place_products(block, start + Experts.router.offset, experts.router)
    for name in ("gate_up", "down"):
        every = getattr(experts, name)
        first = block.place(ctypes.addressof(every.contents), ctypes.sizeof(FusedWeight) * count)
        assert first is not None
        block.point(start + getattr(Experts, name).offset, first)
        for number in range(count):
            _place_products(block, first + number * ctypes.sizeof(FusedWeight), every[number])
    return start


WRITTEN = ("window_after", "matrices_after", "channels", "rates")


def _rule_of(layer: Layer) -> Recurrence | None:
    return layer.recurrence.contents if layer.recurrence else None


def _place_states(block: Block, places: Any, rules: Sequence[Recurrence | None], count: int, width: int) -> int | None:
    """The states of a pass's layers, each where its rule has some."""
    if places is None:
        return None
    start = block.place(ctypes.addressof(places), ctypes.sizeof(places))
    assert start is not None
    for number, (place, rule) in enumerate(zip(places, rules, strict=True)):
        if rule is None:
            continue
        window = (rule.taps - 1) * rule.channels * width
        matrices = rule.value_heads * rule.key_size * rule.value_size * 4
        sizes = {"window": window, "matrices": matrices, "window_after": window, "matrices_after": matrices}
        sizes |= {"channels": count * rule.channels * width, "rates": count * 2 * rule.value_heads * 4}
        for name, size in sizes.items():
            at = start + number * ctypes.sizeof(StatePlace) + getattr(StatePlace, name).offset
            block.point(at, block.place(getattr(place, name), size))
    return start


def _place_rule(block: Block, start: int, rule: Recurrence) -> None:
    heads = dict.fromkeys(("fading", "step_bias", "passed_by"), rule.value_heads * 4)
    norm = rule.value_size if rule.kind == 0 else rule.values
    sizes = {"weights": rule.taps * rule.channels * 4, "bias": rule.channels * 4, **heads, "norm": norm * 4}
    for name, size in sizes.items():
        block.point(start + getattr(Recurrence, name).offset, block.place(getattr(rule, name), size))


def _place_products(block: Block, start: int, weight: FusedWeight) -> None:
    for number in range(weight.count):
        part, at = weight.parts[number], start + FusedWeight.parts.offset + number * ctypes.sizeof(Product)
        if part.bits == BITS:
            place = block.place(part.weight, ctypes.sizeof(Compressed))
            assert place is not None
            weight_parts = Compressed.from_address(part.weight)
            for name, offset in _place_compressed(block, weight_parts, part.inputs, part.outputs).items():
                block.point(place + getattr(Compressed, name).offset, offset)
        else:
            size = part.inputs * part.outputs * part.bits // 8
            if part.bits < 16:
                size = _stream_size(part.bits, part.outputs, part.groups, part.group)
            place = block.place(part.weight, size)
        block.point(at + Product.weight.offset, place)
        block.point(at + Product.bias.offset, block.place(part.bias, part.outputs * 4))


def _place_compressed(block: Block, weight: Compressed, inputs: int, outputs: int) -> dict[str, int | None]:
    strips = -(-outputs // STRIP)
    outliers = (ctypes.c_int32 * (strips + 1)).from_address(weight.first)[strips]
    sizes = {
        "strips": outputs * row_bytes(inputs),
        "bases": strips,
        "first": 4 * (strips + 1),
        "outliers": 8 * outliers,
    }
    return {name: block.place(getattr(weight, name), size) for name, size in sizes.items()}
