"""Write the tables of docs/architectures.md from the code's own: `python -m tools.architectures_table`."""

from collections.abc import Iterator
from pathlib import Path

from quasar_core.models.architectures import ARCHITECTURES
from quasar_core.models.architectures.row import BEFORE, BEHIND, Architecture, Mixture, Switch
from tools import paths_table

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
BEGIN, END = "<!-- made by tools/architectures_table.py -->\n", "<!-- end of it -->"


def table() -> str:
    """One row for each architecture: what it has beyond Llama's skeleton, in words and names of options."""
    rows = [f"| `{name}` ({row.models}) | {'; '.join(departures(row))} |" for name, row in ARCHITECTURES.items()]
    return "\n".join(["| architecture | beyond the skeleton |", "|---|---|", *rows]) + "\n"


def departures(row: Architecture) -> Iterator[str]:
    """What the row's switches say, each in a few words."""
    yield from _biases(row)
    if row.norms == BEHIND:
        yield "norms behind attention and MLP only"
    elif row.norms != BEFORE and row.norms.behind_mlp:
        yield "norms before and behind attention and MLP"
    if row.centred_norms:
        yield "norms of 1 + w" + (" but for the last" * (not row.centred_last_norm))
    if row.norms_embedding:
        yield "a norm of the embedding"
    if row.behind_eps_option:
        yield f"norms behind by another ε (`{row.behind_eps_option}`)"
    if row.head_norms:
        what = "all queries and all keys" if row.head_norms.whole_rows else "queries and keys"
        what = "queries, keys and values" if row.head_norms.of_values else what
        what = what if row.head_norms.weighted else f"{what} without weights"
        yield f"norms of {what}{' after the rotation' if row.head_norms.after_rotation else ''}"
    if row.blocks_differ:
        yield "full layers have heads of another size and number, whose keys may be values (`attention_k_eq_v`)"
        yield "last layers may read the keys and values of earlier ones (`num_kv_shared_layers`)"
        yield "layers may have inputs of their own (`hidden_size_per_layer_input`)"
    yield from _recurrent(row)
    yield from _windows(row)
    yield from _rotations(row)
    yield from _mlp(row)
    yield from _scales(row)


def _biases(row: Architecture) -> Iterator[str]:
    switches: dict[str, Switch] = {"q, k, v": row.qkv_bias, "o": row.out_bias, "the MLP": row.mlp_bias}
    for option in dict.fromkeys(switch for switch in switches.values() if switch):
        places = " and ".join(place for place, switch in switches.items() if switch == option)
        yield f"biases of {places}" + (f" (`{option}`)" if isinstance(option, str) else "")


RULES = {"delta": "a gated delta rule", "mamba": "Mamba-2", "conv": "a short convolution"}


def _recurrent(row: Architecture) -> Iterator[str]:
    if row.recurrent is not None:
        option = row.recurrent.interval or row.recurrent.attends
        options = "`layer_types`" + (f" or `{option}`" if option else "")
        yield f"{RULES[row.recurrent.kind]} in place of attention in some layers ({options})"
    if row.gates_attention or row.names.mix_gate:
        yield "gates behind attention" + (" by a layer of their own" * bool(row.names.mix_gate))


def _windows(row: Architecture) -> Iterator[str]:
    if row.windows.kind == "all":
        yield "windows in all layers (`sliding_window`)"
    if row.windows.kind == "listed":
        yield "windows in some layers (`use_sliding_window`, `layer_types` or `max_window_layers`)"
    if row.windows.kind == "typed":
        rule = f", or all but one in {row.windows.period}" if row.windows.period else ", or all"
        rule += " from the last" * row.windows.from_last
        yield f"windows in some layers (`layer_types`{rule})"


def _rotations(row: Architecture) -> Iterator[str]:
    if row.rotates == "marked":
        yield "layers without positions (`no_rope_layers`)"
    if row.rotates == "thetas":
        yield "layers without positions (`layer_rope_theta`)"
    if row.rotates == "sliding":
        yield "only layers with a window rotate, where there are any"
    if row.rotates == "named":
        yield "attention rotates where `position_embedding_type` is rope"
    if row.ropes_by_type:
        yield "full and sliding layers rotate differently"
    if row.rotates_part:
        yield "a part of a head rotates (`partial_rotary_factor`)" + (", its channels in pairs" * row.interleaved)
    if row.grows_queries:
        yield "queries grow with the position (`llama_4_scaling_beta`)"


def _mlp(row: Architecture) -> Iterator[str]:
    if row.mixture:
        yield from _mixture(row.mixture)
    activation = row.defaults.get(row.activation_option)
    if not row.gated:
        yield f"an MLP without gates ({activation})"
    elif activation:
        yield f"gates of {activation}"
    if row.fused:
        yield f"{' and '.join(sorted(row.fused))} stored as one layer{' each' if len(row.fused) > 1 else ''}"


def _mixture(mixture: Mixture) -> Iterator[str]:
    place = "experts beside the MLPs" if mixture.beside else "experts"
    options = dict.fromkeys((mixture.option, mixture.counts[0], mixture.chosen))
    yield f"{place} ({', '.join(f'`{option}`' for option in options if option)})"
    some = {mixture.first: "from block `{}` on", mixture.step: "in every `{}`th block", mixture.without: "not in `{}`"}
    places = ", ".join(words.format(option) for option, words in some.items() if option)
    if places:
        yield f"they stand {places}"
    shares = {"softmax": "a softmax of all", "chosen": "a softmax of the chosen", "sigmoid": "sigmoids"}[mixture.scores]
    yield f"their shares are {shares}" + (f", or made to sum to 1 (`{mixture.normalised}`)" * bool(mixture.normalised))
    if mixture.correction:
        option = f" (`{mixture.correction_option}`)" * bool(mixture.correction_option)
        yield f"stored corrections where experts are chosen{option}"
    if mixture.scale:
        yield f"shares times `{mixture.scale}`"
    if mixture.shared_mlp:
        yield f"the MLP beside them is an expert of every token (`{mixture.shared_inner}`)"
    if mixture.shared:
        yield "an expert of every token" + (", whose share is learned" * bool(mixture.shared_gate))


def _scales(row: Architecture) -> Iterator[str]:
    if row.scales.embedding == "√hidden":
        yield "embedding times √hidden"
    scales = row.scales
    options = [scales.embedding, scales.residual, scales.scores, scales.scores_root, scales.queries]
    options += [scales.logits, scales.logits_divisor]
    named = [f"`{option}`" for option in options if option and option != "√hidden"]
    if named:
        yield f"factors of {', '.join(named)}"
    if row.scores_cap:
        yield f"a soft cap on scores (`{row.scores_cap}`)"
    if row.logits_cap:
        yield f"a soft cap on logits (`{row.logits_cap}`)"


def renewed(page: str) -> str:
    """The page with today's tables between their marks, in order."""
    before, *parts = page.split(BEGIN)
    made = (table(), paths_table.table())
    behind = (part.split(END, 1)[1] for part in parts)
    return before + "".join(f"{BEGIN}\n{one}\n{END}{rest}" for one, rest in zip(made, behind, strict=True))


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
