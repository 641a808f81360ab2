"""Measure and solve the candidates of `quantize --bits auto` on this device, in the working folder of a job."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from quasar_core.bench.synthetic_models import RandomCheckpoint
from quasar_core.bench.verifiers.choose import (
    HEADS,
    MEAN_BITS,
    UNIFORM_BITS,
    Body,
    Choice,
    Replayed,
    Search,
    between,
    with_head,
)
from quasar_core.bench.verifiers.streamed_target import ConfirmCost, StreamedPasses, StreamedTarget, measure_streamed
from quasar_core.checkpoint.compressed_tensors import PackedWeight
from quasar_core.checkpoint.gptq_format import why_not_packable
from quasar_core.config import GROUP_CHOICES, QuantizeConfig
from quasar_core.decode.costs.cost_records import Pace, cost_record
from quasar_core.decode.costs.pass_costs import PairCosts, PassCost
from quasar_core.errors import QuasarError, UsageError
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.hf.experts import SeparateExperts
from quasar_core.models.loading import describe_passes
from quasar_core.models.pair import Pair
from quasar_core.models.weights.lean_weights import attach_verifier
from quasar_core.models.weights.verifier_head import round_head
from quasar_core.quantize.blocks.activations import Activations
from quasar_core.quantize.blocks.streaming import StreamedModel, find_head
from quasar_core.quantize.calibration import Calibration
from quasar_core.quantize.candidates import Look, Watcher, commit_candidates, solve_head
from quasar_core.quantize.commits import QuantizedBlock, read_commit, write_commit
from quasar_core.quantize.estimate import layer_sizes, shape_of, stored_element
from quasar_core.quantize.job import Job
from quasar_core.quantize.layer_plan import HEAD, LayerPlan
from quasar_core.quantize.mixed_precision import known_widths, spend
from quasar_core.quantize.plan import make_plan
from quasar_core.quantize.run import count_on
from quasar_core.records import Progress, no_progress

LOOK_ROWS = 32  # of the calibration text, for the Hessians of a look


def uniform_bodies(target: StreamedModel, config: QuantizeConfig, groups: Sequence[int]) -> list[Body]:
    """The widths and groups that fit every layer; without groups that are asked for, those that divide all inputs."""
    sizes = layer_sizes(target.skeleton, config).values()
    dividing = [group for group in GROUP_CHOICES if all(inputs % group == 0 for _, inputs in sizes)]
    bits = [bits for bits in UNIFORM_BITS if all(why_not_packable(i, o, bits) is None for o, i in sizes)]
    found = [Body(one, group) for one in bits for group in groups or dividing or GROUP_CHOICES[:1]]
    if not found:
        raise UsageError("--bits auto tries 4 and 8 bits, and neither packs every layer of this model.")
    return found


def mixed_bodies(target: StreamedModel, uniform: Sequence[Body], config: QuantizeConfig) -> list[Body]:
    """Widths by layer between those of the uniform bodies; none for a mixture of experts."""
    few = any(isinstance(module, SeparateExperts) for module in target.skeleton.modules())
    both = {body.bits for body in uniform} == set(UNIFORM_BITS)
    return [] if few or not both else [Body(bits, config.groups_of) for bits in MEAN_BITS]


def possible_heads(target: StreamedModel) -> list[int]:
    """The widths of the head that can be packed."""
    try:
        head = find_head(target.skeleton)[1]
    except QuasarError:  # it has none of its own, which stays as it is
        return [16]
    fits = {bits: why_not_packable(head.in_features, head.out_features, bits) is None for bits in HEADS if bits < 16}
    return [16, *(bits for bits, fit in fits.items() if fit)]


def codes_size(target: StreamedModel, config: QuantizeConfig, stored: int) -> int:
    """Bytes of a verifier's packed layers, by the plan's formula."""
    shape = shape_of(target.skeleton, config, stored)
    return make_plan(shape, config).checkpoint - shape.stored * shape.other_weights


class CandidateCosts:
    """What passes of verifiers of a loaded target cost, by random codes of their layouts; remembered on the disk."""

    def __init__(
        self,
        pair: Pair,
        config: QuantizeConfig,
        progress: Progress = no_progress,
        streaming: StreamedTarget | None = None,
    ) -> None:
        if not isinstance(pair.target, LeanDecoder):
            raise UsageError(f"--bits auto times our own decoder, and {pair.target_name} does not run on it.")
        self._pair, self._target, self._config, self._progress = pair, pair.target, config, progress
        self._streaming = streaming if pair.target.streamed else None
        self._passes: StreamedPasses | None = None
        self._confirm: ConfirmCost | None = None
        self._known: dict[tuple[Body, int], PassCost] = {}
        self.widths: dict[Body, Mapping[str, tuple[int, int]]] = {}  # of mixed bodies, by the layers' stored names
        self._troubles: list[str] = []

    def confirm(self, codes: int) -> ConfirmCost | None:
        """The target's passes beside a verifier of so many bytes; None where memory does not hold both."""
        if self._streaming is None:
            if not self._confirm:
                record = cost_record(self._pair, "target")
                self._doubt(record.trouble)
                self._confirm = ConfirmCost(record.cost)
            return self._confirm
        if self._passes is None:
            self._progress("measuring streamed passes", 0, 1)
            self._passes = measure_streamed(self._pair)
            self._progress("measuring streamed passes", 1, 1)
        share = self._streaming.share(codes)
        return None if share is None else self._passes.confirm(share)

    def of(self, body: Body, head: int) -> PassCost:
        """Seconds of a verifier's passes, measured once for a body and a head."""
        if (body, head) not in self._known:
            self._known[body, head] = self._measure(body, head)
        return self._known[body, head]

    def _measure(self, body: Body, head: int) -> PassCost:
        self._progress(f"measuring passes: {body.describe()}, head {head}", 0, 1)
        codes = replace(body.config(self._config, head), mean_bits=None)
        widths = self.widths.get(body)
        verifier = attach_verifier(
            self._target, RandomCheckpoint(self._target.config, codes, self._target.dtype, widths=widths)
        )
        if self._streaming is None:
            round_head(verifier)  # as loading does
        describe_passes({"verifier": verifier})
        pace = self._pace()
        beside = f", beside a target of {1e6 * pace.usual:.0f} µs" if pace else ""  # remembered for the same one alone
        name = f"random codes: {body.describe()}, head {head}{_digest(widths)}{beside}"
        pair = replace(self._pair, verifier=verifier, verifier_fingerprint=name, measured={})
        record = cost_record(pair, "verifier", pace=pace)
        self._doubt(record.trouble)
        self._progress(f"measuring passes: {body.describe()}, head {head}", 1, 1)
        return record.cost

    def _pace(self) -> Pace | None:
        """The target's, beside which candidates are timed; none where it streams, as its passes go by the disk."""
        usual = None if self._streaming else self.confirm(0)
        return Pace(self._target, usual.cost(1)) if usual else None

    @property
    def trouble(self) -> str | None:
        """Why costs may be another program's doing."""
        count = len(self._troubles)
        return f"{self._troubles[0]}{f' (so too {count - 1} more)' if count > 1 else ''}" if count else None

    def _doubt(self, trouble: str | None) -> None:
        if trouble is not None:
            self._troubles.append(trouble)


