"""Note which of the given options have no effect beside the others: one sentence each, never silence.

What would mislead (`--draft none --draft-from FILE`) is refused by the configs; what only has no effect is noted here,
for every command alike. An option counts as given where its value is not the usual one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quasar_cli import console

Given = Mapping[str, Any]  # the values of all options of a command, by their parameters' names
EIGHT_BITS = ("w8a8", "fp8")


@dataclass(frozen=True)
class Idle:
    """Options that do nothing where `when` holds, and why not."""

    options: tuple[str, ...]
    when: Callable[[Given], bool]
    why: str


DECODING = (
    Idle(("fidelity",), lambda given: given["verify"] != "gated", "it is for --verify gated"),
    Idle(
        ("window",), lambda given: given["verify"] in ("full", "quantized"), "nothing waits but in exact and in gated"
    ),
    Idle(("kernel", "verifier_attention"), lambda given: given["verify"] == "full", "--verify full runs no verifier"),
    Idle(("ngram_max", "ngram_min"), lambda given: given["draft"] != "ngram", "it is for --draft ngram"),
    Idle(("num_draft_tokens", "trees"), lambda given: given["draft"] == "none", "with --draft none nothing is drafted"),
    Idle(
        ("trees",),
        lambda given: given["draft"] != "none" and given["num_draft_tokens"] != "auto",
        "drafts of a fixed length are chains",
    ),
    Idle(("fast",), lambda given: given["device"] == "cpu", "it is for GPUs"),
)
SAMPLING = (
    Idle(
        ("top_k", "top_p", "min_p", "seed"),
        lambda given: given["temperature"] == 0,
        "nothing is drawn at --temperature 0",
    ),
)
SHOWING = (
    Idle(("think",), lambda given: not given.get("chat", True), "--raw goes past the chat template"),
    Idle(("stream",), lambda given: given["as_json"] or given.get("trace") == "-", "the answer is printed at its end"),
    Idle(
        ("show_unconfirmed",),
        lambda given: given["verify"] in ("full", "quantized"),
        "nothing waits for a confirm but in exact and in gated",
    ),
)
QUANTIZING = (
    Idle(
        ("private",),
        lambda given: given["push_to_hub"] is None and not given["successors"],
        "nothing is uploaded without --push-to-hub",
    ),
    Idle(
        ("damp", "act_order"),
        lambda given: given["method"] in EIGHT_BITS and given["rounding"] == "nearest",
        "with --rounding nearest every weight is rounded on its own",
    ),
    Idle(
        (
            *("bits", "mixed", "target_agreement", "widths", "group_size", "sym", "act_order", "method", "rounding"),
            *("lm_head_bits", "damp", "backend", "force", "resume", "push_to_hub", "private", "max_memory"),
        ),
        lambda given: given["successors"],
        "--successors only adds a file to a verifier that is there",
    ),
)
STEPS = (
    Idle(
        ("layers", "method", "bits", "group_size", "lm_head_bits"),
        lambda given: given["shape"] is None,
        "it is for the random weights of --shape",
    ),
    Idle(("verifier",), lambda given: given["shape"] is not None, "--shape makes a verifier of its own"),
)


def _no_arm(has: Callable[[Any], bool]) -> Callable[[Given], bool]:
    """Whether no arm of the bench is such a one."""
    from quasar_core.bench.arms import parse_arms

    return lambda given: not any(has(arm) for arm in parse_arms(given["arms"]))


def _bench() -> tuple[Idle, ...]:
    waits, asks = ("exact", "gated"), ("transformers-assisted", "vllm-draft")
    return (
        Idle(("fidelity",), _no_arm(lambda arm: arm.verify == "gated"), "it is for the arm gated"),
        Idle(("window",), _no_arm(lambda arm: arm.verify in waits), "in no arm do tokens wait for a confirm"),
        Idle(("verifier", "kernel"), _no_arm(lambda arm: arm.needs_verifier), "no arm runs the verifier"),
        Idle(
            ("num_draft_tokens",),
            _no_arm(lambda arm: not arm.is_peer and arm.draft != "none"),
            "no arm of our own drafts",
        ),
        Idle(("draft_from",), _no_arm(lambda arm: arm.draft not in ("none", "ngram")), "no arm drafts from texts"),
        Idle(
            ("assistant",),
            _no_arm(lambda arm: arm.draft == "assistant" or arm.name in asks),
            "no arm asks a small model",
        ),
        Idle(("gguf", "llama_server"), _no_arm(lambda arm: arm.name.startswith("llama.cpp")), "no arm is llama.cpp's"),
        Idle(("spec_type",), _no_arm(lambda arm: arm.name == "llama.cpp-spec"), "it is for the arm llama.cpp-spec"),
        Idle(("vllm_python",), _no_arm(lambda arm: arm.name.startswith("vllm")), "no arm is vLLM's"),
        Idle(("check_noise",), _no_arm(lambda arm: arm.name == "vanilla"), "only the arm vanilla is asked again"),
        Idle(
            ("seed",),
            lambda given: given["profile"] != "paper" and set((given["temperature"] or "0").split(",")) <= {"0", "0.0"},
            "nothing is drawn at --temperature 0",
        ),
    )


def note_idle_options(given: Given, usual: Given) -> None:
    """Say on stderr which options, of those that have not their usual value, do nothing, and why."""
    for idle in _rules(given):
        flags = [_flag(name, given[name]) for name in idle.options if name in given and given[name] != usual[name]]
        if flags and idle.when(given):
            do = "does" if len(flags) == 1 else "do"
            console.note_plain(f"note: {' and '.join(flags)} {do} nothing here: {idle.why}")


def _rules(given: Given) -> Iterator[Idle]:
    """The rules of the command that has these options."""
    if "draft" in given:
        yield from DECODING
    if "draft" in given and "port" not in given:  # a request to a server has a temperature of its own
        yield from SAMPLING
        yield from SHOWING
    if "push_to_hub" in given:
        yield from QUANTIZING
    if "shape" in given:
        yield from STEPS
    if "arms" in given and given["context"].invoked_subcommand is None:
        yield from _bench()
    elif "arms" in given:
        command = given["context"].invoked_subcommand
        everything = tuple(name for name in given if name != "context")
        yield Idle(everything, lambda _: True, f"`bench {command}` has options of its own, which stand behind its name")


def _flag(name: str, value: Any) -> str:
    """The option as it was typed."""
    words = "json" if name == "as_json" else name.replace("_", "-")
    if name == "use_target":
        words = "target"
    return f"--no-{words}" if value is False else f"--{words}"
