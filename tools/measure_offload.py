"""Measure `exact` beside plain decoding where memory holds half of the target: equal text, speed, floor, peak memory.

    python -m tools.measure_offload MODEL VERIFIER [--share 0.5] [--limit SIZE] [--rate 500MB] [--compress]

Every arm is a process of its own in a control group whose limit is `--share` of the target's bytes plus the verifier's
files: `plain` (the target alone, no drafts) and `exact`, both streaming what does not fit, and both without a limit as
a reference. With `--beside-interpreter` the limit is that and what Python with its packages holds before any weight,
which is more than a small model. Where no control group can be made the limit is given as --max-memory, and that is
said. `--rate` slows the reader down to a disk of so many bytes a second; `--compress` streams the blocks in 12 bits.

The floor of an arm is what it read ÷ the disk's bandwidth, measured before and after by the same reads (the faster
counts), + the time of its verify passes. Plain decoding takes as long for each token, so a few are enough of it
(`--plain-tokens`); its text must be what the other arms' text begins with.

Below the table stands what bounds `exact`: how often the target took the verifier's word, how many verifies a confirm
is, and the most that windows without drafts can gain by these two. A large model and a verifier of measured margins are
made by `tools.demo.grow` and `tools.demo.grow_verifier`. Run it on a machine that does nothing else.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

from quasar_cli.options import parse_bytes
from quasar_core.api import decoding
from quasar_core.config import GenerationConfig, VerifyMode
from quasar_core.decode.policy.window_values import LONGER_WINDOWS
from quasar_core.files import write_json
from quasar_core.kernels.cpu.library import why_not_here
from quasar_core.models.weights.compressed_files import make_copy
from quasar_core.models.weights.streaming import LayerStream
from quasar_core.models.weights.weight_reads import OpenFile
from quasar_core.page_cache import forget_file
from quasar_core.store.safetensors_header import weight_files
from tools.control_group import ControlGroup, control_group
from tools.slow_disk import slow_down

PROMPTS = (
    "Write a function `read_lines` that reads a file and returns its lines.",
    "Write a function `count_lines` that counts the lines of a file.",
    "Explain why the sky is blue.",
    "List five facts about steam engines.",
)
ARMS: dict[str, tuple[VerifyMode, str]] = {"plain": ("full", "none"), "exact": ("exact", "auto")}
TESTED_BYTES = 1 << 30  # of the file that the disk's bandwidth is measured by
WITHOUT = ", no limit"


def main() -> None:
    """Run one arm where `--arm` names it; else all, each in a process and a group of its own."""
    options = parse()
    if options.arm:
        print(json.dumps(run_arm(options)))
    else:
        compare(options)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("verifier", type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="of the target's bytes that fit beside the verifier")
    parser.add_argument("--limit", help="bytes of the group in place of --share, such as 900MB")
    parser.add_argument("--beside-interpreter", action="store_true", help="add what Python holds before any weight")
    parser.add_argument("--rate", help="bytes a second of a slower disk, such as 500MB; default: the disk's own")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--plain-tokens", type=int, help="of plain decoding within the limit; default: --tokens")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--max-context", type=int, default=1024)
    parser.add_argument("--arms", default="plain,exact")
    parser.add_argument("--no-reference", action="store_true", help="leave the arms without a limit out")
    parser.add_argument("--seconds", type=float, default=300, help="that an arm may take")
    parser.add_argument("--output", type=Path, help="a JSON file for all figures")
    parser.add_argument("--compress", action="store_true", help="stream the blocks in 12 bits, from a copy")
    parser.add_argument("--arm", choices=(*ARMS, "nothing"), help=argparse.SUPPRESS)
    parser.add_argument("--max-memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--all-in-memory", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


# One arm


def run_arm(options: argparse.Namespace) -> dict[str, Any]:
    """Answers of one arm: their tokens, seconds, passes and bytes, and the process's memory."""
    if options.arm == "nothing":
        return {"resident_peak": resident_peak()}
    if options.rate:
        slow_down(parse_bytes("--rate", options.rate))
    verify, draft = ARMS[options.arm]
    pair = decoding.load_pair(
        str(options.model),
        str(options.verifier),
        verify=verify,
        max_context=options.max_context,
        offload="none" if options.all_in_memory else "auto",
        max_memory=options.max_memory,
        compress=None if options.all_in_memory else options.compress,
    )
    generator = decoding.Generator(pair, GenerationConfig(options.tokens, verify, draft))
    source = getattr(pair.target, "source", None)
    stream = source if isinstance(source, LayerStream) else None
    answers = [answer(generator, pair, prompt, stream) for prompt in PROMPTS[: options.prompts]]
    notes = [note for note in pair.notes if note.startswith(("offload:", "exact:", "cost:"))]
    return {
        "answers": answers,
        "pass_bytes": stream.pass_bytes if stream else 0,
        "read_at": stream.bandwidth if stream else 0.0,
        "notes": notes,
        "resident_peak": resident_peak(),
    }


