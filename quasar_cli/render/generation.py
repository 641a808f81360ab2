"""The statistics of a generation, and what its mode promises."""

from rich.table import Table

from quasar_cli.render import as_bytes, as_ratio, facts_table
from quasar_core.config import GenerationConfig
from quasar_core.records import DrafterUse, FidelityReport, GenerationResult, Stats


def stats_table(result: GenerationResult, config: GenerationConfig) -> Table:
    """Speed and acceptance of one generation."""
    stats = result.stats
    ended = {"eos": "end of text", "stop": "stop string", "length": "length"}[result.finish_reason]
    if result.finish_reason == "length" and stats.new_tokens < config.max_new_tokens:
        ended = "the context is full"
    facts = [
        ("new tokens", f"{stats.new_tokens} ({ended})"),
        ("speed", as_ratio(stats.tokens_per_s, 1, " tokens/s")),
        ("prompt", _prompt(stats)),
        ("acceptance length", f"{as_ratio(stats.acceptance_length)} ({_count(stats.steps, 'step')})"),
    ]
    if config.draft != "none":
        accepted = f"{stats.accepted} of {stats.drafted} draft tokens"
        facts.append(("acceptance rate", f"{as_ratio(stats.acceptance_rate)} ({accepted})"))
        facts += [(f"  {source}", _use(use)) for source, use in stats.drafters.items()]
    if stats.confirms:
        confirmed = f"{stats.confirm_accepted} of {stats.confirm_window} tokens kept"
        confirmed += f" in {_count(stats.confirms, 'confirm')}"
        facts.append(("confirm rate", f"{as_ratio(stats.confirm_rate)} ({confirmed})"))
    facts.append(("seconds", _seconds(stats)))
    if stats.peak_memory_bytes:
        facts.append(("peak memory", as_bytes(stats.peak_memory_bytes)))
    return facts_table(facts)


def promise(fidelity: FidelityReport | None, config: GenerationConfig, rounds_alike: bool = True) -> str:
    """What the verification mode guarantees; in `quantized` mode, the measured agreement.

    Unless the target `rounds_alike` whatever passes beside a token, two tokens that are as likely may change places.
    """
    but = "" if rounds_alike else ", but where its two best tokens are a rounding of 16 bits apart"
    if config.verify == "exact":
        return f"exact: the full-precision model's own output{but}"
    if config.verify == "gated":
        return (
            "gated: not lossless; the full-precision model's own choice is expected of "
            f"{config.fidelity:g} of the tokens at least"
        )
    if config.verify == "full":
        as_plain = "" if config.draft == "none" or not but else f"; as without drafts{but}"
        return f"full: decided by the full-precision model{as_plain}"
    if fidelity is None:
        return "quantized: the verifier's output, not lossless; its agreement with the target was not measured"
    return (
        f"quantized: the verifier's output, not lossless; measured agreement with the target {fidelity.agreement:.3f}"
    )


def _prompt(stats: Stats) -> str:
    cached = f", {stats.cached_tokens} of them cached" if stats.cached_tokens else ""
    return f"{stats.prompt_tokens} tokens{cached}, first token after {stats.ttft_s:.3f} s"


def _use(use: DrafterUse) -> str:
    """What one drafter did."""
    return f"{use.accepted} of {use.drafted} draft tokens in {_count(use.steps, 'step')}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _seconds(stats: Stats) -> str:
    parts = [f"prompt {stats.prefill_s:.2f}", f"decoding {stats.decode_s:.2f}"]
    named = {"drafts": stats.draft_s, "verify": stats.verify_s, "confirm": stats.confirm_s}
    inside = ", ".join(f"{name} {seconds:.2f}" for name, seconds in named.items() if seconds)
    return ", ".join(parts) + (f" ({inside})" if inside else "")
