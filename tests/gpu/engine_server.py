"""The torch engine behind a small HTTP server: OpenAI's completions, and a metrics page with vLLM's names.

`python -m tests.gpu.engine_server --port PORT --truth FILE` on one GPU. Of a prompt only its length counts, a word is a
token; the answer has exactly `max_tokens`. Knows nothing of jouletrace. It listens when all steps are captured and the
steady steps have run; when it is told to stop (SIGTERM), it leaves in FILE (gzip JSON) what it did: `steady` phases as
events of a recording, `steps` with their members, `requests`.
"""

import argparse
import asyncio
import gzip
import json
import queue
import signal
import sys
import threading
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from tests.gpu.engine import BUCKETS, CHUNK, CONTEXT, OUTPUTS, PROMPTS, Sequence, started

STEADY = ((0, 1), (0, 16), (0, 64), (CHUNK, 0), (CHUNK, 16), (CHUNK, 64))
"""Prefill tokens and decoding sequences of the steady steps; serving needs the same captures."""
STEADY_PAUSE_SECONDS = 0.3
KV_TOKENS = BUCKETS[-1] * (max(PROMPTS) + max(OUTPUTS))
MODEL = "random-8b"
SWITCH_SECONDS = 0.0005
"""The engine's thread must not wait the usual 5 ms for that of the HTTP server."""

Events = list[tuple[str, dict[str, Any]]]


class VllmMetrics:
    """The metrics of vLLM 0.32 that tell of work; they move when vLLM's do."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        labels = ("engine", "model_name")
        prompt = Counter("vllm:prompt_tokens", "Number of prefill tokens processed.", labels, registry=self.registry)
        generated = Counter(
            "vllm:generation_tokens", "Number of generation tokens processed.", labels, registry=self.registry
        )
        success = Counter(
            "vllm:request_success",
            "Count of successfully processed requests.",
            (*labels, "finished_reason"),
            registry=self.registry,
        )
        iteration = Histogram(
            "vllm:iteration_tokens_total",
            "Histogram of number of tokens per engine_step.",
            labels,
            buckets=(1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
            registry=self.registry,
        )
        running = Gauge(
            "vllm:num_requests_running",
            "Number of requests in model execution batches.",
            labels,
            registry=self.registry,
        )
        waiting = Gauge(
            "vllm:num_requests_waiting",
            "Number of requests waiting to be processed.",
            labels,
            registry=self.registry,
        )
        kv_usage = Gauge(
            "vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", labels, registry=self.registry
        )
        self.prompt, self.generated = prompt.labels("0", model), generated.labels("0", model)
        self.success = success.labels("0", model, "length")
        self.iteration = iteration.labels("0", model)
        self.running, self.waiting = running.labels("0", model), waiting.labels("0", model)
        self.kv_usage = kv_usage.labels("0", model)


class Truth:
    """What the engine did."""

    def __init__(self) -> None:
        self.steady: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.requests: dict[str, dict[str, Any]] = {}

    def write(self, path: Path) -> None:
        """Write all of it."""
        found = {"steady": self.steady, "steps": self.steps, "requests": list(self.requests.values())}
        path.write_bytes(gzip.compress(json.dumps(found).encode(), 6))


class ServedEngine:
    """Stands between HTTP and the engine, which works in a thread of its own. Belongs to the event loop."""

    def __init__(self, model: str, steady_seconds: float) -> None:
        self.truth = Truth()
        self.metrics = VllmMetrics(model)
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when the thread has ended, with its error if it failed."""
        self._steady_seconds = steady_seconds
        self._arrivals: queue.SimpleQueue[Sequence | None] = queue.SimpleQueue()
        self._answers: dict[str, asyncio.Queue[int]] = {}
        threading.Thread(target=self._work, name="engine", daemon=True).start()

    def submit(self, given_id: str, prompt: int, output: int) -> tuple[str, asyncio.Queue[int]]:
        """Take a request; return its id and the queue of its tokens: how many came, in the end 0."""
        request_id = given_id if given_id and given_id not in self.truth.requests else f"cmpl-{uuid.uuid4().hex}"
        self.truth.requests[request_id] = {
            "id": request_id,
            "arrival_ns": time.time_ns(),
            "prompt": prompt,
            "output": output,
        }
        answer = self._answers[request_id] = asyncio.Queue()
        self._arrivals.put(Sequence(request_id, prompt, output))
        return request_id, answer

    def stop(self) -> None:
        """Let the thread end after its step."""
        self._arrivals.put(None)

    def _work(self) -> None:
        try:
            self._serve()
        except BaseException as failure:
            self._loop.call_soon_threadsafe(self.ended.set_exception, failure)
            raise
        self._loop.call_soon_threadsafe(self.ended.set_result, None)

    def _serve(self) -> None:
        engine = started()
        engine.warm_up()
        for prefill, decode in STEADY if self._steady_seconds else ():
            start_ns, end_ns, steps = engine.steady(prefill, decode, self._steady_seconds)
            labels = {"phase": "mixed_steps", "prefill_tokens": prefill, "decode": decode, "context": CONTEXT}
            self.truth.steady += [
                {"t_ns": start_ns, "kind": "phase_start", **labels},
                {"t_ns": end_ns, "kind": "work", **labels, "steps": steps, "seconds": (end_ns - start_ns) / 1e9},
                {"t_ns": end_ns, "kind": "phase_end", **labels},
            ]
            time.sleep(STEADY_PAUSE_SECONDS)
        self._loop.call_soon_threadsafe(self.ready.set_result, None)
        waiting: list[Sequence] = []
        running: list[Sequence] = []
        while True:
            while not (waiting or running) or not self._arrivals.empty():
                sequence = self._arrivals.get()
                if sequence is None:
                    return
                waiting.append(sequence)
            events: Events = []
            engine.serve_step(waiting, running, True, partial(_note, events))
            is_filling = bool(waiting) and waiting[0].prompt_left < waiting[0].prompt
            held = sum(s.prompt - s.prompt_left + s.output - s.output_left for s in (*running, *waiting[:1]))
            load = (len(running) + is_filling, len(waiting) - is_filling, held)
            self._loop.call_soon_threadsafe(self._take, events, load)

    def _take(self, events: Events, load: tuple[int, int, int]) -> None:
        """Take over what a step did."""
        truth, metrics = self.truth, self.metrics
        prompt = generated = 0
        for kind, event in events:
            match kind:
                case "step":
                    truth.steps.append(event)
                    generated += event["steps"] * len(event["decode"])
                    for request_id in event["decode"]:
                        self._answers[request_id].put_nowait(event["steps"])
                case "first_token":
                    request = truth.requests[event["id"]]
                    request["first_token_ns"] = event["t_ns"]
                    prompt += request["prompt"]
                    generated += 1
                    self._answers[event["id"]].put_nowait(1)
                case "end":
                    truth.requests[event["id"]]["end_ns"] = event["t_ns"]
                    self._answers.pop(event["id"]).put_nowait(0)
                    metrics.success.inc()
        metrics.prompt.inc(prompt)
        metrics.generated.inc(generated)
        metrics.iteration.observe(prompt + generated)
        metrics.running.set(load[0])
        metrics.waiting.set(load[1])
        metrics.kv_usage.set(load[2] / KV_TOKENS)