def answer(generator: decoding.Generator, pair: Any, prompt: str, stream: LayerStream | None) -> dict[str, Any]:
    """One answer: its tokens, and what it took. The prompt's sweep is not counted among the bytes of decoding."""
    before = stream.bytes_read if stream else 0
    result = generator.generate(decoding.encode_prompt(pair.tokenizer, prompt))
    read = stream.bytes_read - before - stream.pass_bytes if stream else 0
    stats, verifies = result.stats, generator.config.verify == "exact"
    by_target = sum(step.by_target and step.seconds > 0 for step in stats.step_log)
    return {
        "tokens": result.token_ids,
        "decode_s": stats.decode_s,
        "prefill_s": stats.prefill_s,
        "verify_s": stats.verify_s if verifies else 0.0,
        "bytes": max(read, 0),
        "target_passes": len(stats.confirm_log) + by_target if verifies else stats.steps,
        "verify_passes": len(stats.step_log) - by_target if verifies else 0,
        "windows": [confirm.window for confirm in stats.confirm_log],
        "kept": [confirm.accepted for confirm in stats.confirm_log],
    }


def resident_peak() -> dict[str, int]:
    """The most that this process held, and what of it is no file's now, as the kernel counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "RssAnon"))}
    return {"peak": found["VmHWM"], "anonymous_at_end": found["RssAnon"]}


# All arms


def compare(options: argparse.Namespace) -> None:
    """Run every arm and print the table."""
    why_not_here()  # a compiler needs more memory than the arms, once
    if options.compress:
        make_copy(options.model)
    if options.rate:
        slow_down(parse_bytes("--rate", options.rate))
    files = {name: sum(file.stat().st_size for file in weight_files(folder)) for name, folder in folders(options)}
    limit, said = find_limit(options, files)
    print(f"target {files['target'] / 1e9:.2f} GB, verifier {files['verifier'] / 1e9:.2f} GB, limit {said}")
    found: dict[str, Any] = {"limit": limit, "rate": options.rate, "files": files, "arms": {}}
    disk = [disk_bandwidth(options.model)]
    for arm in options.arms.split(","):
        found["arms"][arm] = in_group(options, arm, limit)
        disk.append(disk_bandwidth(options.model))
        if not options.no_reference:
            found["arms"][arm + WITHOUT] = in_group(options, arm, None)
    found["bandwidths"], found["bandwidth"] = disk, max(disk)
    slowed = f", slowed down to {options.rate} a second" if options.rate else ""
    print(f"disk {'; '.join(f'{one / 1e9:.2f}' for one in disk)} GB/s as blocks are read{slowed}")
    show(found)
    if options.output:
        write_json(options.output, found)


def find_limit(options: argparse.Namespace, files: dict[str, int]) -> tuple[int, str]:
    """The bytes of the group, and what they are made of."""
    if options.limit:
        size = parse_bytes("--limit", options.limit)
        return size, f"{size / 1e9:.3f} GB"
    weights = int(options.share * files["target"] + files["verifier"])
    said = f"{weights / 1e9:.3f} GB"
    if not options.beside_interpreter:
        return weights, said
    nothing = in_group(options, "nothing", None)
    own = nothing["group"]["anonymous"] if "group" in nothing else nothing["resident_peak"]["anonymous_at_end"]
    return weights + own, f"{said} and {own / 1e9:.3f} GB that Python with its packages holds"


def folders(options: argparse.Namespace) -> list[tuple[str, Path]]:
    """Both models' folders by their roles."""
    return [("target", options.model), ("verifier", options.verifier)]


