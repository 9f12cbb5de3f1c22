"""The HTTP side of a rollout server: who may ask, what a request must look like, and how answers stream out.

    GET  /v1/health           the process is up (asks for no token)
    GET  /v1/ready            which weights it serves, or 503
    GET  /v1/metrics          Prometheus text
    POST /v1/generate         one line of JSON for each completion as it ends, bytes of routes behind it where it has
                              some, then {"done": how many}; with the header X-Trace also "trace": what was done when
    POST /v1/update_weights   check and load other weights; answers when they are served
    POST /v1/sleep            give back the memory of the devices, until the next request to generate

Errors are {"error": message, "reason": word} with 400 (what was asked), 401 (token), 408, 409 (other weights), 413
(too large), 422 (damaged weights), 500 (the engine), 503 (not now). The engine's traceback stays in the server's log;
what a client does wrong, or that it went away, leaves none.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import http_exceptions, web
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from nemo_aapo.engines.messages import dump_object, load_object
from nemo_aapo.engines.remote import wire
from nemo_aapo.engines.remote.batch import Answer, Failure, Job
from nemo_aapo.engines.remote.worker import EngineWorker
from nemo_aapo.errors import OtherWeightsError, WeightsError, WireError, one_line
from nemo_aapo.trace import servers as traced_servers
from nemo_aapo.types import Completion

BODY_S = 60.0
"""Seconds within which a request must have arrived."""
STOP_S = 1.0
"""Seconds that handlers get to end when the server stops."""
_STATUS = {"request": 400, "other_weights": 409, "not_finite": 500, "engine": 500, "stopping": 503}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
"""Answers one kind of request."""

logger = logging.getLogger(__name__)
"""What aiohttp has to say of requests that never reached a handler, or of their rest."""


class Service:
    """The handlers, around an ``EngineWorker``."""

    def __init__(self, worker: EngineWorker, token: str, limits: wire.Limits, max_request_bytes: int) -> None:
        self.worker, self.limits = worker, limits
        self._authorization = f"Bearer {token}".encode()
        self._metrics = _Metrics(worker)
        self.app = web.Application(client_max_size=max_request_bytes, middlewares=[self._guard])
        self.app.router.add_get(f"{wire.API}/health", self._health)
        self.app.router.add_get(f"{wire.API}/ready", self._ready)
        self.app.router.add_get(f"{wire.API}/metrics", self._show_metrics)
        self.app.router.add_post(f"{wire.API}/generate", self._generate)
        self.app.router.add_post(f"{wire.API}/update_weights", self._update_weights)
        self.app.router.add_post(f"{wire.API}/sleep", self._sleep)

    def runner(self) -> web.AppRunner:
        """What serves it on a socket. A client that goes away ends its handler, and with it the work done for it."""
        logger.addFilter(_without_clients_traceback)
        return web.AppRunner(
            self.app, access_log=None, logger=logger, handler_cancellation=True, shutdown_timeout=STOP_S
        )

    # ------------------------------------------------------------------ around every request

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Token first, then the handler; whatever goes wrong becomes one JSON message."""
        response: web.StreamResponse
        try:
            if handler != self._health and not self._is_authorized(request):
                response = _error(401, "token", "a valid bearer token is needed: Authorization: Bearer TOKEN")
            else:
                response = await handler(request)
        except web.HTTPRequestEntityTooLarge as error:
            limit = request.client_max_size
            response = _error(413, "too_large", f"{error.text}; rollout.server.max_request_bytes is {limit}")
        except web.HTTPException as error:
            response = _error(error.status, "http", error.reason)
        except WireError as error:
            response = _error(400, "request", str(error))
        except ConnectionError:
            response = _error(400, "gone", "the client went away")  # for the metrics: nobody reads it
        resource = request.match_info.route.resource  # and not the path, of which anybody can make up a million
        self._metrics.requests.labels(resource.canonical if resource else "unknown", response.status).inc()
        return response

    def _is_authorized(self, request: web.Request) -> bool:
        given = request.headers.get("Authorization", "").encode(errors="replace")
        return hmac.compare_digest(given, self._authorization)  # in a time that says nothing of where they differ

    async def _body(self, request: web.Request) -> dict[str, Any]:
        length = request.content_length or 0
        if length > request.client_max_size:  # before the first byte of it is read
            raise web.HTTPRequestEntityTooLarge(request.client_max_size, length)
        try:
            return load_object(await asyncio.wait_for(request.read(), BODY_S))
        except asyncio.TimeoutError:
            raise web.HTTPRequestTimeout from None
        except web.RequestPayloadError:
            encoding = request.headers.get("Content-Encoding", "identity")
            raise WireError(f"the body can't be read as Content-Encoding: {encoding[:40]} says") from None

    # ------------------------------------------------------------------ handlers

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "up"})

    async def _ready(self, request: web.Request) -> web.Response:
        weights = self.worker.weights
        if not self.worker.built.done():
            return _error(503, "starting", "the model is being loaded")
        if weights is None:
            return _error(503, "no_weights", "no whole weights are loaded: a refit is going on, or failed half-way")
        served = {"policy_version": weights.policy_version, "digest": weights.digest}
        return web.json_response({**served, "outstanding": self.worker.outstanding})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        text = generate_latest(self._metrics.registry)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _update_weights(self, request: web.Request) -> web.Response:
        weights = wire.decode_weights(await self._body(request))
        try:
            await asyncio.shield(asyncio.wrap_future(self.worker.load(weights)))
        except WeightsError as error:
            self._metrics.failed("weights")
            return _error(422, "weights", str(error))
        except WireError:
            raise
        except OtherWeightsError as error:
            return _error(409, "other_weights", str(error))
        except Exception as error:  # the worker has logged it
            self._metrics.failed("refit")
            return _error(500, "engine", f"{weights.id} could not be loaded: {type(error).__name__}: {error}")
        self._metrics.refits.inc()
        return web.Response(body=wire.encode_weights_id(weights.id), content_type="application/json")

    async def _sleep(self, request: web.Request) -> web.Response:
        try:
            await asyncio.shield(asyncio.wrap_future(self.worker.sleep()))
        except Exception as error:
            return _error(500, "engine", f"the engine can't sleep: {type(error).__name__}: {error}")
        return web.json_response({"status": "asleep"})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        asked = wire.decode_request(await self._body(request), self.limits)
        if self.worker.weights is None:
            return _error(503, "no_weights", "no whole weights are loaded")
        if self.worker.weights != asked.weights:
            return _error(409, "other_weights", f"asked for {asked.weights}, this server has {self.worker.weights}")
        answers: asyncio.Queue[Answer] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(answer: Answer) -> None:
            loop.call_soon_threadsafe(answers.put_nowait, answer)

        job = Job(asked, emit, traced=traced_servers.HEADER in request.headers)
        self.worker.generate(job)
        try:
            answer = await answers.get()
            if isinstance(answer, Failure):  # before the first completion: the status can still say so
                self._metrics.failed(answer.reason)
                return _error(_STATUS[answer.reason], answer.reason, answer.message)
            return await self._stream(request, answer, answers, job)
        finally:
            job.cancelled = True  # the client may have gone away in the middle

    async def _stream(
        self,
        request: web.Request,
        answer: tuple[int, int, Completion] | None,
        answers: asyncio.Queue[Answer],
        job: Job,
    ) -> web.StreamResponse:
        """Send the first answer and those that follow, up to the end of the job.

        Args:
            answer: the first one.
            answers: where the others come.
            job: what they answer.
        """
        has_bytes = answer is not None and answer[2].routes is not None
        kind = "application/octet-stream" if has_bytes else "application/x-ndjson"
        response = web.StreamResponse(headers={"Content-Type": kind})
        await response.prepare(request)
        count = 0
        prompts_sent: set[int] = set()
        following: Answer = answer
        while isinstance(following, tuple):
            i, j, completion = following
            served = None if job.request.refit == "waits" else self.worker.served
            await response.write(wire.encode_completion(i, j, completion, i not in prompts_sent, served))
            prompts_sent.add(i)
            self._metrics.finished(completion)
            count += 1
            following = await answers.get()
        end: dict[str, Any] = {"done": count}
        if following is not None:
            self._metrics.failed(following.reason)
            end = {"error": following.message, "reason": following.reason}
        if job.recorder is not None:
            end["trace"] = traced_servers.encode(job.received, job.recorder)
        await response.write(dump_object(end))
        return response


