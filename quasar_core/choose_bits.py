"""`quantize --bits auto`: choose the verifier that makes `exact` fastest on this device, then make it.

A choice is kept in quasar's folder by all that it depends on: so an interrupted run goes on with what was chosen, and
the same command never chooses twice. The calibration text that candidates were tried on is that of the verifier.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from quasar_core.api import decoding, quantizing
from quasar_core.bench.verifiers.choose import UNIFORM_BITS, Body, Choice
from quasar_core.bench.verifiers.streamed_target import StreamedTarget
from quasar_core.bench.verifiers.try_candidates import (
    LOOK_ROWS,
    CandidateCosts,
    Choosing,
    codes_size,
    mixed_bodies,
    possible_heads,
    uniform_bodies,
)
from quasar_core.config import LoadOptions, Offload, QuantizeConfig
from quasar_core.errors import UsageError
from quasar_core.files import exists
from quasar_core.kernels.times import measured_on
from quasar_core.load_pair import dtype_of_source
from quasar_core.models.context import context_limit
from quasar_core.models.memory.offload import can_stream
from quasar_core.models.pair import load_tokenizer
from quasar_core.models.weights.lean_weights import why_folder_not_lean
from quasar_core.quantize.blocks.streaming import StreamedModel, quantized_layers
from quasar_core.quantize.estimate import plan_here, stored_element, with_seconds
from quasar_core.quantize.job import Job, working_folder
from quasar_core.quantize.layer_plan import LayerPlan
from quasar_core.quantize.plan import Plan, refuse_what_cannot_fit
from quasar_core.quantize.run import calibrate, check_request
from quasar_core.records import Progress, Tell, no_progress, tell_nobody
from quasar_core.store import default_output, resolve_model
from quasar_core.store.folders import refuse_existing, refuse_foreign_work, remove_work
from quasar_core.store.measured import Measured, measured_file
from quasar_core.system import package_version

KIND, NAME = "choices", "choice"


@dataclass(frozen=True)
class Wanted:
    """What is asked for: the model, all of the config that is not chosen, group sizes and heads that are fixed."""

    model: str
    config: QuantizeConfig
    groups: tuple[int, ...] = ()  # none: all that divide the inputs of every layer
    heads: tuple[int, ...] = ()  # none: all that can be packed
    output: Path | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    offload: Offload = "auto"  # as decoding will have it, and within so many bytes of memory; None: what is free
    decode_memory: int | None = None

    def __post_init__(self) -> None:
        if self.decode_memory is not None and self.offload == "none":
            raise UsageError("--decode-memory says what stays in memory; leave --offload none out.")
        if self.config.method != "gptq" or self.config.backend != "native" or self.config.mixed:
            raise UsageError(
                "--bits auto chooses among GPTQ's widths by our own solver: leave --method, --backend, --mixed and "
                "--target-agreement out."
            )


@dataclass(frozen=True)
class Candidates:
    """What a choice is made among, the job in whose working folder that is done, and the target."""

    uniform: list[Body]
    mixed: list[Body]
    heads: list[int]
    job: Job
    target: StreamedModel
    streaming: StreamedTarget | None = None  # where blocks of the target are streamed beside some of them

    def describe(self) -> list[str]:
        """Each body's codes in words; each is tried with every head."""
        return [body.describe() for body in (*self.uniform, *self.mixed)]

    @property
    def kept(self) -> Measured[Choice]:
        """Where the choice among them is kept."""
        conditions = {
            "run": self.job.digest(),
            "candidates": "; ".join(self.describe()),
            "heads": ", ".join(map(str, self.heads)),
            **self._memory(),
            "quasar": package_version("quasar-cli"),
            **measured_on(self.target.device, self.target.dtype),
        }
        return Measured(measured_file(KIND, conditions), conditions, Choice.parse, Choice.to_dict)

    def _memory(self) -> dict[str, str]:
        """What streaming depends on: memory that happens to be free does not make another choice."""
        if self.streaming is None:
            return {}
        moved = "all blocks" if self.streaming.moves_all else "what does not fit"
        return {"streamed": moved, "memory": str(self.streaming.allowed or "what is free")}


