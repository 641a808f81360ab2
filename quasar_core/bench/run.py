"""Run a bench: every arm on every question, interleaved, each answer a row."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from quasar_core.bench.arms import ARMS, TWIN, TWIN_EVERY, Arm, BenchConfig
from quasar_core.bench.datasets import Dataset, Question
from quasar_core.bench.divergence import find_divergences
from quasar_core.bench.energy import EnergyMeter
from quasar_core.bench.gated import measure_achieved
from quasar_core.bench.metrics.quality import is_right_number
from quasar_core.bench.peers.process import Peer
from quasar_core.bench.peers.start import begin_peer, check_peers
from quasar_core.bench.results import Key, Passes, Results, Row, RowLog, Run, refuse_foreign_results
from quasar_core.bench.run_code import passes as passes_test
from quasar_core.bench.steps import lean_candidate, read_bandwidth
from quasar_core.config import Request
from quasar_core.decode.generator import Generator
from quasar_core.decode.text import encode_prompt, token_texts
from quasar_core.decode.traced import refused_texts
from quasar_core.errors import QuasarError
from quasar_core.kernels.times import device_name
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.pair import Pair
from quasar_core.records import GenerationResult, Progress, no_progress
from quasar_core.system import LoadMeter, frequency, git_hash, package_versions

WARM_UP_TOKENS = 16

Answerer = Generator | Peer
Answerers = dict[tuple[str, float], Answerer]  # by arm and temperature


@dataclass(frozen=True)
class Conversation:
    """One arm's answers to one question's turns: the unit that is scheduled, logged and resumed."""

    dataset: str
    question: Question
    repeat: int
    arm: Arm
    temperature: float = 0.0

    @property
    def key(self) -> Key:
        """What tells conversations apart, as `Row.conversation`."""
        return self.dataset, self.question.question_id, self.repeat, self.arm.name, self.temperature


def run_bench(
    pair: Pair,
    datasets: Sequence[Dataset],
    config: BenchConfig,
    output: Path,
    *,
    resume: bool = True,
    progress: Progress = no_progress,
) -> Results:
    """Run every arm on every question and write the result file to `output`.

    Rows are logged beside `output` as they come; with `resume`, an interrupted run with the same settings goes on
    where it stopped. UsageError where `output` is a file of anything else or a peer is not here, QuasarError where the
    pair lacks a model that an arm needs. A peer that fails is rows with its reason.
    """
    refuse_foreign_results(output)
    arms = [ARMS[name] for name in config.arms]
    check_peers(arms, config)
    with ExitStack() as ends:
        answerers = _begin(pair, arms, config, ends, progress)
        _warm_up(pair, answerers, datasets, config, progress)
        log = RowLog(output, describe_run(pair, datasets, config, answerers), resume)
        conversations = list(schedule(datasets, arms, config.repeats, config.temperatures))
        finished = {row.conversation for row in log.rows}
        todo = [conversation for conversation in conversations if conversation.key not in finished]
        for done, conversation in enumerate(todo, start=len(conversations) - len(todo)):
            progress("bench", done, len(conversations))
            answerer = answerers[conversation.arm.name, conversation.temperature]
            log.append(lead(answerer, conversation, config))
        progress("bench", len(conversations), len(conversations))
    greedy = [row for row in log.rows if row.temperature == 0]
    achieved = measure_achieved(pair, datasets, greedy, config.fidelity, progress)
    return log.finish(find_divergences(pair, datasets, greedy), achieved)


def schedule(
    datasets: Sequence[Dataset], arms: Sequence[Arm], repeats: int, temperatures: Sequence[float] = (0.0,)
) -> Iterator[Conversation]:
    """All conversations: a question's arms side by side, in an order that rotates, so that none always goes first.

    The twin of vanilla is asked only some of the questions.
    """
    for repeat in range(repeats):
        for temperature in temperatures:
            for dataset in datasets:
                for number, question in enumerate(dataset.questions):
                    asked = [arm for arm in arms if arm.name != TWIN or number % TWIN_EVERY == 0]
                    first = (number + repeat) % len(asked)
                    for arm in (*asked[first:], *asked[:first]):
                        yield Conversation(dataset.name, question, repeat, arm, temperature)


def _begin(pair: Pair, arms: Sequence[Arm], config: BenchConfig, ends: ExitStack, progress: Progress) -> Answerers:
    """What answers for each arm; peers are ended with `ends`."""
    answerers: Answerers = {}
    for done, arm in enumerate(arms):
        progress("loading arms", done, len(arms))
        peer = begin_peer(arm, pair, config) if arm.is_peer else None
        if peer is not None:
            ends.callback(peer.close)
        for temperature in config.temperatures:
            answerers[arm.name, temperature] = peer or Generator(pair, config.generation(arm, temperature))
    progress("loading arms", len(arms), len(arms))
    return answerers


def _warm_up(
    pair: Pair, answerers: Answerers, datasets: Sequence[Dataset], config: BenchConfig, progress: Progress
) -> None:
    """A few tokens of each arm that are not recorded: first passes pay for allocations."""
    few = Request(min(WARM_UP_TOKENS, config.max_new_tokens), config.seed)
    prompt_ids = encode_shortest(datasets, pair.tokenizer)
    for done, answerer in enumerate(answerers.values()):
        progress("warm-up", done, len(answerers))
        try:
            answerer.generate(prompt_ids, request=few)
        except QuasarError:
            if not isinstance(answerer, Peer):
                raise
            # a peer's failure is told by its rows
    progress("warm-up", len(answerers), len(answerers))


def encode_shortest(datasets: Sequence[Dataset], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of the first turn that has the fewest characters."""
    shortest = min((question.turns[0] for dataset in datasets for question in dataset.questions), key=len)
    return encode_prompt(tokenizer, shortest)


