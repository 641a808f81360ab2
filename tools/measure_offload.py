"""Measure `exact` beside plain decoding where memory holds half of the target: equal text, speed, floor, peak memory.

    python -m tools.measure_offload MODEL VERIFIER [--share 0.5] [--limit SIZE] [--tokens 64] [--output FILE]
    python -m tools.measure_offload MODEL VERIFIER --round

Every arm is a process of its own in a control group whose limit is `--share` of the target's bytes plus the verifier's
files: `plain` (the target alone, no drafts) and `exact`, both streaming what does not fit, and `exact` and `plain`
without a limit as a reference. Where no control group can be made the limit is given as --max-memory, and that is said.
The floor of an arm is what its passes must read ÷ the disk's bandwidth, measured before by the same reads, + the time
of its verify passes. With `--round` VERIFIER is made first: every layer rounded to 4 bits, for models whose quantizing
would take long. Run it on a machine that does nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from quasar_core import api
from quasar_core.checkpoint.gptq_format import QuantizedWeight, trivial_groups
from quasar_core.checkpoint.reader import TensorFiles
from quasar_core.checkpoint.writer import ShardWriter, copy_kept_files
from quasar_core.config import GenerationConfig
from quasar_core.files import write_json
from quasar_core.models.streaming import PIECE_BYTES, LayerStream, OpenFile
from quasar_core.quantize.solve.grid import fit_grid, round_to_nearest
from quasar_core.store.model_config import read_config
from quasar_core.store.safetensors_header import weight_files

GROUPS = Path("/sys/fs/cgroup")
PROMPTS = (
    "Write a function `read_lines` that reads a file and returns its lines.",
    "Write a function `count_lines` that counts the lines of a file.",
    "Explain why the sky is blue.",
    "List five facts about steam engines.",
)
ARMS = {"plain": ("full", "none"), "exact": ("exact", "auto")}
BITS, GROUP = 4, 128
TESTED_BYTES = 2 << 30  # of the file that the disk's bandwidth is measured by


def main() -> None:
    """Run one arm where `--arm` names it; else all, each in a process and a group of its own."""
    options = parse()
    if options.round:
        round_model(options.model, options.verifier)
    elif options.arm:
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
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--max-context", type=int, default=1024)
    parser.add_argument("--arms", default="plain,exact")
    parser.add_argument("--no-reference", action="store_true", help="leave the arms without a limit out")
    parser.add_argument("--output", type=Path, help="a JSON file for all figures")
    parser.add_argument("--round", action="store_true", help="make VERIFIER by rounding, and end")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--max-memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--all-in-memory", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


# One arm


def run_arm(options: argparse.Namespace) -> dict[str, Any]:
    """Answers of one arm: their tokens, seconds, passes, and the process's memory."""
    verify, draft = ARMS[options.arm]
    pair = api.load_pair(
        str(options.model),
        str(options.verifier),
        verify=verify,
        max_context=options.max_context,
        offload="none" if options.all_in_memory else "auto",
        max_memory=options.max_memory,
    )
    generator = api.Generator(pair, GenerationConfig(options.tokens, verify, draft))
    source = getattr(pair.target, "source", None)
    reading = source.pass_bytes if isinstance(source, LayerStream) else 0
    answers = []
    for prompt in PROMPTS[: options.prompts]:
        result = generator.generate(api.encode_prompt(pair.tokenizer, prompt))
        stats = result.stats
        by_target = sum(step.by_target and step.seconds > 0 for step in stats.step_log)
        passes = stats.steps if verify == "full" else len(stats.confirm_log) + by_target
        answers.append(
            {
                "tokens": result.token_ids,
                "decode_s": stats.decode_s,
                "prefill_s": stats.prefill_s,
                "verify_s": stats.verify_s if verify == "exact" else 0.0,
                "target_passes": passes,
                "verify_passes": len(stats.step_log) - by_target if verify == "exact" else 0,
                "windows": [confirm.window for confirm in stats.confirm_log],
            }
        )
    notes = [note for note in pair.notes if note.startswith(("offload:", "exact:", "cost:"))]
    return {"answers": answers, "pass_bytes": reading, "notes": notes, "resident_peak": resident_peak()}