class Completions:
    """The routes."""

    def __init__(self, engine: ServedEngine, model: str) -> None:
        self._engine, self._model = engine, model

    def application(self) -> web.Application:
        """Return the application."""
        app = web.Application(client_max_size=8 << 20)
        app.add_routes(
            [
                web.post("/v1/completions", self._complete),
                web.get("/v1/models", self._models),
                web.get("/metrics", self._metrics),
            ]
        )
        return app

    async def _models(self, _: web.Request) -> web.Response:
        model = {"id": self._model, "object": "model", "created": int(time.time()), "owned_by": "vllm"}
        return web.json_response({"object": "list", "data": [model]})

    async def _metrics(self, _: web.Request) -> web.Response:
        page = generate_latest(self._engine.metrics.registry)
        return web.Response(body=page, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        try:
            asked = json.loads(await request.read())
            prompt, output = asked["prompt"], int(asked.get("max_tokens") or 16)
            tokens = len(prompt.split() if isinstance(prompt, str) else prompt)
            options = asked.get("stream_options") or {}
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            return _refusal(400, f"The body is not a completion request ({problem!r}).")
        if asked.get("model") != self._model:
            return _refusal(404, f"The model {asked.get('model')!r} does not exist.")
        if not 1 <= tokens <= max(PROMPTS) or not 1 <= output <= max(OUTPUTS):
            return _refusal(400, f"{tokens} prompt tokens and {output} to make are outside of what fits.")
        request_id, made = self._engine.submit(request.headers.get("X-Request-Id", ""), tokens, output)
        usage = {"prompt_tokens": tokens, "completion_tokens": output, "total_tokens": tokens + output}
        head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._model,
        }
        headers = {"X-Request-Id": request_id}
        if not asked.get("stream"):
            while await made.get():
                pass
            return web.json_response(head | {"choices": _choices(output, "length"), "usage": usage}, headers=headers)
        response = web.StreamResponse(headers=headers | {"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        while count := await made.get():
            # As vLLM does it: what has come meanwhile goes into one chunk.
            while not made.empty() and (more := made.get_nowait()):
                count += more
            output -= count
            await response.write(_event(head | {"choices": _choices(count, None if output else "length")}))
            if not output:
                break
        if options.get("include_usage"):
            await response.write(_event(head | {"choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")
        return response


def _note(events: Events, kind: str, event: dict[str, Any]) -> None:
    events.append((kind, event))


def _choices(tokens: int, reason: str | None) -> list[dict[str, Any]]:
    return [{"index": 0, "text": " joule" * tokens, "logprobs": None, "finish_reason": reason}]


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def _refusal(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "code": status}}, status=status)


async def serve(port: int, truth: Path, model: str, steady_seconds: float) -> None:
    """Serve until SIGTERM or SIGINT; raises what the engine fails with."""
    engine = ServedEngine(model, steady_seconds)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(Completions(engine, model).application(), access_log=None, shutdown_timeout=1.0)
    stopping: asyncio.Future[Any] = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({engine.ready, engine.ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if engine.ready.done():
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            await asyncio.wait({engine.ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
        engine.stop()
        if engine.ready.done() or engine.ended.done():
            await asyncio.wait_for(engine.ended, 10)
    finally:
        stopping.cancel()
        engine.truth.write(truth)
        await runner.cleanup()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--truth", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--steady-seconds", type=float, default=1.5, help="of each steady step, 0 for none")
    flags = parser.parse_args()
    sys.setswitchinterval(SWITCH_SECONDS)
    asyncio.run(serve(flags.port, flags.truth, flags.model, flags.steady_seconds))


if __name__ == "__main__":
    main()