class _Metrics:
    """The server's metrics in the form of Prometheus."""

    def __init__(self, worker: EngineWorker) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rollout_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.completions = Counter(
            "rollout_completions", "Completions sent by finish reason", ["finish_reason"], registry=self.registry
        )
        self.tokens = Counter("rollout_tokens", "Tokens of the completions sent", registry=self.registry)
        self.refits = Counter("rollout_refits", "Refits that ended well", registry=self.registry)
        self.failures = Counter(
            "rollout_failures", "Answers and refits that failed by reason", ["reason"], registry=self.registry
        )
        for name, text, value in (
            ("rollout_outstanding_completions", "Asked for and not drawn yet", lambda: worker.outstanding),
            ("rollout_waiting_requests", "Requests and refits whose turn has not come", lambda: worker.waiting),
            ("rollout_kv_cache_use", "Share of the KV cache in use, NaN where not known", lambda: worker.kv_cache_use),
            ("rollout_generate_seconds", "Time spent generating", lambda: worker.busy_seconds),
            ("rollout_last_refit_seconds", "Of the last refit, NaN before the first", lambda: worker.refit_seconds),
            ("rollout_last_refit_bytes", "Bytes of the weights that it loaded", lambda: worker.refit_bytes),
            ("rollout_ready", "1 while whole weights are loaded", lambda: float(worker.weights is not None)),
            (
                "rollout_policy_version",
                "Version of the weights, NaN while none are whole",
                lambda: worker.weights.policy_version if worker.weights else float("nan"),
            ),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)

    def failed(self, reason: str) -> None:
        """Count an answer or a refit that failed."""
        self.failures.labels(reason).inc()

    def finished(self, completion: Completion) -> None:
        """Count a completion that was sent."""
        self.completions.labels(completion.finish_reason).inc()
        self.tokens.inc(len(completion.token_ids))


def _error(status: int, reason: str, message: str) -> web.Response:
    return web.json_response({"error": message, "reason": reason}, status=status)


def _without_clients_traceback(record: logging.LogRecord) -> bool:
    """For ``logger``: an error that a client made, or a lost connection, is one line."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, (ConnectionError, web.RequestPayloadError, http_exceptions.HttpProcessingError)):
        record.msg, record.args = f"{record.getMessage()}: {one_line(error) or type(error).__name__}", ()
        record.exc_info = record.exc_text = None
    return True