def resident_peak() -> dict[str, int]:
    """The most that this process held, and what of it is no file's now, as the kernel counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "RssAnon"))}
    return {"peak": found["VmHWM"], "anonymous_at_end": found["RssAnon"]}


# All arms


def compare(options: argparse.Namespace) -> None:
    """Run every arm and print the table."""
    files = {name: sum(file.stat().st_size for file in weight_files(folder)) for name, folder in folders(options)}
    limit = api.parse_bytes("--limit", options.limit) if options.limit else None
    limit = limit or int(options.share * files["target"] + files["verifier"])
    bandwidth = disk_bandwidth(max(weight_files(options.model), key=lambda file: file.stat().st_size))
    print(
        f"target {files['target'] / 1e9:.2f} GB, verifier {files['verifier'] / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB"
    )
    print(f"disk {bandwidth / 1e9:.2f} GB/s in reads of {PIECE_BYTES >> 20} MiB, each dropped from the page cache")
    found: dict[str, Any] = {"limit": limit, "bandwidth": bandwidth, "files": files, "arms": {}}
    for arm in options.arms.split(","):
        found["arms"][arm] = in_group(options, arm, limit)
        if not options.no_reference:
            found["arms"][f"{arm}, no limit"] = in_group(options, arm, None)
    show(found)
    if options.output:
        write_json(options.output, found)


def folders(options: argparse.Namespace) -> list[tuple[str, Path]]:
    """Both models' folders by their roles."""
    return [("target", options.model), ("verifier", options.verifier)]


def disk_bandwidth(file: Path) -> float:
    """Bytes a second of reading a file from its beginning as blocks are read."""
    size = min(file.stat().st_size, TESTED_BYTES)
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    opened, buffer = OpenFile(file), memoryview(bytearray(64 << 20))
    start = time.perf_counter()
    for begin in range(0, size, len(buffer)):
        opened.read(begin, buffer[: size - begin])
    return size / (time.perf_counter() - start)


def in_group(options: argparse.Namespace, arm: str, limit: int | None) -> dict[str, Any]:
    """An arm's figures, from a process of its own within the limit; what the kernel counted beside them."""
    command = [sys.executable, "-m", "tools.measure_offload", str(options.model), str(options.verifier), "--arm", arm]
    command += ["--tokens", str(options.tokens), "--prompts", str(options.prompts)]
    command += ["--max-context", str(options.max_context)]
    if limit is None:
        return finished(subprocess.run([*command, "--all-in-memory"], capture_output=True, text=True))
    with control_group(limit) as group:
        if group is None:
            print(f"no control group can be made here: --max-memory {limit} stands in", file=sys.stderr)
            return finished(subprocess.run([*command, "--max-memory", str(limit)], capture_output=True, text=True))
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=joining(group))
        return {**finished(done), "group": counted(group)}


def finished(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    """What a process printed, or an end with what it said."""
    if done.returncode:
        sys.exit(f"an arm ended with {done.returncode}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@contextmanager
def control_group(limit: int) -> Iterator[Path | None]:
    """A new control group of version 1 or 2 with this limit; None where the machine does not let us make one."""
    top = GROUPS / "memory" if (GROUPS / "memory").is_dir() else GROUPS
    group = top / f"quasar-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.max" if top == GROUPS else "memory.limit_in_bytes")).write_text(str(limit))
    except OSError:
        if group.is_dir():
            group.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def joining(group: Path) -> Callable[[], None]:
    """Runs in the new process: it enters the group before it is another program."""

    def join() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    return join


