"""The server's endpoints: who may ask, how much, and what is done where a client goes away."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from quasar_core.errors import UsageError
from quasar_core.files import require_characters
from quasar_core.models.pair import Pair
from quasar_core.serve.asks import content_text
from quasar_core.serve.chat import read_chat, read_messages, stream_chat, whole_chat
from quasar_core.serve.completions import read_completion, stream_completion, whole_completion
from quasar_core.serve.errors import ApiError, refused
from quasar_core.serve.fields import Fields
from quasar_core.serve.job import Job
from quasar_core.serve.metrics import Metrics
from quasar_core.serve.replies import Head
from quasar_core.serve.served import Served
from quasar_core.serve.settings import LOCAL, Settings
from quasar_core.serve.worker import Worker

PAGE = Path(__file__).parent / "page"
BODY_SECONDS = 30.0  # in which a body must arrive
SHORT_BODY = 2**16  # bytes, which are read sooner than another thread begins
DEEPEST = 64  # objects and lists within one another
POSTED = frozenset({"/v1/chat/completions", "/v1/completions"})
ALIVE = ": working\n\n"  # a comment, which clients skip
PAGE_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'"


class Server:
    """The endpoints of one pair."""

    def __init__(self, pair: Pair, settings: Settings) -> None:
        self.settings, self.served, self.metrics = settings, Served(pair, settings), Metrics()
        self.worker = Worker(self.served, self.metrics)
        self._head = Head("model", "model", self.served.name)

    def app(self) -> Starlette:
        """The ASGI application; its engine runs from startup to shutdown."""
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.guarded(self.show_metrics)),
            Route("/v1/models", self.guarded(self.models)),
            Route("/v1/models/{name:path}", self.guarded(self.model)),
            Route("/v1/chat/completions", self.guarded(self.chat), methods=["POST"]),
            Route("/v1/completions", self.guarded(self.complete), methods=["POST"]),
            Route("/tokenize", self.guarded(self.tokenize), methods=["POST"]),
            Route("/detokenize", self.guarded(self.detokenize), methods=["POST"]),
            Route("/v1/{rest:path}", self.unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ]
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(self.settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
        handlers: dict[Any, Any] = {ApiError: self._refuse, HTTPException: _http_reply, Exception: _defect_reply}
        return Starlette(
            routes=routes,
            middleware=[Middleware(Guard, self.settings), *([cors] if self.settings.origins else [])],
            exception_handlers=handlers,
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.stop)

    def guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint for those who have the key."""

        async def checked(request: Request) -> Response:
            key = self.settings.api_key
            given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
            if key is not None and not hmac.compare_digest(given.encode("utf-8"), key.encode("utf-8")):
                raise ApiError(
                    401, "The API key is missing or wrong: Authorization: Bearer KEY.", code="invalid_api_key"
                )
            return await endpoint(request)

        return checked

    async def unknown(self, request: Request) -> Response:
        """No such endpoint, or not by this method."""
        raise HTTPException(405 if request.url.path in POSTED else 404)

    def _refuse(self, request: Request, error: Exception) -> Response:
        """Tell why a request was not begun, and count it."""
        self.metrics.requests.labels("refused").inc()
        return _error_reply(request, error)

    async def health(self, request: Request) -> Response:
        """Whether it answers."""
        return JSONResponse({"status": "ok", "model": self.served.name})

    async def show_metrics(self, request: Request) -> Response:
        """Prometheus' text."""
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._describe()]})

    async def model(self, request: Request) -> Response:
        """The model by its name."""
        self.served.check_model(request.path_params["name"])
        return JSONResponse(self._describe())

    def _describe(self) -> dict[str, Any]:
        defaults = self.settings.defaults
        modes: dict[str, Any] = {
            "modes": self.served.modes,
            "verify": defaults.verify,
            "drafts": self.served.drafts,
            "draft": defaults.draft,
        }
        names = {"id": self.served.name, "object": "model", "created": self._head.created, "owned_by": "quasar"}
        fidelity = self.served.pair.fidelity
        agreement = None if fidelity is None else fidelity.agreement
        return {**names, "max_model_len": self.served.pair.max_context, **modes, "agreement": agreement}

    async def chat(self, request: Request) -> Response:
        """Answer messages."""
        body = await self._read(request)
        ask = await asyncio.to_thread(read_chat, body, self.served)
        job = self.worker.submit(ask.asks)
        if ask.common.stream:
            return _stream(job, stream_chat(ask, job, self.served))
        return await _reply(request, job, whole_chat(ask, job, self.served))

    async def complete(self, request: Request) -> Response:
        """Go on with prompts."""
        body = await self._read(request)
        ask = await asyncio.to_thread(read_completion, body, self.served)
        job = self.worker.submit(ask.asks)
        if ask.common.stream:
            return _stream(job, stream_completion(ask, job, self.served))
        return await _reply(request, job, whole_completion(ask, job, self.served))

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text, or of messages through the template."""
        fields = Fields(await self._read(request))
        self.served.check_model(fields.take("model"))
        messages, special = fields.take("messages"), fields.flag("add_special_tokens", True)
        text = fields.take("prompt", fields.take("content"))
        wants_texts = fields.flag("return_token_strs")
        fields.end()
        if messages is not None:
            ids = await asyncio.to_thread(self.served.encode_messages, read_messages(messages), {})
        else:
            ids = await asyncio.to_thread(self.served.encode, content_text(text, "prompt"), special)
        found = {"tokens": ids, "count": len(ids), "max_model_len": self.served.pair.max_context}
        return JSONResponse({**found, "token_strs": [self.served.decode([i]) for i in ids]} if wants_texts else found)

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        fields = Fields(await self._read(request))
        self.served.check_model(fields.take("model"))
        ids = fields.take("tokens")
        fields.end()
        if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise refused("tokens must be a list of token ids.", "tokens")
        rows = self.served.pair.primary.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < rows:
            raise refused(f"A token must be from 0 to {rows - 1}.", "tokens")
        text = await asyncio.to_thread(self.served.decode, ids)
        return JSONResponse({"prompt": text, "content": text})

    async def _read(self, request: Request) -> dict[str, Any]:
        """The body as an object, within bounds of size, depth and time."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a page of another site cannot send unasked
            raise ApiError(415, "The body must be sent as application/json.")
        try:
            raw = await asyncio.wait_for(_receive(request, self.settings.most_bytes), BODY_SECONDS)
        except ClientDisconnect:
            raise refused("The client went away before the body had arrived.") from None
        except asyncio.TimeoutError:
            raise ApiError(408, f"The body did not arrive within {BODY_SECONDS:g} seconds.") from None
        return _parse(raw) if len(raw) <= SHORT_BODY else await asyncio.to_thread(_parse, raw)


