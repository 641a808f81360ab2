"""The chapter of a run's conditions, and the list of its arms, as HTML."""

from collections.abc import Sequence
from html import escape
from typing import Any

from quasar_core.bench.arms import ARMS, TWIN
from quasar_core.bench.metrics.conditions import conditions
from quasar_core.bench.metrics.estimates import Estimate
from quasar_core.bench.report.cells import interval
from quasar_core.bench.report.html import number, tag
from quasar_core.bench.results import Results, Row, temperatures


def conditions_chapter(results: Results) -> tuple[str, str, str]:
    """What ran, where, and what else the machine did."""
    run, found, config = results.run, conditions(results), results.run.config
    often = "once" if config.repeats == 1 else f"{config.repeats} times"
    settings = f"{temperatures(run)}, at most {config.max_new_tokens} tokens, each question {often}, seed {config.seed}"
    asked = (_questions(name, facts) for name, facts in run.datasets.items())
    said = [
        ("Model", run.model),
        ("Verifier", run.verifier or "none"),
        ("Machine", f"{run.device}, {run.dtype}"),
        ("Settings", settings),
        ("Questions", "; ".join(asked)),
        ("Other programs", _load(results)),
        ("Clock", "{:.0f} to {:.0f} MHz".format(*found.mhz) if found.mhz else "not told by the system"),
        ("Energy", found.energy or "not told: no counter (RAPL, NVML) can be read"),
        ("Bandwidth", number(run.bandwidth / 1e9 if run.bandwidth else None, 1, " GB/s")),
        ("Identical arms", _twins(found.twins, found.twins_agree)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
        ("Code", run.git or "installed, commit not known"),
        *((f"Peer {arm}", version) for arm, version in run.peers.items()),
        *(
            (f"Failed: {row.arm}", f"{row.dataset}, question {row.question_id}: {row.error}")
            for row in _failed(results)
        ),
    ]
    return "conditions", "Conditions", facts(said)


def facts(named: Sequence[tuple[str, str]]) -> str:
    """A list of names with their values."""
    return tag("dl", "".join(tag("dt", escape(name)) + tag("dd", escape(value)) for name, value in named))


def arms_list(names: Sequence[str]) -> str:
    """What each arm is, with its heading."""
    return tag("h3", "The arms") + facts([(name, describe_arm(name)) for name in names])


def describe_arm(name: str) -> str:
    """What an arm is, and whose text it writes."""
    arm = ARMS[name]
    if name == TWIN:
        return "vanilla once more, on every fourth question, to see the noise"
    if arm.is_peer:
        return f"{_PEERS[name]}, in a process of its own"
    if arm.draft == "none":
        return _ALONE.get(arm.verify, arm.verify)
    drafts = _DRAFTS.get(arm.draft, f"drafts of {arm.draft}") + ("" if arm.trees else " without branches")
    return f"{drafts}; {_CHECKED.get(arm.verify, arm.verify)}"


_PEERS = {
    "transformers": "transformers’ generate, plain",
    "transformers-pld": "transformers’ generate with prompt lookup",
    "transformers-assisted": "transformers’ generate with a small model that drafts",
    "llama.cpp": "llama.cpp’s server, plain",
    "llama.cpp-spec": "llama.cpp’s server with its own drafts",
    "vllm": "vLLM’s engine, plain",
    "vllm-ngram": "vLLM’s engine with its n-gram drafts",
    "vllm-draft": "vLLM’s engine with a small model that drafts",
}
_ALONE = {
    "full": "the full-precision model, a token a pass: plain decoding",
    "quantized": "the low-bit copy, a token a pass: the copy’s text",
}
_DRAFTS = {
    "ngram": "n-gram drafts",
    "auto": "drafts by all drafters that pay",
    "suffix": "drafts of the suffix automaton",
    "recycle": "drafts from what earlier passes computed",
    "assistant": "drafts of a small model",
    "layer-skip": "drafts of the model without some of its blocks",
}
_CHECKED = {
    "full": "the full-precision model checks them: its own text",
    "quantized": "the low-bit copy checks them: the copy’s text, not the full-precision model’s",
    "gated": "the low-bit copy checks them, the full-precision model what the copy is not sure of: nearly its own text",
    "exact": "the low-bit copy checks them, the full-precision model confirms, or checks some itself: its own text",
}


def _questions(name: str, facts: dict[str, Any]) -> str:
    read = f", read from {facts['source']}" if facts.get("source") else ""
    return f"{name}: {facts['questions']}, digest {facts['sha256'][:12]}{read}"


def _load(results: Results) -> str:
    found = conditions(results)
    if found.others is None or found.most_others is None:
        return "not told by the system"
    shares = f"took {100 * found.others:.0f} % of the cores, at most {100 * found.most_others:.0f} %"
    return f"{shares}; busy in {found.busy} answers"


def _twins(twins: Estimate | None, agree: bool | None) -> str:
    if twins is None:
        return "not asked"
    said = {True: "they agree", False: "they differ", None: "too few questions to tell"}[agree]
    return f"{twins.value:.3f}× ({interval(twins)}, {twins.questions} questions): {said}"


def _failed(results: Results) -> list[Row]:
    """The first failure of each arm."""
    return list({row.arm: row for row in reversed(results.errors)}.values())