def counted(group: Path) -> dict[str, int]:
    """The most that the group held, pages of files included, and how often it met its limit."""
    names = {"peak": ("memory.peak", "memory.max_usage_in_bytes"), "met_limit": ("memory.failcnt",)}
    found = {}
    for name, files in names.items():
        for file in files:
            if (group / file).is_file():
                found[name] = int((group / file).read_text())
    return found


def show(found: dict[str, Any]) -> None:
    """A line for each arm, and whether all texts are equal."""
    arms = found["arms"]
    print(
        f"{'arm':<18}{'tokens/s':>10}{'÷ plain':>9}{'÷ floor':>9}{'passes':>8}{'GB/pass':>9}{'peak GB':>9}{'group':>8}"
    )
    plain = arms.get("plain")
    for name, arm in arms.items():
        speed, floor = rate(arm), floor_seconds(arm, found["bandwidth"])
        seconds = sum(answer["decode_s"] for answer in arm["answers"])
        passes = sum(answer["target_passes"] for answer in arm["answers"])
        gain = f"{speed / rate(plain):>9.2f}" if plain else f"{'':>9}"
        against = f"{seconds / floor:>9.2f}" if arm["pass_bytes"] else f"{'':>9}"
        group = f"{arm['group']['peak'] / 1e9:>8.2f}" if "group" in arm else ""
        peak = arm["resident_peak"]["peak"] / 1e9
        print(f"{name:<18}{speed:>10.2f}{gain}{against}{passes:>8}{arm['pass_bytes'] / 1e9:>9.2f}{peak:>9.2f}{group}")
    texts = {json.dumps([answer["tokens"] for answer in arm["answers"]]) for arm in arms.values()}
    print("all texts are equal" if len(texts) == 1 else f"TEXTS DIFFER: {len(texts)} kinds")
    for name, arm in arms.items():
        for note in arm["notes"]:
            print(f"- {name}: {note}")


def rate(arm: dict[str, Any]) -> float:
    """Tokens a second of decoding, the prompt and its first token left out."""
    seconds = sum(answer["decode_s"] for answer in arm["answers"])
    return float(sum(len(answer["tokens"]) - 1 for answer in arm["answers"]) / seconds)


def floor_seconds(arm: dict[str, Any], bandwidth: float) -> float:
    """What decoding must take: bytes of its target passes ÷ the disk's bandwidth, and its verify passes."""
    passes = sum(answer["target_passes"] for answer in arm["answers"])
    return float(passes * arm["pass_bytes"] / bandwidth + sum(answer["verify_s"] for answer in arm["answers"]))


# A verifier by rounding


def round_model(model: Path, verifier: Path) -> None:
    """Write a checkpoint whose layers are rounded to the nearest of 4 bits in groups of 128."""
    verifier.mkdir(parents=True)
    files, writer = TensorFiles(model), ShardWriter(verifier)
    for name in files.names():
        weight = files.load(name)
        if not name.endswith("_proj.weight"):
            writer.add(name, weight)
            continue
        for part, tensor in rounded(weight.float()).pack().items():
            writer.add(f"{name.removesuffix('weight')}{part}", tensor)
    writer.close()
    copy_kept_files(model, verifier)
    section = {"quant_method": "gptq", "bits": BITS, "group_size": GROUP, "checkpoint_format": "gptq", "sym": True}
    write_json(verifier / "config.json", {**read_config(model), "quantization_config": section})


def rounded(weight: torch.Tensor) -> QuantizedWeight:
    """The codes of a weight [out, in]."""
    grid = fit_grid(weight, BITS, GROUP, sym=True, search=False)
    groups = trivial_groups(weight.shape[1], GROUP)
    codes = round_to_nearest(weight, grid, groups.long())
    tensors: Sequence[torch.Tensor] = (codes.to(torch.uint8), grid.scales.half(), grid.zeros.int())
    return QuantizedWeight(BITS, GROUP, *(tensor.t().contiguous() for tensor in tensors), groups)


if __name__ == "__main__":
    main()
