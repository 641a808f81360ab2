"""Generate answers with a pair: prompt in, text out, the cache kept between calls."""

import time
from collections.abc import Callable, Sequence
from collections.abc import Generator as Iteration
from dataclasses import replace
from typing import Literal

import torch

from quasar_core.config import GenerationConfig, Request, VerifyMode
from quasar_core.decode.answering import Answering, Stopped
from quasar_core.decode.costs.cost_records import Role
from quasar_core.decode.costs.pass_costs import Cost
from quasar_core.decode.costs.run_costs import RunCosts
from quasar_core.decode.drafts.drafting import Drafting
from quasar_core.decode.drafts.guessers import make_guesser
from quasar_core.decode.engine import Engine
from quasar_core.decode.logits.processors import Processors, describe_processors
from quasar_core.decode.policy.agreement import UNKNOWN, AgreementCurve, RunningAgreement, shift_to
from quasar_core.decode.policy.check import Checker
from quasar_core.decode.policy.checking import Checking
from quasar_core.decode.policy.gate import Gate
from quasar_core.decode.policy.lengths import (
    DEFAULT_WINDOW,
    TYPICAL_ACCEPTANCE,
    AdaptiveLength,
    DraftLength,
    FixedLength,
    WindowPolicy,
    plan_exact,
)
from quasar_core.decode.policy.streamed_prospect import describe_expected, describe_more_bits
from quasar_core.decode.policy.trees import Branching
from quasar_core.decode.policy.verifier_attention import VerifierAttention
from quasar_core.decode.policy.verifier_vocabulary import VerifierVocabulary
from quasar_core.decode.prefixes import Prefix, Prefixes
from quasar_core.decode.text import TextStream
from quasar_core.draft.base import Drafter
from quasar_core.errors import QuasarError, UsageError
from quasar_core.models.base import KVCache
from quasar_core.models.pair import Pair, refuse_long
from quasar_core.records import FinishReason, GenerationResult, Progress, no_progress
from quasar_core.system import LoadMeter, peak_memory

TextPieces = Iteration[str, None, GenerationResult]  # finished text as it comes; returns the result


