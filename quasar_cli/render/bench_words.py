"""Sentences beside the tables of a bench: legends, conditions, divergences, failures."""

from quasar_core.bench.arms import BASELINE
from quasar_core.bench.metrics.conditions import Conditions, conditions
from quasar_core.bench.metrics.estimates import FEWEST, WIDEST
from quasar_core.bench.results import Results, temperatures

DOUBT = "?"  # behind a speedup that the run does not show
WIDE = "wide"  # in place of a speedup that the run does not tell
MARK = "*"  # behind a change that two runs show
LEGEND = (
    "speedup: total tokens ÷ total seconds, by vanilla's; the prompt's pass left out, but for the column with prompt\n"
    f"{DOUBT}: in doubt, as its 95 % interval holds 1 or fewer than {FEWEST} questions were asked\n"
    "len: acceptance length, new tokens ÷ steps; plain decoding is 1.00"
)
TOO_WIDE = f"{WIDE}: its interval is wider than ±{100 * WIDEST:.0f} %; --show-uncertain prints it"
NO_ENERGY = "no counter (RAPL, NVML) can be read here"
PAPER = "quantized: the verifier's text, not the target's; the method of the paper Quasar"
DEFINED = "docs/measuring.md defines every figure"
MARKED = f"{MARK}: the 95 % interval of the ratio of speeds, over at least {FEWEST} questions, leaves 1 out"


def legend(results: Results, shows_uncertain: bool = False) -> str:
    """What the columns mean, and the arm whose text is not the target's."""
    lines = [LEGEND, *([] if shows_uncertain else [TOO_WIDE])]
    lines += [PAPER] if "quantized" in results.run.config.arms else []
    return "\n".join([*lines, DEFINED])


def sentences(results: Results) -> list[str]:
    """What else is to be said of a run, a sentence or two each."""
    found = describe_conditions(results), describe_noise(results), describe_peers(results)
    kept = describe_achieved(results), describe_divergences(results), describe_errors(results)
    return [text for text in (*found, *kept) if text]


def describe_peers(results: Results) -> str:
    """Which other programs ran; empty where none did."""
    return "; ".join(f"{arm}: {version}" for arm, version in results.run.peers.items())


def describe_run(results: Results) -> str:
    """One line: what ran where."""
    run = results.run
    verifier = f" with {run.verifier}" if run.verifier else ""
    return f"{run.model}{verifier}, {run.dtype} on {run.device}, {temperatures(run)}"


def describe_noise(results: Results) -> str:
    """Whether two identical arms came out alike; empty where vanilla was not asked again."""
    found: Conditions = conditions(results)
    if found.twins is None:
        return ""
    interval = "{:.3f} to {:.3f}".format(*found.twins.interval) if found.twins.interval else "no interval"
    said = f"{BASELINE} asked again is {found.twins.value:.3f} times itself ({interval})"
    if found.twins_agree is None:
        return f"Noise: {said}, of too few questions to tell."
    if found.twins_agree:
        return f"Noise: {said}: two identical arms agree."
    return f"Noise: {said}: two identical arms differ, so smaller differences than that say nothing. Measure again."


def describe_errors(results: Results) -> str:
    """One sentence on the answers that failed; empty where none did."""
    errors = results.errors
    if not errors:
        return ""
    first = errors[0]
    return (
        f"{len(errors)} of {len(results.rows)} answers failed; the first: "
        f"{first.dataset} question {first.question_id}, {first.arm}: {first.error}"
    )


def describe_achieved(results: Results) -> str:
    """One sentence for each dataset on arms that leave tokens unchecked; empty where there are none."""
    return " ".join(
        f"{one.dataset}, {one.arm}: {one.share:.5f} of {one.tokens:,} tokens are the full-precision model's own choice "
        f"behind the same text (asked for: {one.asked:g})."
        for one in results.achieved
    )


def describe_divergences(results: Results) -> str:
    """One sentence on arms that promise the target's output and left vanilla's; empty where none did."""
    count = len(results.divergences)
    if not count:
        return ""
    answers = "1 answer leaves" if count == 1 else f"{count} answers leave"
    unexplained = sum(not divergence.near_tie for divergence in results.divergences)
    if unexplained:
        verdict = f"at {unexplained} of those places the target's two best logits lie further apart, which is a defect"
    else:
        verdict = "everywhere there the target's two best logits lie within it"
    return f"{answers} vanilla's text, which the rounding of {results.run.dtype} may cause: {verdict}."


def describe_conditions(results: Results) -> str:
    """How busy the machine was, its cores' frequency, and how much vanilla's speed varied; empty where not known."""
    found = conditions(results)
    parts = []
    if found.others is not None and found.most_others is not None:
        parts.append(
            f"other programs took {100 * found.others:.0f} % of the cores, at most {100 * found.most_others:.0f}"
        )
    if found.mhz:
        parts.append("cores at {:.0f} to {:.0f} MHz".format(*found.mhz))
    if found.reference_spread is not None:
        parts.append(f"vanilla's speed varied by {100 * found.reference_spread:.0f} % between answers")
    if parts:
        parts.append(f"energy: {found.energy or NO_ENERGY}")
    busy = f"The machine was busy during {found.busy} of {found.answers} answers: measure again on a quiet one. "
    return (busy if found.was_busy else "") + ("Conditions: " + "; ".join(parts) + "." if parts else "")
