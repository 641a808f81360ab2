"""The claim of a run in one sentence: which arm is how much faster, how sure that is, and whose the text is."""

from dataclasses import dataclass

from quasar_core.bench.arms import ARMS, BASELINE, TWIN
from quasar_core.bench.metrics.arm_metrics import count_compared, measure, speedup_over_all
from quasar_core.bench.metrics.estimates import FEWEST, Estimate
from quasar_core.bench.results import Results


@dataclass(frozen=True)
class Claim:
    """An arm beside vanilla over all questions at one temperature; `identical` of `compared` have the same text.

    More are compared than timed where an answer ends with the prompt's pass.
    """

    arm: str
    temperature: float
    speedup: Estimate
    datasets: tuple[str, ...]
    identical: int
    compared: int

    @property
    def sentence(self) -> str:
        """The claim, or that the run shows none."""
        value, questions = self.speedup.value, self.speedup.questions
        where = f"On {questions} questions of {_listed(self.datasets)}"
        interval = "{:.2f} to {:.2f}".format(*self.speedup.interval) if self.speedup.interval else "not known"
        if not self.speedup.is_shown:
            few = f"; {FEWEST} questions are the least" if questions < FEWEST else ""
            return f"{where}, this run does not show how fast {self.arm} is (95 % interval {interval}{few})."
        if self.speedup.is_uncertain:
            than = "faster" if value > 1 else "slower"
            return (
                f"{where}, {self.arm} is {than} than plain decoding, but the interval of this run, {interval} times, "
                f"is too wide to say by how much{self._text}."
            )
        speed = f"{value:.2f} times as fast as plain decoding (95 % interval {interval})"
        return f"{where}, {self.arm} is {speed}{self._text}."

    @property
    def _text(self) -> str:
        """What is to be said of the text."""
        if ARMS[self.arm].verify == "quantized":
            return ", and its text is the low-bit copy's"
        count = self.compared
        if self.identical == count:
            return f", and its text is the same, token for token, in all {count} answers"
        return f", and its text is the same in {self.identical} of {count} answers"


def claims(results: Results) -> list[Claim]:
    """A claim for each temperature: of the fastest arm that promises the target's text, or of the fastest there is."""
    return [claim for temperature in results.run.config.temperatures if (claim := _claim(results, temperature))]


def _claim(results: Results, temperature: float) -> Claim | None:
    names = [name for name in results.run.config.arms if name not in (BASELINE, TWIN) and not ARMS[name].is_peer]
    found = [claim for name in names if (claim := claim_of(results, name, temperature))]
    lossless = [claim for claim in found if ARMS[claim.arm].verify != "quantized"]
    return max(lossless or found, key=lambda claim: claim.speedup.value, default=None)


def claim_of(results: Results, arm: str, temperature: float) -> Claim | None:
    """One arm of ours beside vanilla, all datasets together; None where no question was answered by both."""
    speedup = speedup_over_all(results, arm, temperature)
    if speedup is None:
        return None
    metrics = [one for one in measure(results) if (one.arm, one.temperature) == (arm, temperature)]
    return Claim(
        arm,
        temperature,
        speedup,
        tuple(metric.dataset for metric in metrics),
        sum(metric.identical or 0 for metric in metrics),
        sum(count_compared(results, metric.dataset, temperature, arm) for metric in metrics),
    )


def _listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