class Generator:
    """Generates with one pair and one config. A prompt that begins as the last conversation did reuses its cache."""

    def __init__(
        self,
        pair: Pair,
        config: GenerationConfig,
        make_draft: Callable[[], Drafter] | None = None,
        now: Callable[[], float] = time.perf_counter,
        progress: Progress = no_progress,
        prefixes: Prefixes | None = None,
    ) -> None:
        _check_models(pair, config)
        self.pair, self.config = pair, config
        self._check_processors()
        self._drafting = Drafting(pair, config, progress)
        self._make_draft = make_draft
        self._now = now
        self._vocabulary = VerifierVocabulary(pair, config, self._note)
        self._costs = RunCosts(self._vocabulary.usual, config, self._note, now)
        self._target_first = False  # whether the verifier of `exact` seems of no use before anything is decoded
        self._window = WindowPolicy(DEFAULT_WINDOW if config.window == "auto" else config.window)
        self._checking = self._choose_checking()
        self._draft_length = self._checking.verifier_length if self._checking else self._choose_draft_length()
        self._prefixes = prefixes or Prefixes(pair)
        self._branching = self._choose_branching(self._draft_length, self._costs.verifying)
        self._attention = VerifierAttention(self._vocabulary.usual, config, self._note)
        self._in_use: KVCache | None = None  # the cache of the answer that is being written
        role: Role = "target" if self._target_first else self._costs.verifying
        if not make_draft:
            self._drafting.sources.guesser = make_guesser(pair, config, role, lambda: self._in_use)

    def reset(self) -> None:
        """Forget the conversation."""
        self._prefixes.forget()

    def release(self) -> None:
        """Let the caches go at once: generators refer to themselves, and wait for Python to find that."""
        self._prefixes.release()
        self._in_use = None

    def generate(
        self,
        prompt_ids: Sequence[int],
        on_text: Callable[[str], None] | None = None,
        request: Request | None = None,
        answering: Answering | None = None,
    ) -> GenerationResult:
        """Generate after the prompt; `on_text` receives finished text as it comes. Raises as `stream` does."""
        pieces = self.stream(prompt_ids, request, answering)
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                result: GenerationResult = end.value
                return result
            if on_text:
                on_text(piece)

    def stream(
        self, prompt_ids: Sequence[int], request: Request | None = None, answering: Answering | None = None
    ) -> TextPieces:
        """Generate after the prompt, and yield each piece of text when it is finished; returns the result.

        Nothing is decoded between two pieces that are asked for; closing the iterator ends the answer. A `request`
        stands in for the config's own length and seed; `answering` brings what else one answer has. Raises UsageError,
        before the first piece, for an empty prompt and for one that leaves no room in the model's context.
        """
        request = request or self.config.request
        max_tokens = self._check_prompt(prompt_ids, request)
        return self._stream(prompt_ids, request, max_tokens, answering or Answering())

    def _stream(self, prompt_ids: Sequence[int], request: Request, max_tokens: int, answering: Answering) -> TextPieces:
        meter = LoadMeter()
        start = self._now()
        self._in_use = None  # a larger cache may come in its place, and there is not room for both
        prefix, cached = self._prefixes.take(prompt_ids, max_tokens)
        greedy = (request.sampling or self.config.sampling).greedy
        pair = self._vocabulary.pair_for(self._attention.pair_for(len(prompt_ids)), prompt_ids, answering, greedy)
        self._costs.move_to(len(prompt_ids), pair)
        engine = self._make_engine(pair, prefix, max_tokens, request, answering)
        text = TextStream(self.pair.tokenizer, request.stop or self.config.stop, answering.reading)
        _reset_peak_memory(self.pair.device)
        self._prefill(engine, prefix, prompt_ids, cached)
        engine.stats.ttft_s = self._now() - start
        answering.stats = engine.stats
        end = engine.max_tokens
        try:
            count, reason = yield from self._run(engine, text, len(prompt_ids))
            end = len(prompt_ids) + count
        finally:
            self._keep_cache(engine, prefix, end)
            if self._vocabulary.is_whole(engine.verifying):
                self._costs.forget_passes("verifier")
            else:
                self._costs.forget_what_was_wrong(meter.read())
        engine.stats.new_tokens = count
        engine.stats.peak_memory_bytes = _peak_memory(self.pair.device)
        new = engine.tokens[len(prompt_ids) : len(prompt_ids) + count]
        self._drafting.end(new)
        verified_by: Literal["target", "verifier"] = "target" if engine.verifying is self.pair.target else "verifier"
        if rest := text.finish():
            yield rest
        return GenerationResult(list(prompt_ids), new, text.text, reason, engine.stats, verified_by)

    def _prefill(self, engine: Engine, prefix: Prefix, prompt_ids: Sequence[int], cached: int) -> None:
        """Pass the prompt; what is passed of one that is stopped is kept."""
        try:
            engine.prefill(prompt_ids, cached)
        except Stopped:
            self._prefixes.keep(prefix, list(prompt_ids[: engine.cache.length]))
            raise

    def _run(
        self, engine: Engine, text: TextStream, prompt_length: int
    ) -> Iteration[str, None, tuple[int, FinishReason]]:
        """Step until something ends the answer, yielding text; the number of its tokens, and what ended it."""
        read = prompt_length
        while True:
            self._costs.move_to(engine.seen, engine.pair)
            if read > prompt_length:  # nothing comes before the first text
                engine.begin()
            while read < engine.committed:
                token = engine.tokens[read]
                read += 1
                engine.answering.tokens.append(token)
                if whole := self._vocabulary.enough(token):
                    engine.verify_by(whole)
                if token in engine.eos_ids:
                    if engine.answering.reading.keeps_stop and (piece := text.add(token)):
                        yield piece
                    return read - prompt_length, "eos"
                if piece := text.add(token):
                    yield piece
                if text.stopped:
                    return read - prompt_length, "stop"
                if read >= engine.max_tokens:
                    return read - prompt_length, "length"
            engine.step()
            engine.answering.waiting(engine.window)

    def _keep_cache(self, engine: Engine, prefix: Prefix, end: int) -> None:
        """Keep the committed tokens that precede the answer's last one, which ends at `end`.

        What was committed behind a stop text goes: how much that is depends on the mode, and the pass over the next
        prompt must not.
        """
        self._prefixes.keep(prefix, engine.tokens[: min(end - 1, engine.seen - 1, engine.cache.length)])

    def _check_prompt(self, prompt_ids: Sequence[int], request: Request) -> int:
        """The number of tokens, prompt included, at which to end."""
        if not prompt_ids:
            raise UsageError("The prompt is empty.")
        self._check_ids(prompt_ids)
        limit = self.pair.max_context
        refuse_long(prompt_ids, limit, self.pair.context_is_asked)
        return min(len(prompt_ids) + request.max_new_tokens, limit)

    def _check_ids(self, prompt_ids: Sequence[int]) -> None:
        """QuasarError that names a token which has no row in the embedding."""
        rows = self.pair.primary.vocab_size
        wrong = next((token for token in prompt_ids if not 0 <= token < rows), None)
        if wrong is not None:
            text = self.pair.tokenizer.decode([wrong]) if wrong >= 0 else ""
            named = f"{wrong} ({text})" if text else str(wrong)
            raise QuasarError(
                f"The prompt has the token {named}, and the model's embedding has {rows:,} rows: the tokenizer and the "
                "model do not belong together."
            )

    def _make_engine(
        self, pair: Pair, prefix: Prefix, max_tokens: int, request: Request, answering: Answering
    ) -> Engine:
        checking = self._checking
        self._in_use = prefix.cache
        for length in (self._draft_length, checking.target_length if checking else None):
            if isinstance(length, AdaptiveLength):
                length.begin()
        if checking:
            checking.begin()
        sampling = replace(request.sampling or self.config.sampling, seed=request.seed)
        config = replace(self.config, sampling=sampling)
        return Engine(
            pair,
            prefix.cache,
            config,
            self._make_draft() if self._make_draft else self._drafting.begin(request),
            self._draft_length,
            self._window,
            max_tokens,
            checking=checking,
            observe=self._costs.observe,
            now=self._now,
            answering=answering,
            branching=self._branching,
        )

    def _check_processors(self) -> None:
        """Refuse, before any work, options of the model's that cannot be applied to its logits; note the others."""
        processors, device = Processors(self.pair.processors, self.config), self.pair.primary.device
        if processors:
            processors.begin([0], 2, self.pair.eos_ids, device)
            processors(torch.zeros(1, self.pair.primary.vocab_size, device=device), [0], [])
        note = describe_processors(self.pair.processors, self.config)
        if note:
            self._note(note)

    def _choose_draft_length(self) -> DraftLength:
        if self.config.draft == "none":
            return FixedLength(0)
        if self.config.num_draft_tokens == "auto":
            return AdaptiveLength(self._costs.corrected().verify, self._drafting.sources.acceptance)
        return FixedLength(self.config.num_draft_tokens, self._drafting.sources.acceptance)

    def _choose_branching(self, length: DraftLength, role: Role, cost: Cost | None = None) -> Branching | None:
        """Trees, where drafts are as long as pays and the model that checks them passes trees."""
        model = self.pair.verifier if role == "verifier" and self.pair.verifier else self.pair.primary
        if not isinstance(length, AdaptiveLength) or not self.config.trees:
            return None
        if model.why_chains is not None:
            self._note(f"trees: none, drafts are chains: {model.why_chains}")
        return Branching(length, model.longest_tree, cost) if model.longest_tree > 1 else None

    def _choose_checking(self) -> Checking | None:
        """Who checks drafts in `exact`; its `auto` may also find that the target had better do so always."""
        if not self.config.confirms or self.config.window != "auto":
            return None
        costs, agreement = self._costs.corrected(), self._known_agreement()
        plan = plan_exact(costs, agreement.now, self._acceptance)
        if plan.target_alone and self._costs.check_memory():
            plan = plan_exact(costs, agreement.now, self._acceptance)
        self._target_first = plan.target_alone
        self._note_expected(plan.rate, agreement)
        checker = Checker(costs, agreement, [plan.usual], plan.target_alone)
        self._note(_who_checks(self.config.verify, plan.target_alone, checker.longest))
        gate = self._choose_gate(agreement)
        at_verifier = self._choose_draft_length()
        if isinstance(at_verifier, FixedLength):
            return Checking(checker, at_verifier, FixedLength(at_verifier.limit), gate=gate)
        at_target = AdaptiveLength(self._costs.live["target"], timed=False)
        branching = self._choose_branching(at_target, "target", costs.confirm)
        return Checking(checker, at_verifier, at_target, branching, gate)

    def _choose_gate(self, agreement: RunningAgreement) -> Gate | None:
        """What goes through in `gated`. QuasarError where nothing is known of the verifier's agreement."""
        if self.config.verify != "gated":
            return None
        if self.pair.fidelity is None:
            raise QuasarError("--verify gated needs the verifier's margin table, which `quasar quantize` measures.")
        gate = Gate(agreement, self.config.fidelity)
        known = f"of P(agree) ≥ {gate.least:.4f}" if gate.least <= 1 else "none, as even the surest differ too often"
        self._note(f"gated: tokens that go through without a confirm: {known}")
        return gate

    def _note_expected(self, rate: float, agreement: RunningAgreement) -> None:
        """Where the target's weights are streamed: what may be expected, and what more bits would give."""
        assert self.pair.target is not None
        if self.pair.target.streamed:
            costs = self._costs.corrected()
            self._note(describe_expected(costs, rate, agreement.now.mean, self.pair.fidelity is not None))
            advice = describe_more_bits(self.pair, costs, agreement, rate, self._acceptance)
            if advice:
                self._note(advice)

    def _known_agreement(self) -> RunningAgreement:
        """The agreement as it was measured; without that, a guess, which decoding corrects."""
        fidelity = self.pair.fidelity
        if fidelity is None:
            self._note("exact: the verifier has no margin table: how often the target agrees is learned on the way")
            return RunningAgreement(AgreementCurve(UNKNOWN))
        curve, temperature = AgreementCurve(fidelity.margins), self.config.sampling.temperature
        if not temperature:
            return RunningAgreement(curve)
        greedy = fidelity.agreement if fidelity.agreement_beside is None else fidelity.agreement_beside
        sampled = greedy + min(temperature, 1.0) * (fidelity.overlap - fidelity.agreement)
        return RunningAgreement(curve, shift_to(curve, sampled))

    @property
    def _acceptance(self) -> float:
        return 0.0 if self.config.draft == "none" else TYPICAL_ACCEPTANCE

    def _note(self, sentence: str) -> None:
        """Several generators of one pair say the same only once."""
        if sentence not in self.pair.notes:
            self.pair.notes.append(sentence)


def _check_models(pair: Pair, config: GenerationConfig) -> None:
    if config.verify != "quantized" and pair.target is None:
        raise UsageError(f"--verify {config.verify} needs the target, and --no-target left it out.")
    if config.verify != "full" and pair.verifier is None:
        raise QuasarError(f"--verify {config.verify} needs a verifier; make one with `quasar quantize`.")
    if not pair.rolls_back and (config.verify != "full" or config.draft != "none"):
        raise QuasarError(f"{pair.target_name} has recurrent layers: it needs --verify full --draft none.")


def _who_checks(mode: VerifyMode, target_first: bool, longest: int) -> str:
    """A sentence for the notes."""
    if target_first:
        return (
            f"{mode}: the target checks drafts alone at first, as confirming the verifier's tokens seems to take "
            "longer here; the verifier is tried now and then"
        )
    return (
        f"{mode}: {longest} sure tokens wait for a confirm at most, and the target checks long drafts at once, as "
        "costs and agreement advise at each step"
    )


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device on CUDA, of the process on the CPU; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_memory()
