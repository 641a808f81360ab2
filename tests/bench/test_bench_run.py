"""A bench run over models that count: order, seeds, turns, failures, resuming."""

import json
from pathlib import Path

import pytest
from helpers.bench_pair import ALL, DATASET, CountingModel, config, make_pair

from quasar_cli.commands.bench import BenchOptions
from quasar_core.bench.arms import ARMS, parse_arms
from quasar_core.bench.datasets import Dataset, Question
from quasar_core.bench.metrics.arm_metrics import measure
from quasar_core.bench.results import Row, read_results
from quasar_core.bench.run import run_bench, schedule
from quasar_core.decode.generator import Generator
from quasar_core.errors import QuasarError, UsageError
from quasar_core.records import GenerationResult


def answers(rows: list[Row], arm: str) -> list[list[int]]:
    of_arm = [row for row in rows if row.arm == arm]
    return [row.token_ids for row in sorted(of_arm, key=lambda row: (row.repeat, str(row.question_id), row.turn))]


def test_every_arm_answers_every_turn(tmp_path: Path) -> None:
    pair = make_pair(verifier=CountingModel(wrong_after=6))
    results = run_bench(pair, [DATASET], config(), tmp_path / "results.json")
    assert len(results.rows) == 4 * 4
    assert answers(results.rows, "vanilla")[0] == [4, 5, 6, 7, 8, 9, 3, 4, 5, 6, 7, 8]
    for arm in ("ngram", "exact"):
        assert answers(results.rows, arm) == answers(results.rows, "vanilla")
    assert answers(results.rows, "quantized") != answers(results.rows, "vanilla")
    for row in results.rows:
        assert row.stats is not None
        assert row.stats.new_tokens == len(row.token_ids) == 12
        assert row.finish_reason == "length"
    identical = {metric.arm: metric.identical for metric in measure(results)}
    assert identical == {"vanilla": 3, "ngram": 3, "quantized": 0, "exact": 3}


def test_the_result_file_says_everything_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results = run_bench(make_pair(CountingModel(6)), [DATASET], config(repeats=2), path)
    assert read_results(path) == results
    assert not list(path.parent.glob("*.partial.jsonl"))
    content = json.loads(path.read_text())
    assert content["format_version"] == 2
    assert content["config"]["arms"] == list(ALL)
    assert {"python", "torch", "transformers", "quasar-cli"} <= set(content["versions"])
    assert content["datasets"] == {"d": {"questions": 3, "sha256": DATASET.sha256, "source": "nowhere"}}
    step = content["rows"][1]["stats"]["step_log"][0]
    names = {"drafted", "accepted", "pieces", "by_target", "margins", "draft_s", "seconds", "target_margins"}
    names |= {"let_through", "left_out"}
    assert set(step) == names


def test_a_file_whose_steps_tell_a_match_length_is_read(tmp_path: Path) -> None:
    """As files of before drafts had pieces do."""
    path = tmp_path / "results.json"
    results = run_bench(make_pair(CountingModel(6)), [DATASET], config(("vanilla", "ngram")), path)
    content = json.loads(path.read_text())
    for row in content["rows"]:
        for step in row["stats"]["step_log"]:
            step["match_length"] = step.pop("pieces")[0]["sureness"] if step["drafted"] else 0
    path.write_text(json.dumps(content))
    assert read_results(path) == results


def test_a_turn_continues_its_own_arms_conversation_from_the_cache(tmp_path: Path) -> None:
    pair = make_pair(verifier=CountingModel(wrong_after=6))
    rows = run_bench(pair, [DATASET], config(("vanilla", "quantized")), tmp_path / "r.json").rows
    for row in rows:
        assert row.stats is not None
        if row.turn == 1:
            # user, two words, assistant, twelve words, user, two words
            assert row.stats.prompt_tokens == 1 + 2 + 1 + 12 + 1 + 2
            assert row.stats.cached_tokens >= 3
        else:
            assert row.stats.cached_tokens == 0