class Guard:
    """Refuses names that lead here by a trick (DNS rebinding), and says what the page may load."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self.settings.api_key is None and name.strip("[]") not in (*LOCAL, self.settings.host):
            reply: Response = _error_reply(None, ApiError(403, "This server answers requests to this machine only."))
            await reply(scope, receive, send)
            return

        if refusal := self._why_not_origin(scope):
            await _error_reply(None, ApiError(403, refusal))(scope, receive, send)
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = [(b"content-security-policy", PAGE_POLICY.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message["headers"], *policy]}
            await send(message)

        await self.app(scope, receive, send_with_policy)

    def _why_not_origin(self, scope: Any) -> str | None:
        """Why a page of another site may not ask: its browser asks first whether it may (a preflight, OPTIONS)."""
        origin = dict(scope["headers"]).get(b"origin", b"").decode("latin-1")
        if scope["method"] != "OPTIONS" or not origin or origin in self.settings.origins:
            return None
        return f"Pages of {origin} may not ask this server; --cors {origin} would let them."


async def _receive(request: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise ApiError(413, f"The body is larger than {most} bytes.")
        parts.append(part)
    return b"".join(parts)


def _parse(raw: bytes) -> dict[str, Any]:
    """The object that a body is, all of its texts Unicode: half of a character would fail in whatever takes it."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise refused("The body is no JSON.") from None
    if not isinstance(body, dict):
        raise refused("The body must be an object.")
    if _depth(body) > DEEPEST:
        raise refused(f"The body is nested deeper than {DEEPEST}.")
    for name, value in body.items():
        shown = ascii(name)[1:-1]
        try:
            require_characters(json.dumps({name: value}, ensure_ascii=False), shown)
        except UsageError as error:
            raise refused(str(error), shown) from error
    return body


def _depth(value: Any) -> int:
    """How deep objects and lists lie within one another."""
    depth, level = 0, [value]
    while level and depth <= DEEPEST:
        depth += 1
        inner = [v for item in level for v in (item.values() if isinstance(item, dict) else item)]
        level = [item for item in inner if isinstance(item, dict | list)]
    return depth


def _stream(job: Job, chunks: AsyncIterator[dict[str, Any] | None]) -> StreamingResponse:
    """Server-sent events. Where the client goes away, the response is cancelled and so is the job."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield ALIVE if chunk is None else f"data: {_json(chunk)}\n\n"
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield f"data: {_json(error.body())}\n\n"
        finally:
            job.cancelled = True

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


async def _reply(request: Request, job: Job, reply: Awaitable[dict[str, Any]]) -> Response:
    """A whole reply; where the client goes away meanwhile, the job is cancelled."""
    answering, leaving = asyncio.ensure_future(reply), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return Response(_json(answering.result()), media_type="application/json")
        return Response(status_code=499)
    finally:
        job.cancelled = True
        for task in (answering, leaving):
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _error_reply(_: Any, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return JSONResponse(error.body(), error.status, headers)


def _defect_reply(request: Request, error: Exception) -> Response:
    """Tell of a defect in the shape that clients read; the server logs where it happened."""
    return _error_reply(request, ApiError(500, f"Internal error: {type(error).__name__}."))


def _http_reply(request: Request, error: Exception) -> Response:
    """Tell what is not served, and where it is, as clients are often given an address without its /v1."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    sentence = f"{request.method} {path[:200]} is not served here."
    if f"/v1{path}" in (*POSTED, "/v1/models"):
        sentence += " The base URL of a client ends in /v1."
    return JSONResponse(ApiError(error.status_code, sentence).body(), error.status_code, error.headers)
