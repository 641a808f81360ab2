"""One thread that computes: it answers one request after another, and tells each what has come.

A request's events reach its own event loop; a request that nobody reads any more, or whose time is over, ends before
the next pass.
"""

import asyncio
import queue
import threading
from collections.abc import Sequence
from dataclasses import replace

from quasar_core.config import DraftKind, SamplingConfig, VerifyMode
from quasar_core.decode.answering import Answering, Stopped
from quasar_core.decode.generator import Generator
from quasar_core.decode.logits.scores import Scores, score_text
from quasar_core.decode.prefixes import Prefixes
from quasar_core.errors import QuasarError, UsageError
from quasar_core.records import GenerationResult, Progress, no_progress
from quasar_core.serve.asks import Ask
from quasar_core.serve.errors import ApiError
from quasar_core.serve.job import Begun, Finished, Job, Written
from quasar_core.serve.metrics import Metrics
from quasar_core.serve.served import Served
from quasar_core.trace import GrowingOrigins, Maker


class Worker:
    """The thread, its queue, and what is kept between answers."""

    def __init__(self, served: Served, metrics: Metrics) -> None:
        self.served, self.metrics = served, metrics
        settings = served.settings
        self._prefixes = Prefixes(served.pair, settings.prefixes, settings.prefix_positions)
        self._queue: queue.Queue[Job | None] = queue.Queue(settings.queue)
        self._thread = threading.Thread(target=self._work, name="quasar engine", daemon=True)
        self._current: Job | None = None
        self._ended = False
        self._generators: dict[tuple[str, str, bool], Generator] = {}
        metrics.waiting.set_function(self._queue.qsize)

    def prepare(self, progress: Progress = no_progress) -> None:
        """Settle what answers of the default mode need, so that the first request does not wait for it."""
        defaults = self.served.settings.defaults
        self._generator(defaults.verify, defaults.draft, defaults.sampling.greedy, progress)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """End the present answer before its next pass, refuse what waits and what comes, and wait for the thread."""
        if self._ended:
            return
        self._ended = True
        waiting = []
        while not self._queue.empty():
            waiting.append(self._queue.get_nowait())
        for job in filter(None, [*waiting, self._current]):
            job.emit(0, _ending())
            job.cancelled = True
        self._queue.put(None)
        self._thread.join()

    def submit(self, asks: Sequence[Ask]) -> Job:
        """Queue a request; ApiError where too many wait, or the server ends."""
        if self._ended:
            raise _ending()
        job = Job(asks, asyncio.get_running_loop(), self.served.settings.timeout)
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            sentence = f"{self.served.settings.queue} requests wait already; try again later."
            raise ApiError(503, sentence, code="queue_full", retry_after=1) from None
        return job

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            self._current = job
            outcome = self._answer_all(job)
            self._current = None
            self.metrics.requests.labels(outcome).inc()

    def _answer_all(self, job: Job) -> str:
        """Answer a request; what became of it, in a word. Whatever fails is told to the request, and work goes on."""
        try:
            for number, ask in enumerate(job.asks):
                self._answer(job, number, ask)
        except Stopped:
            return "cancelled"
        except ApiError as error:
            job.emit(0, error)
            return "failed"
        except UsageError as error:
            job.emit(0, ApiError(400, str(error)))
            return "failed"
        except QuasarError as error:
            job.emit(0, ApiError(500, str(error)))
            return "failed"
        except Exception as error:
            job.emit(0, ApiError(500, f"Internal error: {type(error).__name__}: {error}"))
            self.metrics.defects.append(error)
            return "failed"
        return "answered"

    def _answer(self, job: Job, number: int, ask: Ask) -> None:
        job.before_pass()
        pair = self.served.pair
        prompt_scores = score_text(pair, ask.prompt_ids, ask.top or 0, job.before_pass) if ask.score_prompt else []
        job.emit(number, Begun(prompt_scores))
        if ask.request.max_new_tokens == 0:
            job.emit(number, Finished(None))
            return
        scores = None if ask.top is None else Scores(ask.top)
        answering = Answering(ask.rules(), job.before_pass, scores, ask.reading, ends=ask.ends)
        greedy = ask.request.sampling is None or ask.request.sampling.greedy
        generator = self._generator(ask.verify, ask.draft, greedy)
        result = self._write(job, number, generator, ask, answering)
        self.metrics.take(result.stats)

    def _write(self, job: Job, number: int, generator: Generator, ask: Ask, answering: Answering) -> GenerationResult:
        """Stream one answer, and tell of each piece."""
        pieces = generator.stream(ask.prompt_ids, ask.request, answering)
        sent, made = 0, None
        while True:
            try:
                text = next(pieces)
            except StopIteration as end:
                result: GenerationResult = end.value
                told, scores = result.token_ids[sent:], answering.scores
                last = scores.tokens[sent : sent + len(told)] if scores else ()
                job.emit(number, Finished(result, told, last))
                return result
            tokens = answering.tokens[sent:]
            found = answering.scores.tokens[sent : sent + len(tokens)] if answering.scores else ()
            sent += len(tokens)
            if ask.trace and made is None:
                assert answering.stats is not None
                made = GrowingOrigins(answering.stats, ask.verify == "exact")
            job.emit(number, Written(text, tokens, found, _maker(made, sent) if made else None))

    def _generator(
        self, verify: VerifyMode, draft: DraftKind, greedy: bool, progress: Progress = no_progress
    ) -> Generator:
        """What is settled once for a mode: the costs of passes, the window, how long to draft."""
        key = (verify, draft, greedy)
        if key not in self._generators:
            sampling = SamplingConfig(0.0 if greedy else 1.0)
            config = replace(self.served.settings.defaults, verify=verify, draft=draft, sampling=sampling, stop=())
            self._generators[key] = Generator(self.served.pair, config, prefixes=self._prefixes, progress=progress)
        return self._generators[key]


def _ending() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="shutting_down")


def _maker(origins: GrowingOrigins, count: int) -> Maker | None:
    """Who made the last of so many tokens."""
    made = origins.read()
    return made[count - 1].by if 0 < count <= len(made) else None