def find_candidates(wanted: Wanted) -> Candidates:
    """Everything that can be tried; raises as `quantizing.quantize` does of what it refuses before any work."""
    obstacle = why_folder_not_lean(resolve_model(wanted.model).folder)
    if obstacle:
        raise UsageError(f"--bits auto times passes of our own decoder, which does not run {wanted.model}: {obstacle}.")
    config = replace(wanted.config, group_size=wanted.groups[0] if wanted.groups else None)
    _, job, target = quantizing.open_job(
        wanted.model, config, wanted.output, wanted.device, wanted.trust_remote_code, tell_nobody
    )
    uniform = uniform_bodies(target, job.config, wanted.groups)
    heads = list(wanted.heads or possible_heads(target))
    for bits in wanted.heads:
        quantized_layers(target.skeleton, LayerPlan.of(replace(job.config, lm_head_bits=bits)))
    working = replace(job, output=job.output.with_name(f"{job.output.name}-choosing"))
    mixed = mixed_bodies(target, uniform, job.config)
    return _that_fit(Candidates(uniform, mixed, heads, working, target), find_streaming(wanted, job, target))


def find_streaming(wanted: Wanted, job: Job, target: StreamedModel) -> StreamedTarget | None:
    """The target as decoding will stream it; None where it is not to. UsageError where it cannot, and was to."""
    folder, moves_all = job.source, wanted.offload == "target"
    flag = None if wanted.decode_memory is None else "--decode-memory"
    obstacle = why_folder_not_lean(folder)
    if target.device.type != "cpu":
        obstacle = f"--bits auto plans them for the CPU alone so far, and the device is {target.device}"
    if wanted.offload == "none" or not can_stream(obstacle, moves_all, flag):
        return None
    dtype, _ = dtype_of_source(folder, "auto", target.device)
    context = context_limit(folder, wanted.trust_remote_code)
    return StreamedTarget.of(folder, dtype, context, moves_all, wanted.decode_memory)


def _that_fit(found: Candidates, streaming: StreamedTarget | None) -> Candidates:
    """Candidates beside which a target fits that is streamed as far as it must; all of them where none has to.

    UsageError where none does.
    """
    if streaming is None:
        return found

    def share(body: Body) -> float | None:
        config = body.config(found.job.config, found.heads[0])
        return streaming.share(codes_size(found.target, config, stored_element(found.job.source)))

    shares = {body: share(body) for body in (*found.uniform, *found.mixed)}
    if not any(shares.values()) and None not in shares.values():
        return found
    uniform, mixed = ([body for body in some if shares[body] is not None] for some in (found.uniform, found.mixed))
    if not uniform:
        raise UsageError(
            f"--decode-memory {streaming.allowed} holds no verifier of {found.job.target_name} beside what its passes "
            "need, even with all blocks of the target streamed."
        )
    ends = {body.bits for body in uniform} == set(UNIFORM_BITS)  # what widths by layer cost lies between theirs
    return replace(found, uniform=uniform, mixed=mixed if ends else [], streaming=streaming)


def plan_choice(wanted: Wanted, max_memory: int | None = None) -> tuple[Candidates, Plan]:
    """The candidates, and what choosing and making the largest of them would take at most; nothing is written."""
    found = find_candidates(wanted)
    check_request(found.job, found.target, load_tokenizer(found.job.source, wanted.trust_remote_code))
    return found, _plan(found, max_memory, timed=True)


