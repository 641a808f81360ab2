"""The size of groups: the largest that divides the inputs of every layer, unless one is asked for.

Loaders that make room for inputs ÷ group scales refuse a last group that is cut short (`checkpoint/loaders.py`).
"""

from collections.abc import Mapping
from dataclasses import replace

from quasar_core.checkpoint.fused_names import listed_layers
from quasar_core.checkpoint.headers import StoredLayer
from quasar_core.checkpoint.loaders import LOADERS, Config, Verdict
from quasar_core.config import GROUP_CHOICES, QuantizeConfig
from quasar_core.quantize.layer_plan import HEAD, LayerPlan

Sizes = Mapping[str, tuple[int, int]]  # of layers by name: outputs, inputs


def settle_group_size(config: QuantizeConfig, sizes: Sizes) -> tuple[QuantizeConfig, str | None]:
    """The config with its group size, and a sentence on it: how it was chosen, and which loaders it keeps out."""
    if config.method != "gptq":
        return replace(config, group_size=-1), None
    dividing = largest_dividing(sizes)
    settled = replace(config, group_size=config.group_size or dividing or GROUP_CHOICES[0])
    said = [] if config.group_size else [_how_chosen(settled.groups_of, dividing)]
    other = dividing or -1
    refused = refused_groups(settled, replace(settled, group_size=other), sizes)
    if refused:
        said.append(
            f"Groups of {settled.group_size} are refused by {_listed(list(refused))}: {next(iter(refused.values()))}. "
            f"With --group-size {other} they load the checkpoint."
        )
    return settled, " ".join(said) or None


def largest_dividing(sizes: Sizes) -> int | None:
    """The largest of `GROUP_CHOICES` that divides the inputs of every layer."""
    return next((g for g in GROUP_CHOICES if all(inputs % g == 0 for _, inputs in sizes.values())), None)


def refused_groups(config: QuantizeConfig, other: QuantizeConfig, sizes: Sizes) -> dict[str, str]:
    """The loaders that refuse a config's checkpoint and take the other one's, each with the reason."""
    ours, others = _verdicts(config, sizes), _verdicts(other, sizes)
    return {name: ours[name].reason for name in LOADERS if ours[name].refused and not others[name].refused}


def _verdicts(config: QuantizeConfig, sizes: Sizes) -> dict[str, Verdict]:
    plan, usual = LayerPlan.of(config), config.groups_of
    head = {"lm_head$": {"bits": plan.solver(HEAD).bits}}
    section = {"bits": config.bits, "group_size": usual, "sym": config.sym, "dynamic": head}
    told = Config.of({**section, "modules_in_block_to_quantize": listed_layers(list(sizes))})
    layers = [
        StoredLayer(name, inputs, outputs, plan.solver(name).bits, usual) for name, (outputs, inputs) in sizes.items()
    ]
    return {name: judge(layers, told) for name, judge in LOADERS.items()}


def _how_chosen(size: int, dividing: int | None) -> str:
    choices = _listed([str(choice) for choice in GROUP_CHOICES])
    if dividing is None:
        return f"Groups of {size} inputs share a scale: none of {choices} divides the inputs of every layer."
    return f"Groups of {size} inputs share a scale: the largest of {choices} that divides the inputs of every layer."


def _listed(words: list[str]) -> str:
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])
