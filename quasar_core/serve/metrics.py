"""Counters of a server, in Prometheus' text form."""

from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from quasar_core.records import Stats

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
LENGTHS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 12)


disable_created_metrics()  # a second line for each, which says when it began


class Metrics:
    """Counters of one server. `defects` are the latest errors that no request should have met."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str) -> Counter:
            return Counter(f"quasar_{name}", what, registry=self.registry)

        self.requests = Counter(
            "quasar_requests", "Requests, by what became of them.", ["outcome"], registry=self.registry
        )
        self.waiting = Gauge("quasar_queue_length", "Requests that wait.", registry=self.registry)
        self.prompt = counter("prompt_tokens", "Tokens of prompts.")
        self.cached = counter("cached_tokens", "Tokens of prompts that a kept prefix held.")
        self.generated = counter("generated_tokens", "Tokens of answers.")
        self.steps = counter("steps", "Verify passes.")
        self.drafted = counter("drafted_tokens", "Draft tokens offered to verify passes.")
        self.accepted = counter("accepted_tokens", "Draft tokens that verify passes accepted.")
        self.window = counter("confirm_window_tokens", "Tokens shown to the target for a confirm.")
        self.confirmed = counter("confirmed_tokens", "Tokens of windows that the target accepted.")
        self.decoding = counter("decode_seconds", "Seconds of decoding behind the prompts.")
        self.first = Histogram(
            "quasar_time_to_first_token_seconds",
            "From an answer's turn to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.length = Histogram(
            "quasar_acceptance_length", "New tokens a step, of each answer.", buckets=LENGTHS, registry=self.registry
        )
        self.rate = Gauge(
            "quasar_confirm_rate", "Confirmed tokens ÷ tokens shown, of all answers.", registry=self.registry
        )
        self.defects: deque[Exception] = deque(maxlen=16)
        self._shown = self._kept = 0

    def take(self, stats: Stats) -> None:
        """Count an answer."""
        counts = {
            self.prompt: stats.prompt_tokens,
            self.cached: stats.cached_tokens,
            self.generated: stats.new_tokens,
            self.steps: stats.steps,
            self.drafted: stats.drafted,
            self.accepted: stats.accepted,
            self.window: stats.confirm_window,
            self.confirmed: stats.confirm_accepted,
            self.decoding: stats.decode_s,
        }
        for counter, count in counts.items():
            counter.inc(count)
        self.first.observe(stats.ttft_s)
        if stats.acceptance_length is not None:
            self.length.observe(stats.acceptance_length)
        self._shown, self._kept = self._shown + stats.confirm_window, self._kept + stats.confirm_accepted
        if self._shown:
            self.rate.set(self._kept / self._shown)

    def text(self) -> str:
        """All of it."""
        return generate_latest(self.registry).decode("utf-8")