def choose(
    wanted: Wanted,
    *,
    force: bool = False,
    resume: bool = True,
    max_memory: int | None = None,
    progress: Progress = no_progress,
    tell: Tell = tell_nobody,
) -> tuple[QuantizeConfig, Choice]:
    """Choose a verifier; its config, of which `quantize` goes on (with `resume`), and what it was chosen from.

    Without `resume` it is chosen anew. Raises as `quantize` does, and UsageError for a model whose passes are not
    our own decoder's.
    """
    if wanted.output is not None:
        refuse_existing(wanted.output, force)
    found = find_candidates(wanted)
    known = found.kept.get(NAME) if resume else None
    if known:
        refuse_existing(_job_of(wanted, known.value).output, force)
        tell("This was chosen by an earlier run; --no-resume chooses anew.")
        _clear(found.job)
    elif wanted.output is None and not force:
        _refuse_existing_candidates(wanted, found)
    choice = known.value if known else _choose(wanted, found, resume, max_memory, progress)
    return choice.config(wanted.config), choice


def _refuse_existing_candidates(wanted: Wanted, found: Candidates) -> None:
    """Where a choice goes depends on it: UsageError where a place that may be chosen is taken."""
    source, head = resolve_model(wanted.model), found.heads[0]  # which no name tells
    for body in (*found.uniform, *found.mixed):
        if exists(output := default_output(source, body.config(wanted.config, head))):
            raise UsageError(
                f"{output} exists, and {body.describe()} may be chosen: name another place with --output, or pass "
                "--force to replace it then."
            )


def _choose(wanted: Wanted, found: Candidates, resume: bool, max_memory: int | None, progress: Progress) -> Choice:
    """Try candidates in the working folder; hand the text on to the run that follows, and keep the choice."""
    job, target, plan = found.job, found.target, _plan(found, max_memory)
    refuse_what_cannot_fit(plan, job.output)
    tokenizer = load_tokenizer(job.source, wanted.trust_remote_code)
    check_request(job, target, tokenizer)
    options = LoadOptions(
        wanted.model,
        verify="full",
        device=wanted.device,
        trust_remote_code=wanted.trust_remote_code,
        offload="target" if found.streaming else wanted.offload,
    )
    with working_folder(job, resume) as interrupted:
        if interrupted:
            progress(interrupted, 1, 1)
        costs = CandidateCosts(decoding.load(options, progress), job.config, progress, found.streaming)
        calibration = calibrate(job, target, tokenizer, plan.text, progress)
        choosing = Choosing(job, target, calibration, costs, found.heads, progress)
        choice = choosing.choose(found.uniform, found.mixed)
        _hand_on(wanted, choice, job, resume)
        found.kept.keep({NAME: choice})
    _clear(job)
    return choice


def _clear(job: Job) -> None:
    """Remove the working folder of a choice that was made."""
    if job.partial.exists():
        refuse_foreign_work(job.partial)
        remove_work(job.partial)


def _job_of(wanted: Wanted, choice: Choice) -> Job:
    """The run that makes the chosen verifier."""
    _, job, _ = quantizing.open_job(
        wanted.model, choice.config(wanted.config), wanted.output, wanted.device, wanted.trust_remote_code, tell_nobody
    )
    return job


def _hand_on(wanted: Wanted, choice: Choice, tried: Job, resume: bool) -> None:
    """Give the chosen verifier's run the text, and for widths by layer what they were chosen by."""
    job = _job_of(wanted, choice)
    with working_folder(job, resume):
        for name in (tried.calibration.name, "widths.json"):
            source, place = tried.commits / name, job.commits / name
            if source.exists() and not place.exists():
                shutil.copyfile(source, place)


def _plan(found: Candidates, max_memory: int | None, timed: bool = False) -> Plan:
    """What it takes at most: one verifier's run, beside the codes of all candidates and the target as it decodes."""
    job, target = found.job, found.target
    largest = max(found.uniform, key=lambda body: (body.bits, -body.group_size))
    plan = plan_here(job.source, target, largest.config(job.config, max(found.heads)), job.output, max_memory)
    bodies = len(found.uniform) + len(found.mixed)
    seconds = None
    if timed:
        once = with_seconds(target, job.config, plan).seconds
        seconds = None if once is None else once * (1 + bodies * min(1.0, LOOK_ROWS / job.config.samples))
    return replace(plan, disk=plan.disk + bodies * plan.checkpoint, seconds=seconds)