def lead(answerer: Answerer, conversation: Conversation, config: BenchConfig) -> list[Row]:
    """Ask a question's turns one after the other, each after the arm's own earlier answers.

    A pass that fails is a row with its error, and so is every turn that can no longer be asked.
    """
    answerer.reset()
    if isinstance(answerer, Peer):
        answerer.temperature = conversation.temperature
    messages: list[dict[str, str]] = []
    rows: list[Row] = []
    for turn, text in enumerate(conversation.question.turns):
        question_id = conversation.question.question_id
        seed = config.seed_of(conversation.dataset, question_id, turn, conversation.repeat)
        if rows and rows[-1].error is not None:
            rows.append(_row(conversation, turn, seed, error="an earlier turn failed"))
            continue
        messages.append({"role": "user", "content": text})
        rows.append(_ask(answerer, conversation, turn, Request(config.max_new_tokens, seed), messages, config))
        messages.append({"role": "assistant", "content": rows[-1].text})
    return rows


def _ask(
    answerer: Answerer,
    conversation: Conversation,
    turn: int,
    request: Request,
    messages: list[dict[str, str]],
    config: BenchConfig,
) -> Row:
    """One turn's row: the answer with what the machine did meanwhile, or the error in its place."""
    pair = answerer.pair
    meter, energy = LoadMeter(), EnergyMeter(pair.device.type == "cuda")
    try:
        result = answerer.generate(encode_prompt(pair.tokenizer, messages), request=request)
    except (QuasarError, RuntimeError) as error:
        kind = "" if isinstance(error, QuasarError) else f"{type(error).__name__}: "
        return _row(conversation, turn, request.seed, error=f"{kind}{error}")
    others = None if isinstance(answerer, Peer) else meter.read().others  # a peer's own work would count as others'
    row = replace(_row(conversation, turn, request.seed, result), others=others, mhz=frequency(), joules=energy.read())
    if not isinstance(answerer, Peer):
        pieces = token_texts(pair.tokenizer, result.token_ids)
        row = replace(row, lengths=[len(piece) for piece in pieces], refused=refused_texts(pair, result))
    return replace(row, correct=is_correct(conversation.question, turn, result.text, config.run_code))


def is_correct(question: Question, turn: int, text: str, run_code: bool) -> bool | None:
    """Whether an answer is right, by the number that it ends in or by its program; None where that cannot be told."""
    if turn < len(question.reference) and "####" in question.reference[turn]:
        return is_right_number(text, question.reference[turn])
    if run_code and question.test is not None and question.entry_point is not None and turn == 0:
        return passes_test(question.prompt or question.turns[0], text, question.test, question.entry_point)
    return None


def _row(
    conversation: Conversation, turn: int, seed: int, result: GenerationResult | None = None, error: str | None = None
) -> Row:
    return Row(
        dataset=conversation.dataset,
        question_id=conversation.question.question_id,
        category=conversation.question.category,
        turn=turn,
        repeat=conversation.repeat,
        arm=conversation.arm.name,
        seed=seed,
        token_ids=list(result.token_ids) if result else [],
        text=result.text if result else "",
        finish_reason=result.finish_reason if result else None,
        stats=result.stats if result else None,
        error=error,
        temperature=conversation.temperature,
        reference=_reference(conversation.question, turn),
    )


def _reference(question: Question, turn: int) -> str | None:
    """The dataset's own answer, where answers are judged by it."""
    found = question.reference[turn] if turn < len(question.reference) else ""
    return found if "####" in found else None


def describe_run(pair: Pair, datasets: Sequence[Dataset], config: BenchConfig, answerers: Answerers) -> Run:
    """What runs and where, for the result file."""
    passes = known_passes(pair)
    peers = {arm: answerer for (arm, _), answerer in answerers.items() if isinstance(answerer, Peer)}
    return Run(
        config=config,
        model=pair.target_name,
        verifier=pair.verifier_name,
        device=device_name(pair.device),
        dtype=str(pair.dtype).removeprefix("torch."),
        datasets={
            one.name: {"questions": len(one.questions), "sha256": one.sha256, "source": one.source} for one in datasets
        },
        versions=package_versions(),
        notes=list(pair.notes),
        git=git_hash(),
        passes=passes,
        bandwidth=read_bandwidth(pair.device) if passes else None,
        peers={name: peer.version for name, peer in peers.items() if peer.version},
        energy=EnergyMeter(pair.device.type == "cuda").sources,
    )


def known_passes(pair: Pair) -> dict[str, Passes]:
    """What passes of our own decoder read, and what they cost where that was measured, by role."""
    found = {}
    models: dict[str, Any] = {"target": pair.target, "verifier": pair.verifier}
    for role, model in models.items():
        if isinstance(model, LeanDecoder):
            record = pair.measured.get(role)
            cost = record.cost if record else None
            sizes, seconds = (cost.sizes, cost.seconds) if cost else ((), ())
            found[role] = Passes(lean_candidate(model).weight_bytes, tuple(sizes), tuple(seconds))
    return found
