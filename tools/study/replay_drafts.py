"""Replay drafters over recorded texts: `python -m tools.study.replay_drafts RECORDINGS… --drafters NAMES`.

Of every kind of text the acceptance length (tokens ÷ steps, as if the text were decoded greedily) and the rate beside
plain decoding that passes of the given costs would reach, with the trees that would pay. No model runs, so a run takes
seconds. Rows beside the text are not known, and so are not shown to drafters, although a real pass computes them.
`--successors FOLDER` gives `auto` and `recycle` what is known beside a verifier.
"""

import argparse
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quasar_core.config import GenerationConfig
from quasar_core.decode.costs.pass_costs import PassCost
from quasar_core.decode.policy.lengths import AdaptiveLength, DraftLength, FixedLength
from quasar_core.decode.policy.trees import Branching, Tree
from quasar_core.draft.automaton import SuffixAutomaton
from quasar_core.draft.base import NO_DRAFT, Drafter
from quasar_core.draft.make import Sources, make_drafter
from quasar_core.draft.memory import remember
from quasar_core.draft.successor_file import read_successors
from quasar_core.draft.successors import MOST_TOKENS, KnownSuccessors
from tools.study.draft_texts import Recording, read_recordings

COSTS = "1:8.8,4:9.2,8:11.1,16:16"  # milliseconds of passes, as of a 4-bit model of 135 million parameters on two cores


NODES = 16  # of a tree


@dataclass
class Tally:
    """Tokens that steps yielded, steps, seconds of their passes, and tokens that these passed."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    passed: int = 0

    @property
    def acceptance_length(self) -> float:
        """Tokens ÷ steps."""
        return self.tokens / self.steps

    def speedup(self, plain: float) -> float:
        """Against passes of one token that take `plain` seconds."""
        return self.tokens * plain / self.seconds


def replay(
    recording: Recording,
    drafter: Drafter,
    length: DraftLength,
    cost: PassCost,
    tally: Tally,
    branching: Branching | None = None,
) -> None:
    """Decode the answer of a recording."""
    answer = recording.answer
    drafter.observe(recording.prompt)
    drafter.observe(answer[:1])
    done = 1
    while done < len(answer):
        reach = len(answer) - done - 1
        limit = min(length.limit, reach)
        draft = length.cut(drafter.propose(limit)) if limit > 0 else NO_DRAFT
        last = answer[done - 1]
        tree = branching.grow(last, draft, drafter, reach, NODES) if branching and reach else Tree(last, draft)
        path = follow_text(tree, answer[done:])
        if branching:
            branching.learn(tree, path, 0.0, cost(len(tree.tokens)))
        else:
            length.learn(draft, len(path))
        new = answer[done : done + len(path) + 1]
        if drafter.wants_best:
            rows = recording.best[done : done + len(new)]
            start = len(recording.prompt) + done - 1
            drafter.see(answer[done - 1 : done + len(new) - 1], [row[: drafter.wants_best] for row in rows], start)
        drafter.observe(new)
        done += len(new)
        tally.tokens += len(new)
        tally.steps += 1
        tally.seconds += cost(len(tree.tokens))
        tally.passed += len(tree.tokens)


def follow_text(tree: Tree, text: Sequence[int]) -> list[int]:
    """The nodes behind the first that a text goes through."""
    behind = {key: node for node, key in enumerate(zip(tree.parents, tree.tokens, strict=True))}
    path = list[int]()
    for token in text:
        node = behind.get((path[-1] if path else 0, token))
        if node is None:
            break
        path.append(node)
    return path


def parse_costs(text: str) -> PassCost:
    """Costs such as 1:8.8,8:11.1, in tokens and milliseconds."""
    pairs = sorted((int(size), float(taken) / 1000) for size, taken in (pair.split(":") for pair in text.split(",")))
    return PassCost(tuple(size for size, _ in pairs), tuple(seconds for _, seconds in pairs))


def replay_all(
    recordings: Sequence[Recording],
    name: str,
    cost: PassCost,
    config: GenerationConfig,
    fixed: int | None = None,
    known: KnownSuccessors | None = None,
) -> dict[str, Tally]:
    """Tallies by kind of text, and over all. What is learned of drafts goes from answer to answer, as in a bench."""
    sources = Sources(memory=SuffixAutomaton() if name == "auto" else None, known=known)
    length: DraftLength = FixedLength(fixed, sources.acceptance) if fixed else AdaptiveLength(cost, sources.acceptance)
    branching = Branching(length, NODES) if isinstance(length, AdaptiveLength) and config.trees else None
    tallies: dict[str, Tally] = defaultdict(Tally)
    for recording in recordings:
        if isinstance(length, AdaptiveLength):
            length.begin()
        drafter = make_drafter(replace(config, draft=name), sources)
        replay(recording, drafter, length, cost, tallies[recording.kind], branching)
        if sources.memory is not None:
            remember(sources.memory, recording.answer)
    counts = [(tally.tokens, tally.steps, tally.seconds, tally.passed) for tally in tallies.values()]
    tallies["all"] = Tally(*(sum(column) for column in zip(*counts, strict=True)))
    return tallies


def show_costs(recordings: Sequence[Recording], name: str, config: GenerationConfig) -> None:
    """Bytes that a drafter holds for each token of its text, and microseconds to follow one and to propose 8."""
    text = [token for recording in recordings for token in (*recording.prompt, *recording.answer)]
    tracemalloc.start()
    kept = follow(name, text, config)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del kept
    start = time.perf_counter()
    drafter = follow(name, text, config)
    followed = time.perf_counter()
    for _ in range(1000):
        drafter.propose(8)
    asked = time.perf_counter()
    print(
        f"{name:12} {held / len(text):6.0f} bytes a token, {1e6 * (followed - start) / len(text):6.2f} µs to follow "
        f"one, {1e3 * (asked - followed):6.1f} µs to propose 8, after {len(text):,} tokens"
    )


def follow(name: str, text: Sequence[int], config: GenerationConfig) -> Drafter:
    """A drafter that has read a text and is ready to propose."""
    drafter = make_drafter(replace(config, draft=name), Sources())
    drafter.observe(text)
    drafter.propose(1)
    return drafter


def main() -> None:
    """Print a line for each drafter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recordings", type=Path, nargs="+")
    parser.add_argument("--drafters", default="ngram,suffix,auto")
    parser.add_argument("--costs", default=COSTS, help="milliseconds of passes by their tokens")
    parser.add_argument("--successors", type=Path, metavar="FOLDER", help="a verifier's, whose successors are known")
    parser.add_argument("--no-trees", action="store_true", help="chains alone")
    parser.add_argument("--fixed", type=int, help="always draft so many tokens")
    parser.add_argument("--costs-of-drafters", action="store_true", help="their bytes and seconds instead")
    arguments = parser.parse_args()
    recordings, cost = read_recordings(arguments.recordings), parse_costs(arguments.costs)
    known = read_successors(arguments.successors, MOST_TOKENS) if arguments.successors else None
    config = GenerationConfig(trees=not arguments.no_trees)
    for name in arguments.drafters.split(","):
        if arguments.costs_of_drafters:
            show_costs(recordings, name, config)
            continue
        tallies = replay_all(recordings, name, cost, config, arguments.fixed, known)
        columns = [
            f"{kind} {tally.acceptance_length:.2f} ({tally.speedup(cost(1)):.2f}×)" for kind, tally in tallies.items()
        ]
        rows = tallies["all"].passed / tallies["all"].steps
        print(f"{name:12}", "  ".join(columns), f" tokens a pass {rows:.1f}")


if __name__ == "__main__":
    main()