def test_the_order_of_the_arms_rotates() -> None:
    order = [job.arm.name for job in schedule([DATASET], parse_arms("vanilla,ngram,exact"), 2)]
    first = ["vanilla", "ngram", "exact"]
    second, third = ["ngram", "exact", "vanilla"], ["exact", "vanilla", "ngram"]
    assert order == [*first, *second, *third, *second, *third, *first]


def test_an_answer_has_one_seed_for_all_arms(tmp_path: Path) -> None:
    run = config(("vanilla", "ngram"), repeats=2, temperatures=(1.0,))
    rows = run_bench(make_pair(), [DATASET], run, tmp_path / "r.json").rows
    seeds = {arm: {(r.question_id, r.turn, r.repeat): r.seed for r in rows if r.arm == arm} for arm in run.arms}
    assert seeds["vanilla"] == seeds["ngram"]
    assert len(set(seeds["vanilla"].values())) == len(seeds["vanilla"]) == 8


def test_a_failing_question_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    questions = (Question(1, "c", ("w3 w11 w3", "w3")), Question(2, "c", ("w5",)))
    pair = make_pair(target=CountingModel(fails_on=11))
    results = run_bench(pair, [Dataset("d", questions)], config(("vanilla", "ngram")), tmp_path / "r.json")
    assert [(row.question_id, row.turn, row.error) for row in results.rows if row.arm == "ngram"] == [
        (1, 0, "RuntimeError: out of memory"),
        (1, 1, "an earlier turn failed"),
        (2, 0, None),
    ]
    assert len(results.errors) == 4
    assert {metric.failed for metric in measure(results)} == {1}


