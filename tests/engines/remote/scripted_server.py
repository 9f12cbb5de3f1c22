"""Servers over real HTTP whose completions are a function of prompt and seed, and whose misdeeds of a script."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable

import numpy as np
from aiohttp import web

from nemo_aapo.engines.messages import dump_object, load_object
from nemo_aapo.engines.remote import wire
from nemo_aapo.engines.remote.directory import ServerRecord
from nemo_aapo.engines.remote.dispatch import Call
from nemo_aapo.types import Completion, SamplingSpec

WEIGHTS = wire.Weights(wire.WeightsId(5, "5" * 64), "weights/v5-55555555/manifest.json")
SPEC = SamplingSpec(temperature=1.0, max_new_tokens=8, stop_token_ids=(1,))
VOCABULARY = 1000
LIMITS = wire.Limits(VOCABULARY, 100)
TIMEOUT_S = 20.0


def draw(prompt: np.ndarray, seed: int, version: int = 5) -> Completion:
    tokens = np.random.default_rng([seed, *prompt]).integers(0, 1000, 1 + seed % 7).astype(np.int32)
    return Completion(tokens, (-tokens / 7).astype(np.float32), "length", version)


class ScriptedServer:
    """Serves well, but for what its script says of a ``generate`` request. Starts with the base model's weights."""

    def __init__(self, index: int, token: str, script: Callable[[], str] = lambda: "well") -> None:
        self.script, self.token, self.asked = script, token, []
        self.weights, self.refits, self.slept = wire.WeightsId(0, "0" * 64), [], 0
        self.released = threading.Event()
        """Until then a ``generate`` whose script says ``until`` goes on."""
        self.record: ServerRecord | None = None
        self._index, self._loop, self._ready = index, asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def _run(self) -> None:
        async def start() -> None:
            app = web.Application(client_max_size=2**30)
            app.router.add_get("/v1/ready", self._ready_)
            app.router.add_post("/v1/update_weights", self._update)
            app.router.add_post("/v1/generate", self._generate)
            app.router.add_post("/v1/sleep", self._sleep)
            self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
            await self._runner.setup()
            await web.TCPSite(self._runner, "127.0.0.1", 0).start()
            port = self._runner.addresses[0][1]
            self.record = ServerRecord(self._index, f"http://127.0.0.1:{port}", 1, f"{self._index}-{port}")
            self._ready.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _ready_(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == f"Bearer {self.token}"
        return web.Response(body=wire.encode_weights_id(self.weights))

    async def _update(self, request: web.Request) -> web.Response:
        weights = wire.decode_weights(load_object(await request.read()))
        self.refits.append(weights)
        self.weights = weights.id
        return web.Response(body=wire.encode_weights_id(self.weights))

    async def _sleep(self, request: web.Request) -> web.Response:
        self.slept += 1
        return web.json_response({"status": "asleep"})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        asked = wire.decode_request(load_object(await request.read()), LIMITS)
        self.asked.append(asked)
        misdeed, _, at = self.script().partition(" ")
        if asked.weights != self.weights or misdeed == "other":
            return web.json_response({"error": "other weights", "reason": "other_weights"}, status=409)
        if misdeed == "loading":
            return web.json_response({"error": "no whole weights are loaded", "reason": "no_weights"}, status=503)
        if misdeed == "refuse":
            return web.json_response({"error": "out of memory", "reason": "engine"}, status=500)
        if misdeed == "cannot":
            return web.json_response({"error": "temperature=0.6 can't be had", "reason": "request"}, status=400)
        if misdeed == "not_finite":
            return web.json_response({"error": "log-probs are not finite", "reason": "not_finite"}, status=500)
        if misdeed == "html":
            return web.Response(text="<html>", status=502)
        response = web.StreamResponse()
        await response.prepare(request)
        lines = [
            wire.encode_completion(i, j, draw(prompt, seed, 4 if misdeed == "stale" else asked.weights.policy_version))
            for i, (prompt, row) in enumerate(zip(asked.prompts, asked.seeds, strict=True))
            for j, seed in enumerate(row)
        ]
        random.Random(len(lines)).shuffle(lines)  # as they end, not as they were asked for
        at = int(at or 0) % (len(lines) + 1)
        for line in lines[:at]:
            await response.write(line)
        if misdeed == "until":
            while not self.released.is_set():
                await asyncio.sleep(0.005)
        if misdeed == "hang":
            await asyncio.sleep(60)
        if misdeed == "drop":
            request.transport.abort()
            return response
        if misdeed == "drip":
            for _ in range(200):
                await response.write(b" ")
                await asyncio.sleep(0.05)
        following = lines[at % len(lines)] if lines else b"{}"
        extra = {
            "long": spoilt(following, token_ids=[1] * 9, logprobs=[-1.0] * 9),
            "negative": spoilt(following, token_ids=[-1], logprobs=[-1.0]),
            "outside": spoilt(following, token_ids=[VOCABULARY], logprobs=[-1.0]),
            "infinite": spoilt(following, token_ids=[1], logprobs=[-1e39]),
            "bored": spoilt(following, finish_reason="bored"),
            "garbage": b"{not json\n",
            "twice": lines[at - 1],
            "unasked": lines[0].replace(b'"i":0', b'"i":99').replace(b'"j":0', b'"j":99').replace(b'"j":1', b'"j":98'),
            "fail": dump_object({"error": "the engine failed", "reason": "engine"}),
        }
        if misdeed in extra:
            await response.write(extra[misdeed])
        for line in lines[at:] if misdeed != "short" else []:
            await response.write(line)
        await response.write(dump_object({"done": len(lines)}))
        return response


def spoilt(line: bytes, **fields) -> bytes:
    return dump_object({**load_object(line), **fields})


MISDEEDS = (
    "refuse", "html", "stale", "hang", "drip", "drop", "garbage", "twice", "unasked", "fail", "short", "long",
    "negative", "outside", "infinite", "bored",
)  # fmt: skip


def make_call(sizes: list[int]) -> tuple[Call, list[tuple], list[tuple]]:
    """A call for groups of these sizes; what is told as it goes on; what should be."""
    rng = np.random.default_rng(sum(sizes))
    prompts = [rng.integers(0, 1000, 1 + i % 5).astype(np.int32) for i in range(len(sizes))]
    seeds = [[1000 * i + j for j in range(size)] for i, size in enumerate(sizes)]
    told: list[tuple] = []
    call = Call(WEIGHTS, prompts, SPEC, seeds, lambda i, j, c: told.append((i, j, c.token_ids.tobytes())))
    wanted = [
        (i, j, draw(prompts[i], seed).token_ids.tobytes()) for i, row in enumerate(seeds) for j, seed in enumerate(row)
    ]
    return call, told, wanted


def always(misdeed: str) -> Callable[[], str]:
    return lambda: misdeed


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "never came"
        time.sleep(0.005)