def disk_bandwidth(folder: Path) -> float:
    """Bytes a second of reading a model's largest file from its beginning as blocks are read."""
    file = max(weight_files(folder), key=lambda file: file.stat().st_size)
    size = min(file.stat().st_size, TESTED_BYTES)
    forget_file(file)
    opened, buffer = OpenFile(file), memoryview(bytearray(64 << 20))
    start = time.perf_counter()
    for begin in range(0, size, len(buffer)):
        opened.read(begin, buffer[: size - begin])
    return size / (time.perf_counter() - start)


def in_group(options: argparse.Namespace, arm: str, limit: int | None) -> dict[str, Any]:
    """An arm's figures, from a process of its own within the limit; what the kernel counted beside them."""
    command = arm_command(options, arm, limit)
    with control_group(limit) as group:
        if group is not None:
            return finished(*run_in(group, command, options.seconds))
    if limit is not None:
        print(f"no control group can be made here: --max-memory {limit} stands in", file=sys.stderr)
        command += ["--max-memory", str(limit)]
    return finished(subprocess.run(command, capture_output=True, text=True, timeout=options.seconds))


def run_in(
    group: ControlGroup, command: Sequence[str], seconds: float
) -> tuple["subprocess.CompletedProcess[str]", dict[str, int]]:
    """Run an arm in a group."""
    done, counted = group.run(command, seconds)
    return done, asdict(counted)


def arm_command(options: argparse.Namespace, arm: str, limit: int | None) -> list[str]:
    """What runs an arm."""
    command = [sys.executable, "-m", "tools.measure_offload", str(options.model), str(options.verifier), "--arm", arm]
    few = arm == "plain" and limit is not None and options.plain_tokens
    command += ["--tokens", str(options.plain_tokens if few else options.tokens), "--prompts", str(options.prompts)]
    command += ["--max-context", str(options.max_context)]
    command += ["--rate", options.rate] if options.rate else []
    command += ["--compress"] if options.compress else []
    return command + (["--all-in-memory"] if limit is None else [])


def finished(done: "subprocess.CompletedProcess[str]", counted: dict[str, int] | None = None) -> dict[str, Any]:
    """What a process printed, or an end with what it said."""
    if done.returncode:
        sys.exit(f"an arm ended with {done.returncode}:\n{done.stderr[-2000:]}\n{counted or ''}")
    result: dict[str, Any] = json.loads(done.stdout)
    return {**result, "group": counted} if counted else result


COLUMNS = ("tokens/s", "÷ plain", "÷ floor", "sweeps", "verifies", "GB/sweep", "peak GB", "no file's")


def show(found: dict[str, Any]) -> None:
    """A line for each arm, and whether all texts are equal."""
    arms = found["arms"]
    print(f"{'arm':<17}" + "".join(f"{name:>10}" for name in COLUMNS))
    for name, arm in arms.items():
        print(f"{name:<17}" + "".join(f"{cell:>10}" for cell in cells(arm, arms.get("plain"), found["bandwidth"])))
    print("peak: all that the kernel charged to the group, pages of files included; no file's: of it, sampled")
    if "exact" in arms and arms["exact"]["pass_bytes"]:
        print(describe_bound(arms["exact"], found["bandwidth"]))
    print(describe_texts(list(arms.values())))
    for name, arm in arms.items():
        for note in arm["notes"]:
            print(f"- {name}: {note}")


