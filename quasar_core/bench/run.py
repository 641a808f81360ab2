"""Run a bench: every arm on every question, interleaved, each answer a row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quasar_core.bench.arms import ARMS, Arm, BenchConfig
from quasar_core.bench.datasets import Dataset, Question
from quasar_core.bench.divergence import find_divergences
from quasar_core.bench.peers import TransformersPeer
from quasar_core.bench.results import Results, Row, RowLog, Run, refuse_foreign_results
from quasar_core.config import Request
from quasar_core.decode.generator import Generator
from quasar_core.decode.text import encode_prompt
from quasar_core.errors import QuasarError
from quasar_core.kernels.times import device_name
from quasar_core.models.pair import Pair
from quasar_core.records import GenerationResult, Progress, no_progress
from quasar_core.system import LoadMeter, frequency, git_hash, package_versions

WARM_UP_TOKENS = 16

Answerer = Generator | TransformersPeer


@dataclass(frozen=True)
class Conversation:
    """One arm's answers to one question's turns: the unit that is scheduled, logged and resumed."""

    dataset: str
    question: Question
    repeat: int
    arm: Arm

    @property
    def key(self) -> tuple[str, int | str, int, str]:
        """As `Row.conversation`."""
        return self.dataset, self.question.question_id, self.repeat, self.arm.name


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
    where it stopped. UsageError where `output` is a file of anything else, QuasarError where the pair lacks a model
    that an arm needs.
    """
    refuse_foreign_results(output)
    arms = [ARMS[name] for name in config.arms]
    generators = _warm_generators(pair, arms, datasets, config, progress)
    log = RowLog(output, describe_run(pair, datasets, config), resume)
    conversations = list(schedule(datasets, arms, config.repeats))
    finished = {row.conversation for row in log.rows}
    todo = [conversation for conversation in conversations if conversation.key not in finished]
    for done, conversation in enumerate(todo, start=len(finished)):
        progress("bench", done, len(conversations))
        log.append(lead(generators[conversation.arm.name], conversation, config))
    progress("bench", len(conversations), len(conversations))
    greedy = config.temperature == 0
    return log.finish(find_divergences(pair, datasets, log.rows) if greedy else [])


def schedule(datasets: Sequence[Dataset], arms: Sequence[Arm], repeats: int) -> Iterator[Conversation]:
    """All conversations: a question's arms side by side, in an order that rotates, so that none always goes first."""
    for repeat in range(repeats):
        for dataset in datasets:
            for number, question in enumerate(dataset.questions):
                first = (number + repeat) % len(arms)
                for arm in (*arms[first:], *arms[:first]):
                    yield Conversation(dataset.name, question, repeat, arm)


def _warm_generators(
    pair: Pair, arms: Sequence[Arm], datasets: Sequence[Dataset], config: BenchConfig, progress: Progress
) -> dict[str, Answerer]:
    """A generator for each arm, after a few tokens that are not recorded: first passes pay for allocations."""
    few = Request(min(WARM_UP_TOKENS, config.max_new_tokens), config.seed)
    shortest = min((question.turns[0] for dataset in datasets for question in dataset.questions), key=len)
    prompt_ids = encode_prompt(pair.tokenizer, shortest)
    generators: dict[str, Answerer] = {}
    for done, arm in enumerate(arms):
        progress("warm-up", done, len(arms))
        answerer = TransformersPeer if arm.is_peer else Generator
        generators[arm.name] = answerer(pair, config.generation(arm, config.seed))
        generators[arm.name].generate(prompt_ids, request=few)
    progress("warm-up", len(arms), len(arms))
    return generators


def lead(generator: Answerer, conversation: Conversation, config: BenchConfig) -> list[Row]:
    """One row for each turn, the arm's own answers in the history; the cache is kept between turns.

    A pass that fails is a row with its error, and so is every turn that can no longer be asked.
    """
    generator.reset()
    messages: list[dict[str, str]] = []
    rows: list[Row] = []
    for turn, text in enumerate(conversation.question.turns):
        question_id = conversation.question.question_id
        seed = config.seed_of(conversation.dataset, question_id, turn, conversation.repeat)
        if rows and rows[-1].error is not None:
            rows.append(_row(conversation, turn, seed, error="an earlier turn failed"))
            continue
        messages.append({"role": "user", "content": text})
        request = Request(config.max_new_tokens, seed)
        meter = LoadMeter()
        try:
            result = generator.generate(encode_prompt(generator.pair.tokenizer, messages), request=request)
        except (QuasarError, RuntimeError) as error:
            rows.append(_row(conversation, turn, seed, error=f"{type(error).__name__}: {error}"))
            continue
        messages.append({"role": "assistant", "content": result.text})
        rows.append(replace(_row(conversation, turn, seed, result), others=meter.read().others, mhz=frequency()))
    return rows


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
    )


def describe_run(pair: Pair, datasets: Sequence[Dataset], config: BenchConfig) -> Run:
    """What runs and where, for the result file."""
    return Run(
        config=config,
        model=pair.target_name,
        verifier=pair.verifier_name,
        device=device_name(pair.device),
        dtype=str(pair.dtype).removeprefix("torch."),
        datasets={
            dataset.name: {"questions": len(dataset.questions), "sha256": dataset.sha256} for dataset in datasets
        },
        versions=package_versions(),
        notes=list(pair.notes),
        git=git_hash(),
    )
