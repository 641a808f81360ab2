"""The short table at the end of a GPU bench."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tools.gpu_bench.report import NO_TIME

Row = Mapping[str, Any]


def summary(parts: Mapping[str, Sequence[Row]]) -> str:
    """Lines of text: what is wrong first, then passes, products, text, quantizing, loading, and transformers."""
    return "\n".join(
        [
            *failures(parts),
            *facts(parts.get("facts", ())),
            *passes(parts.get("headline", ()), "headline"),
            *arms(parts.get("headline", ()), "headline, end to end"),
            *passes(parts.get("passes", ())),
            *passes(parts.get("mixtures", ()), "mixtures of experts"),
            *products(parts.get("products", ())),
            *arms(parts.get("end to end", ())),
            *launches(parts.get("launches", ())),
            *quantizing(parts.get("quantizing", ())),
            *loading(parts.get("loading", ())),
            *offload(parts.get("offload", ())),
            *reference(parts.get("transformers", ())),
        ]
    )


def failures(parts: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Errors and wrong results, and how many were right."""
    right = sum(row.get("ok") is True for rows in parts.values() for row in rows)
    wrong = [(part, row) for part, rows in parts.items() for row in rows if "error" in row or row.get("ok") is False]
    late = sum(row.get("skipped") == NO_TIME for rows in parts.values() for row in rows)
    yield f"\nchecks: {right} right, {len(wrong)} wrong or failed" + (f"; {late} left out: {NO_TIME}" if late else "")
    for part, row in wrong:
        yield f"  {part}: {str(dict(row))[:300]}"


def facts(rows: Sequence[Row]) -> Iterator[str]:
    """Bandwidth, and what launches and messages cost."""
    for row in rows:
        if "gb_per_s" in row:
            yield f"{row['what']}: {row['gb_per_s']:.0f} GB/s"
        elif "us" in row:
            yield f"{row['what']}: {row['us']:.2f} µs"


def passes(rows: Sequence[Row], name: str = "passes") -> Iterator[str]:
    """Milliseconds and their ratio to the floor, a line for each model and context, a column for each length."""
    timed = [row for row in rows if "ratio" in row]
    yield f"\n{name}: ms (× floor) by tokens"
    for model, context in dict.fromkeys((row["model"], row["context"]) for row in timed):
        cells = [
            f"{row['tokens']}: {row['ms']:.3f} ({row['ratio']:.2f})"
            for row in timed
            if (row["model"], row["context"]) == (model, context)
        ]
        yield f"  {model} at {context}: " + ", ".join(cells)
    yield from verify_shares(timed)


def verify_shares(timed: Sequence[Row]) -> Iterator[str]:
    """What a verify takes of a confirm of as many tokens."""
    took = {(row["model"], row["context"], row["tokens"]): row["ms"] for row in timed}
    for context in dict.fromkeys(row["context"] for row in timed):
        shares = [
            f"{tokens}: {ms / took['target', context, tokens]:.2f}"
            for (model, at, tokens), ms in took.items()
            if (model, at) == ("4-bit", context) and ("target", context, tokens) in took
        ]
        if shares:
            yield f"  4-bit ÷ target at {context}: " + ", ".join(shares)


def products(rows: Sequence[Row]) -> Iterator[str]:
    """Microseconds by rows."""
    yield "\nproducts: µs by rows (floor)"
    for row in rows:
        if "us" in row:
            times = ", ".join(f"{count}: {time:.1f}" for count, time in row["us"].items())
            form = f"{row['bits']} bits" + (f" g{row['group_size']}" if "group_size" in row else "")
            name = f"{row['inputs']} → {row['outputs']}, {form}, {row['kernel']}"
            yield f"  {name}: {times} ({row['floor_us']:.1f})"


def arms(rows: Sequence[Row], name: str = "end to end") -> Iterator[str]:
    """Tokens per second and where the time went."""
    yield f"\n{name}"
    for row in rows:
        if "arm" in row and row["tokens_per_s"]:
            shares = ", ".join(f"{name} {100 * row[f'share_{name}']:.0f} %" for name in ("draft", "verify", "confirm"))
            length, speedup = row["acceptance_length"], row["speedup"]
            yield f"  {row['arm']}: {row['tokens_per_s']:.1f} tokens/s, {speedup:.2f} ×, length {length:.2f}; {shares}"


def launches(rows: Sequence[Row]) -> Iterator[str]:
    """Kernels of a pass, and how long they run."""
    for row in rows:
        if "launches" in row:
            yield f"launches, {row['model']}, {row['tokens']} tokens: {row['launches']}, {row['busy_us']:.0f} µs busy"


def quantizing(rows: Sequence[Row]) -> Iterator[str]:
    """Seconds and memory of a block."""
    for row in rows:
        if "block_s" in row:
            peak = f"{row['peak_memory_bytes'] / 1e9:.1f} GB" if row["peak_memory_bytes"] else "not measured"
            yield f"\nquantizing: {row['block_s']:.1f} s a block, {row['model_s']:.0f} s the model, peak memory {peak}"


def loading(rows: Sequence[Row]) -> Iterator[str]:
    """GB per second."""
    for row in rows:
        if "gb_per_s" in row:
            yield f"loading, {row['way']}: {row['gb_per_s']:.1f} GB/s"


def offload(rows: Sequence[Row]) -> Iterator[str]:
    """Speeds over a streamed target, against their floors."""
    for row in rows:
        if "link_gb_per_s" in row:
            yield f"\noffload: {row['note']}; the link gives {row['link_gb_per_s']:.1f} GB/s"
        elif "floor" in row:
            said = f"{row['arm']}: {row['tokens_per_s']:.2f} tokens/s, {row['floor']:.2f} × its floor"
            yield f"  {said}, {row['equal']} of {row['answers']} texts equal"


def reference(rows: Sequence[Row]) -> Iterator[str]:
    """What transformers takes."""
    yield "\ntransformers"
    for row in rows:
        if "ms" in row:
            yield f"  {row['mode']}, {row['tokens']} tokens at {row['context']}: {row['ms']:.2f} ms"
        elif "tokens_per_s" in row:
            yield f"  {row['mode']}: {row['tokens_per_s']:.1f} tokens/s"
