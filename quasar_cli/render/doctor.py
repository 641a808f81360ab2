"""Draw what `doctor` found: the machine, the kernels, and verifiers with their passes, floors and expected rates."""

from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from quasar_cli.render import as_bytes, as_ratio, facts_table, text_table

_TOKENS = "1, 4, 8"


def speed_tables(speed: dict[str, Any]) -> list[RenderableType]:
    """The target's passes and every verifier's; or why there is nothing to show."""
    if "unknown" in speed:
        return [Text(f"Speed: {speed['unknown']}")]
    title = f"Passes of {_TOKENS} tokens and tokens/s to expect; {speed['dtype']} on {speed['device']}"
    table = text_table(title, "model", "ms", "floor", "plain or quantized", "exact", "agreement", "how it is known")
    for column in table.columns[1:6]:
        column.justify = "right"
    target = speed["target"]
    rates = f"{speed['plain']:.1f}", f"{speed['full']:.1f} (full)"
    table.add_row("target", *_pass(target), *rates, "–", target["source"])
    for verifier in speed["verifiers"]:
        exact = as_ratio(verifier["exact"], 1)
        table.add_row(
            escape(verifier["name"]),
            *_pass(verifier["passes"]),
            f"{verifier['quantized']:.1f}",
            f"≥ {exact}" if verifier["exact_is_bound"] else exact,
            as_ratio(verifier["agreement"], 3),
            escape(f"{verifier['passes']['source']}; {verifier['passes']['products']}"),
        )
    best = {"quantized": speed["best_quantized"], "exact": speed["best_exact"]}
    said = "; ".join(f"{mode}: {name}" for mode, name in best.items() if name)
    return [table, Text(f"Best here, at a typical acceptance of n-gram drafts: {said or 'no verifier was measured'}")]


def _pass(figures: dict[str, Any]) -> tuple[str, str]:
    """Milliseconds of passes, and their memory floor; passes whose weights lie in caches may be faster than that."""
    floor = figures["floor_ms"]
    in_cache = " (in cache)" if floor is not None and min(figures["ms"]) < floor else ""
    return ", ".join(f"{ms:.3g}" for ms in figures["ms"]), as_ratio(floor) + in_cache


def findings_tables(findings: dict[str, Any]) -> list[RenderableType]:
    """The machine, the packages, the kernels and the pair."""
    gpu, pair = findings["gpu"], findings["current_pair"]
    features = ", ".join(findings["cpu"]["features"]) or "features unknown"
    absent = [name for name, found in findings["optional_packages"].items() if found is None]
    present = {name: found for name, found in findings["optional_packages"].items() if found}
    facts = [
        ("python", f"{findings['python']} on {findings['platform']}"),
        ("packages", _versions(findings["packages"])),
        ("optional packages", _versions(present) or "none"),
        ("not installed", ", ".join(absent) or "none"),
        ("processor", f"{findings['cpu']['name']}; {features}"),
        ("memory", as_bytes(findings["memory_bytes"]) if findings["memory_bytes"] else "unknown"),
        ("GPU", _gpu(gpu) if gpu else "none that CUDA reaches"),
        ("read bandwidth", f"{as_bytes(findings['read_bandwidth_bytes_per_s'])}/s measured on {findings['device']}"),
        ("passes in C++", findings["cpp"]),
        ("quantizer's loops", findings["quantizer_loops"]),
        ("home", findings["home"]),
        (
            "current pair",
            f"{pair['name']} ({pair['target']})" if pair else "none; make one with `quasar quantize MODEL`",
        ),
    ]
    if findings["pair_memory"]:
        facts.append(("pair's memory", findings["pair_memory"]))
    speed = speed_tables(findings["speed"]) if findings["speed"] else []
    return [facts_table(facts), _kernels_table(findings), *speed]


def _kernels_table(findings: dict[str, Any]) -> Table:
    table = text_table(f"Kernels on {findings['device']}", "kernel", "usable", "why")
    for kernel in findings["kernels"]:
        table.add_row(escape(kernel["name"]), "yes" if kernel["usable"] else "no", escape(kernel["reason"]))
    return table


def _versions(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {found}" for name, found in packages.items())


def _gpu(gpu: dict[str, Any]) -> str:
    memory, capability = as_bytes(gpu["memory_bytes"]), gpu["compute_capability"]
    return f"{gpu['name']}, {memory}, compute capability {capability}, CUDA {gpu['cuda']}"