class Interrupting:
    """Generator.generate, interrupted at a given call."""

    def __init__(self, at: int) -> None:
        self.left, self.generate = at, Generator.generate

    def __call__(self, generator: Generator, *given: object, **named: object) -> GenerationResult:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.generate(generator, *given, **named)  # type: ignore[arg-type]


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a run that was stopped in the second turn of the fourth conversation."""
    output = tmp_path / "results.json"
    with monkeypatch.context() as patched:
        interrupting = Interrupting(at=2 + 2 + 3)  # warm-up; question 1; question 2's first arm, and one turn more
        patched.setattr(Generator, "generate", lambda *given, **named: interrupting(*given, **named))
        with pytest.raises(KeyboardInterrupt):
            run_bench(make_pair(), [DATASET], config(("vanilla", "ngram")), output)
    return output


def test_an_interrupted_run_goes_on(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not interrupted.exists()
    log = interrupted.with_name("results.json.partial.jsonl")
    assert len(log.read_text().splitlines()) == 1 + 3
    with log.open("a") as file:
        file.write('[{"dataset": "d", "quest')  # the machine went down in the middle of a line
    counting = Interrupting(at=99)
    monkeypatch.setattr(Generator, "generate", lambda *given, **named: counting(*given, **named))
    results = run_bench(make_pair(), [DATASET], config(("vanilla", "ngram")), interrupted)
    assert 99 - counting.left == 2 + 2 + 2  # warm-up; question 2's second arm; question 3
    assert len(results.rows) == 8
    assert len({(*row.conversation, row.turn) for row in results.rows}) == 8
    assert read_results(interrupted) == results


def test_another_runs_log_is_refused_in_a_sentence(interrupted: Path) -> None:
    with pytest.raises(UsageError, match=r"other settings \(max_new_tokens 12, now 13\).*--no-resume"):
        run_bench(make_pair(), [DATASET], config(("vanilla", "ngram"), max_new_tokens=13), interrupted)
    results = run_bench(
        make_pair(), [DATASET], config(("vanilla", "ngram"), max_new_tokens=13), interrupted, resume=False
    )
    assert {len(row.token_ids) for row in results.rows} == {13}


def test_a_failed_conversation_is_tried_again(interrupted: Path) -> None:
    log = interrupted.with_name("results.json.partial.jsonl")
    lines = log.read_text().splitlines()
    (row,) = json.loads(lines[1])
    lines[1] = json.dumps([{**row, "stats": None, "token_ids": [], "error": "out of memory"}])
    log.write_text("\n".join(lines) + "\n")
    results = run_bench(make_pair(), [DATASET], config(("vanilla", "ngram")), interrupted)
    assert results.errors == []
    assert len(results.rows) == 8


def test_a_damaged_log_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "r.json.partial.jsonl").write_text("{}\n")
    with pytest.raises(QuasarError, match=r"damaged; pass --no-resume"):
        run_bench(make_pair(), [DATASET], config(("vanilla",)), tmp_path / "r.json")


def test_an_arm_without_its_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuasarError, match="needs a verifier"):
        run_bench(make_pair(), [DATASET], config(("vanilla", "quantized")), tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_arms_by_name() -> None:
    assert [arm.name for arm in parse_arms(" exact, vanilla,exact")] == ["exact", "vanilla"]
    assert {name: (arm.verify, arm.draft) for name, arm in ARMS.items()} == {
        "vanilla": ("full", "none"),
        "ngram": ("full", "ngram"),
        "full": ("full", "auto"),
        "quantized": ("quantized", "auto"),
        "exact": ("exact", "auto"),
        "gated": ("gated", "auto"),
        "suffix": ("full", "suffix"),
        "recycle": ("full", "recycle"),
        "recycle-chain": ("full", "recycle"),
        "assistant": ("full", "assistant"),
        "layer-skip": ("full", "layer-skip"),
        "mtp": ("full", "mtp"),
        "exact-mtp": ("exact", "mtp"),
        "quantized-ngram": ("quantized", "ngram"),
        "exact-ngram": ("exact", "ngram"),
        "quantized-only": ("quantized", "none"),
        "vanilla-again": ("full", "none"),
        "transformers": ("full", "none"),
        "transformers-pld": ("full", "ngram"),
        "transformers-assisted": ("full", "none"),
        "llama.cpp": ("full", "none"),
        "llama.cpp-spec": ("full", "ngram"),
        "vllm": ("full", "none"),
        "vllm-ngram": ("full", "ngram"),
        "vllm-draft": ("full", "none"),
    }
    with pytest.raises(UsageError, match=r"--arms must be a list of vanilla, .*, not fast, slow\."):
        parse_arms("fast,vanilla,slow")
    with pytest.raises(UsageError, match="not empty"):
        parse_arms(" , ")


def test_profiles_set_what_is_not_given() -> None:
    usual, quick, paper = (BenchOptions(profile=name).config() for name in (None, "quick", "paper"))
    assert (usual.max_new_tokens, usual.repeats, usual.temperatures, usual.num_draft_tokens) == (256, 1, (0.0,), "auto")
    assert (quick.max_new_tokens, quick.repeats, quick.temperatures, quick.num_draft_tokens) == (64, 1, (0.0,), "auto")
    assert (paper.max_new_tokens, paper.repeats, paper.temperatures, paper.num_draft_tokens) == (1024, 3, (0.0, 1.0), 5)
    given = BenchOptions(profile="paper", repeats=1, temperature="0").config()
    assert (given.max_new_tokens, given.repeats, given.temperatures) == (1024, 1, (0.0,))


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"limit": 0}, "--limit"),
        ({"repeats": 0}, "--repeats"),
        ({"repeats": 10**9}, "--repeats"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"temperatures": (-1.0,)}, "--temperature"),
        ({"temperatures": (0.0, 0.0)}, "--temperature"),
        ({"temperatures": ()}, "--temperature"),
        ({"num_draft_tokens": 0}, "--num-draft-tokens"),
        ({"window": 0}, "--window"),
        ({"fidelity": 1.0}, "--fidelity"),
        ({"arms": ("gated",), "window": 3}, "--window"),
    ],
)
def test_a_config_that_cannot_be_names_its_flag(changes: dict[str, object], flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        config(**changes)


def test_progress_counts_conversations(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    run_bench(
        make_pair(),
        [DATASET],
        config(("vanilla", "ngram")),
        tmp_path / "r.json",
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    assert seen[:3] == [("loading arms", done, 2) for done in range(3)]
    assert seen[3:6] == [("warm-up", done, 2) for done in range(3)]
    assert seen[6:] == [("bench", done, 6) for done in range(7)]