def _digest(widths: Mapping[str, tuple[int, int]] | None) -> str:
    """What tells widths by layer from others of the same mean."""
    return "" if widths is None else ", layers " + " ".join(f"{bits}/{group}" for bits, group in widths.values())


class Choosing:
    """One choice: candidates are committed to folders of the job, read along held-out text, and replayed."""

    def __init__(
        self,
        job: Job,
        target: StreamedModel,
        calibration: Calibration,
        costs: CandidateCosts,
        heads: Sequence[int],
        progress: Progress = no_progress,
    ) -> None:
        self.job, self.target, self.calibration = job, target, calibration
        self.costs, self.heads, self._progress = costs, heads, progress
        self._stored = stored_element(job.source)
        self._watcher: Watcher | None = None
        self._replayed: Replayed | None = None

    def choose(self, uniform: Sequence[Body], mixed: Sequence[Body]) -> Choice:
        """The table of what was tried and of what was not worth trying."""
        self._uniform = uniform
        search = Search(self.heads, self._cost, self._confirm, self._try, self._rate, self._size)
        choice = search.run(uniform, mixed)
        assert self._replayed is not None
        return replace(choice, tokens=self._replayed.tokens, trouble=self.costs.trouble)

    def _rate(self, look: Look, costs: PairCosts) -> float:
        assert self._replayed is not None
        return self._replayed.rate(look, costs)

    def _cost(self, body: Body, head: int) -> PassCost:
        """Measured for each body, and for each head beside the first body, whatever the head adds there.

        A mixed body whose widths are not known lies between the uniform ones.
        """
        first, usual = self._uniform[0], self.heads[0]
        if body.mixed and body not in self.costs.widths:
            low, high = (self.costs.of(Body(bits, body.group_size), usual) for bits in UNIFORM_BITS)
            own = between(low, high, (body.bits - UNIFORM_BITS[0]) / (UNIFORM_BITS[1] - UNIFORM_BITS[0]))
        else:
            own = self.costs.of(body, usual)
        return own if head == usual else with_head(own, self.costs.of(first, head), self.costs.of(first, usual))

    def _confirm(self, body: Body, head: int) -> ConfirmCost | None:
        return self.costs.confirm(codes_size(self.target, body.config(self.job.config, head), self._stored))

    def _size(self, body: Body, head: int) -> int:
        """Bytes of the checkpoint, by the plan's formula."""
        config = body.config(self.job.config, head)
        return make_plan(shape_of(self.target.skeleton, config, self._stored), config).checkpoint

    def _try(self, bodies: Sequence[Body]) -> dict[tuple[Body, int], Look]:
        """Solve bodies together, and look at each with each head."""
        plans = {self._folder(body): self._plan(body) for body in bodies}
        samples = self.calibration.samples[:LOOK_ROWS]
        outputs = commit_candidates(self.target, samples, plans, self._progress)
        watcher = self._begin(samples, outputs)
        looks = {}
        for body in bodies:
            states = watcher.read(self._folder(body), self._progress)
            for head in self.heads:
                looks[body, head] = watcher.look(states, self._head(head))
        return looks

    def _begin(self, samples: torch.Tensor, outputs: Activations) -> Watcher:
        """What the first try finds for all: the target's own choices, what drafts begin with, the heads."""
        if self._watcher is None:
            self._watcher = Watcher(self.target, self.calibration)
            known = count_on(self.target, replace(self.calibration, samples=samples), outputs, self._progress)
            self._replayed = Replayed(self.calibration.greedy, known)
            for bits in self.heads:
                self._commit_head(bits, outputs)
        return self._watcher

    def _commit_head(self, bits: int, outputs: Activations) -> None:
        file = self._head_file(bits)
        if bits < 16 and not file.exists():
            options = LayerPlan.of(replace(self.job.config, lm_head_bits=bits)).solver(HEAD)
            write_commit(file, QuantizedBlock({HEAD: solve_head(self.target.ends(), outputs, options)}, {}))

    def _head(self, bits: int) -> PackedWeight | None:
        """The head in so many bits; None where the target's own stays."""
        return None if bits == 16 else read_commit(self._head_file(bits)).weights[HEAD]

    def _head_file(self, bits: int) -> Path:
        return self.job.commits / f"candidate-head-{bits}.safetensors"

    def _plan(self, body: Body) -> LayerPlan:
        """How each layer is solved; for widths by layer what each of them costs is measured first."""
        config = body.config(self.job.config, 16)
        plan = LayerPlan.of(config)
        if not body.mixed:
            return plan
        groups = known_widths(self.job, self.target, self.calibration, self._progress)
        plan = spend(plan, groups, body.bits, config.widths)
        stored: Callable[[str], str] = self.target.stored
        self.costs.widths[body] = {stored(name): (one.bits, one.group_size) for name, one in plan.layers.items()}
        return plan

    def _folder(self, body: Body) -> Path:
        return self.job.commits / f"candidate-{body.bits:g}-{body.group_size}"
