"""A program: compiles the launches of every Triton kernel for a GPU that is not here, and prints one JSON line of each.

`compile_triton.py CAPABILITY [all]`: all kinds of codes, and launches that may begin early and that wait; else 4 and 8
bits, the former where the GPU has them, and experts in 16 bits for few tokens, in 4 for many.
The interpreter accepts what the compiler refuses, so kernels that only run interpreted prove nothing about a GPU.
"""

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from quasar_core.kernels.triton import blocks
from quasar_core.kernels.triton.weights import prepare_packed
from tools.gpu_bench.cases import random_codes

CAPABILITY = int(sys.argv[1]) if len(sys.argv) > 1 else 90
EVERY = "all" in sys.argv[2:]
TARGET = GPUTarget("cuda", CAPABILITY, 32)
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_KB = {80: 164, 86: 100, 89: 100, 90: 228, 120: 100}  # of a multiprocessor
OPTIONS = ("num_warps", "num_stages", "launch_pdl")
CPU = torch.device("cpu")


def compile_launch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
    """In place of a launch: types as Triton would find them, with aligned pointers and sizes."""
    options = {key: named.pop(key) for key in OPTIONS if key in named}
    values = {**dict(zip(self.arg_names, args, strict=False)), **named}
    signature, constants, aligned = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(self.arg_names, self.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or value is None or value is True or is_one(value, parameter):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], aligned[(index,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(self, signature, constexprs=constants, attrs=aligned)
    kernel = triton.compile(source, target=TARGET, options=options)
    compiled = kernel.asm
    found = {"kernel": self.__name__, "wgmma": "warp_group_dot" in compiled["ttgir"]}
    found |= {"overlaps": bool(options.get("launch_pdl")), "waits": compiled["ptx"].count("griddepcontrol.wait")}
    if self.__name__ == "_attend_kernel":
        found |= {name.lower(): values[name] for name in ("TURNS", "MERGED", "IS_TREE", "CAPPED")}
        found |= machine_code(compiled["cubin"])
    if self.__name__ in ("_routed_kernel", "_routed_packed_kernel"):
        found |= {name.lower(): values[name] for name in ("READERS", "PLACES", "GATED", "SPLITS")}
        found |= {"bits": values.get("BITS", 16), **machine_code(compiled["cubin"])}
        copied = re.findall(r"cp\.async\.c\w[^;]*?, (0x\w+)", compiled["ptx"])
        found |= {"copied_by_16": copied.count("0x10"), "copied_by_4": copied.count("0x4")}
        found["programs"] = programs(found["registers"], kernel.metadata.shared)
    if self.__name__ == "_choose_kernel":
        found |= machine_code(compiled["cubin"])
    if self.__name__ == "_packed_kernel":
        found |= {name.lower(): values[name] for name in ("BITS", "STORED", "HAS_ZEROS", "IS_WIDE", "SLOTS", "NORMS")}
        found |= machine_code(compiled["cubin"], exchanges=True)
        found["programs"] = programs(found["registers"], kernel.metadata.shared)
    print(json.dumps(found))


def is_one(value: Any, parameter: Any) -> bool:
    """Whether Triton would compile a kernel of its own for this number."""
    return isinstance(value, int) and value == 1 and not parameter.do_not_specialize


def machine_code(cubin: bytes, exchanges: bool = False) -> dict[str, int]:
    """Registers of a thread, bytes that it spills; and exchanges between lanes, which take long to find."""
    told = {"-sass": ""}
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        for question in ("--dump-resource-usage", "-sass") if exchanges else ("--dump-resource-usage",):
            command = [str(TOOLS / "cuobjdump"), question, file.name]
            told[question] = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used, code = told["--dump-resource-usage"], told["-sass"]
    (registers,), (stack,) = (re.findall(rf"{name}:(\d+)", used) for name in ("REG", "STACK"))
    found = {"registers": int(registers), "spilled": int(stack)}
    return found | {"shuffles": len(re.findall(r"\bSHFL\b", code))} if exchanges else found


def programs(registers: int, shared: int) -> int:
    """Of four warps that fit a multiprocessor: CUDA gives registers to a warp by 256, and keeps 1 KB of a program."""
    by_registers = 65536 // (4 * -(-32 * registers // 256) * 256)
    return min(by_registers, SHARED_KB[CAPABILITY] * 1024 // (shared + 1024))


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(*shape).to(dtype)


def main() -> None:
    JITFunction.run = compile_launch
    blocks.multiprocessors = lambda device: 132
    blocks._stages = lambda *given: blocks.stages_for(SHARED_KB[CAPABILITY] * 1024, given[0])
    from quasar_core.kernels.triton.language import overlapping

    both = (False, True) if CAPABILITY >= 90 else (False,)
    for wanted in both if EVERY else both[-1:]:
        with overlapping(wanted):
            launch_all()


def launch_all() -> None:
    from quasar_core.kernels.triton import (
        attention,
        choices,
        eight_bit,
        elementwise,
        packed,
        probe,
        products,
        rotation,
        shares,
        stream,
        unpack,
    )

    x, out, steps = zeros(4, 4096), zeros(4, 256), zeros(4, dtype=torch.float32)
    for bits, symmetric in ((4, True), (4, False), (8, False), (2, True)) if EVERY else ((4, True), (8, False)):
        weight = prepare_packed(random_codes(bits, 4096, 256, 128, symmetric), CPU)
        packed.multiply_packed(x, weight, out, residual=out)
        if EVERY or (bits, symmetric) == (4, True):
            packed.multiply_packed(zeros(16, 4096), weight, zeros(16, 256))
        if EVERY or bits == 4:
            unpack.dequantize_packed(weight, torch.bfloat16)
        if EVERY:
            packed.multiply_packed(x.half(), weight, out.half(), bias=out[0].half())
    products.multiply_dense(x, zeros(256, 4096), out, bias=out[0])
    products.multiply_dense(zeros(40, 4096), zeros(256, 4096), zeros(40, 256))
    pairs = zeros(16, dtype=torch.int32)
    probe._probe_kernel[(1,)](zeros(16, 16), pairs, zeros(16, 16, dtype=torch.float32), pairs, SIZE=16)
    if EVERY:
        packed.multiply_packed(x, weight, out[:, :128], gated=True)
    products.multiply_dense(x, zeros(256, 4096), out[:, :128], gated=True)
    weight = prepare_packed(random_codes(4, 4096, 256, 128, symmetric=True), CPU)
    whole = stream.begin_stream(x, x[0], 1e-6)
    part = stream.Stream(out, out, zeros(4, 4, dtype=torch.float32), 1e-6)
    before = stream.NextNorm(out[0], part.scaled, part.squares)
    dense = (products.multiply_dense, zeros(256, 4096))
    for multiply, own in ((packed.multiply_packed, weight), *([dense] if EVERY else [])):
        multiply(x, own, out, residual=out, before=before)
        multiply(x, own, out[:, :128], gated=True, behind=whole)
        if EVERY:
            multiply(x, own, out, behind=replace(whole, squares=zeros(4, 64, dtype=torch.float32)))
    elementwise.rms_norm_residual(x, x, x[0], 1e-6, x)
    elementwise.silu_multiply(x, zeros(4, 2048))
    states, queries, position = zeros(8, 1024, 128), zeros(4, 32, 128), zeros(1, dtype=torch.int64)
    tables = zeros(1024, 128), zeros(1024, 128)
    turn = rotation.Rotation(zeros(40, 128), *tables, 1e-6)
    rotation.rotate_and_store(zeros(4, 48 * 128), turn, position, states, states, queries)
    workspace = shares.attention_workspace(CPU, 4, 32, 128, 1024)
    attention.attend(queries, states, states, position, 512, workspace, x, 1024)
    tokens = zeros(4, dtype=torch.int64)
    qkv = zeros(4, 48 * 128)
    rotation.rotate_and_store(qkv, turn, position, states, states, queries, depths=tokens)
    attention.attend(queries, states, states, position, 512, workspace, x, 1024, tree=(tokens, tokens))
    where = position, 512, workspace, x, 1024
    attention.attend(qkv, states, states, *where, rotation=turn, merges=True)
    for tree in (None, (tokens, tokens)) if EVERY else ():
        attention.attend(queries, states, states, *where, cap=50.0, tree=tree)
        attention.attend(queries, states, states, *where, tree=tree, merges=True)
        attention.attend(qkv, states, states, *where, tree=tree, rotation=turn)
        attention.attend(qkv, states, states, *where, tree=tree, rotation=turn, merges=True)
    launch_experts()
    choices.argmax_and_margin(zeros(4, 151936), tokens, steps, steps)
    choices.likeliest_tokens(zeros(4, 151936), zeros(4, 8, dtype=torch.int32))
    choices.accept_greedy(tokens, tokens, tokens[:1], tokens[:1])
    for kind in (torch.int8, torch.float8_e4m3fn) if CAPABILITY >= 89 else (torch.int8,):
        codes = zeros(4, 4096, dtype=kind)
        eight_bit.quantize_rows(x, codes, steps)
        elementwise.rms_norm_residual(x, x, x[0], 1e-6, codes, steps)
        elementwise.silu_multiply_rounded(zeros(4, 8192), codes, steps)
        eight_bit.multiply_w8a8(codes, steps, zeros(256, 4096, dtype=kind), zeros(256, dtype=torch.float32), out)


def launch_experts() -> None:
    """At the sizes of Qwen3-30B-A3B: hidden 2048, inner 768, 8 of 128 experts."""
    from quasar_core.kernels.triton import products, routed, routing

    hidden, inner, experts, count = 2048, 768, 128, 8
    for bits, tokens in product((16, 4, 8), (4, 40)) if EVERY else ((16, 4), (4, 40)):
        gate_up, down = (routed_of(bits, *sizes, experts, count) for sizes in ((hidden, 2 * inner), (inner, hidden)))
        places = tokens * count
        chosen = zeros(tokens, count, dtype=torch.int32)
        routed.multiply_routed(zeros(tokens, hidden), gate_up, chosen, zeros(places, inner), gated=True)
        rows = zeros(places, hidden, dtype=torch.float32)
        routed.multiply_routed(zeros(places, inner), down, chosen, rows)
    x, scores, chosen = zeros(4, hidden), zeros(4, experts, dtype=torch.float32), zeros(4, count, dtype=torch.int32)
    products.multiply_dense(x, zeros(experts, hidden), scores)
    last, shares = zeros(1, dtype=torch.int64), zeros(4, count + 1, dtype=torch.float32)
    routing.choose_experts(scores, "chosen", chosen, shares[:, :count], last)
    if EVERY:
        more = {"x": x, "gate": x[:1], "correction": scores[0], "normalised": True, "scale": 2.5}
        for kind in ("softmax", "sigmoid"):
            routing.choose_experts(scores, kind, chosen, shares, last, **more)
    routing.add_experts(zeros(4 * count, hidden, dtype=torch.float32), chosen, shares, x, always=x)


def routed_of(bits: int, inputs: int, outputs: int, experts: int, count: int) -> Any:
    """Experts that all lie in one place."""
    from quasar_core.kernels.triton.routed import routed_weight

    codes = random_codes(bits, inputs, outputs, 128, symmetric=True) if bits < 16 else None
    return routed_weight([prepare_packed(codes, CPU, tight=True) if codes else zeros(outputs, inputs)] * experts, count)


if __name__ == "__main__":
    main()