def cells(arm: dict[str, Any], plain: dict[str, Any] | None, bandwidth: float) -> list[str]:
    """The figures of one arm, as `COLUMNS` names them."""
    answers, group = arm["answers"], arm.get("group")
    seconds = sum(one["decode_s"] for one in answers)
    return [
        f"{rate(arm):.2f}",
        f"{rate(arm) / rate(plain):.2f}" if plain else "",
        f"{seconds / floor_seconds(arm, bandwidth):.2f}" if arm["pass_bytes"] else "",
        str(sum(one["target_passes"] for one in answers)),
        str(sum(one["verify_passes"] for one in answers)),
        f"{arm['pass_bytes'] / 1e9:.2f}",
        f"{(group or arm['resident_peak'])['peak'] / 1e9:.3f}",
        f"{group['anonymous'] / 1e9:.3f}" if group else "",
    ]


def describe_bound(arm: dict[str, Any], bandwidth: float) -> str:
    """What bounds a streaming arm of `exact`: agreement, and what a confirm costs."""
    answers = arm["answers"]
    confirms = [pair for one in answers for pair in zip(one["windows"], one["kept"], strict=True)]
    kept, refused = sum(kept for _, kept in confirms), sum(kept < window for window, kept in confirms)
    verify_s = sum(one["verify_s"] for one in answers) / max(sum(one["verify_passes"] for one in answers), 1)
    if not (kept and verify_s):
        return "exact: nothing was verified"
    agreement, ratio = kept / (kept + refused), arm["pass_bytes"] / bandwidth / verify_s
    tokens = sum(len(one["tokens"]) - 1 for one in answers) / sum(one["target_passes"] for one in answers)
    return (
        f"exact: {tokens:.1f} tokens a sweep, which takes as long as {ratio:.0f} verifies; the target took the "
        f"verifier's word at {agreement:.3f} of {kept + refused} places, so without drafts "
        f"{most_gained(agreement, ratio):.1f} × plain is the most"
    )


def most_gained(agreement: float, ratio: float) -> float:
    """How many times as fast as plain decoding the best window is.

    A cycle of W verifies and a confirm, which takes as long as `ratio` of them, gives 1 + p + … + p^W tokens.
    """
    longest = LONGER_WINDOWS[0][1]
    tokens = list(accumulate(agreement**n for n in range(longest + 1)))
    return max(count * ratio / (ratio + window) for window, count in enumerate(tokens))


def describe_texts(arms: Sequence[dict[str, Any]]) -> str:
    """Whether every answer begins with what the shortest one of its prompt says."""
    texts = list(zip(*([one["tokens"] for one in arm["answers"]] for arm in arms), strict=True))
    differing = sum(len({tuple(text[: min(map(len, same))]) for text in same}) > 1 for same in texts)
    if differing:
        return f"TEXTS DIFFER: in {differing} of {len(texts)} answers"
    return f"all texts are equal, as far as the shortest goes: {[min(map(len, same)) for same in texts]} tokens"


def rate(arm: dict[str, Any]) -> float:
    """Tokens a second of decoding, the prompt and its first token left out."""
    seconds = sum(answer["decode_s"] for answer in arm["answers"])
    return float(sum(len(answer["tokens"]) - 1 for answer in arm["answers"]) / seconds)


def floor_seconds(arm: dict[str, Any], bandwidth: float) -> float:
    """What decoding must take: the bytes that it read ÷ the disk's bandwidth, and its verify passes."""
    return float(sum(answer["bytes"] / bandwidth + answer["verify_s"] for answer in arm["answers"]))


if __name__ == "__main__":
    main()
