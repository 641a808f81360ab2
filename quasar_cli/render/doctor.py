"""What `doctor` found."""

from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from quasar_cli.render import as_bytes, facts_table, text_table
from quasar_cli.render.verifiers import speed_tables


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
        ("memory", as_bytes(findings["memory_bytes"])),
        ("GPU", _gpu(gpu) if gpu else "none that CUDA reaches"),
        ("read bandwidth", f"{as_bytes(findings['read_bandwidth_bytes_per_s'])}/s measured on {findings['device']}"),
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
