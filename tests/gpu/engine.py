"""A small continuous-batching engine with chunked prefill, tensor parallel over any number of GPUs of one host.

An 8-billion-parameter Llama-shaped model with random weights in bf16; every step is one CUDA graph that mixes up to
one chunk of the oldest prompt with one token of every decoding sequence. It is a load, not a language model: its
energy is what matters. Knows nothing of jouletrace; what it did is handed to a `report` callable.
"""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  (torch's own habit)

CHUNK, CONTEXT = 256, 1024
BUCKETS = (0, 1, 4, 16, 64)
PROMPTS, OUTPUTS = (256, 256, 512, 1024, 2048), (32, 64, 128, 256)
TENANTS = ("tenant-a", "tenant-b", "tenant-c")
Report = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Shape:
    """What decides a Llama-shaped model's work."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int = 128256


EIGHT_BILLION = Shape(32, 4096, 32, 8, 128, 14336)


class Model:
    """One rank's part of the model and its captured steps; every decoding sequence has `context` tokens behind it."""

    def __init__(self, rank: int, world: int, shape: Shape = EIGHT_BILLION, context: int = CONTEXT) -> None:
        self._world = world
        self._shape, self._context = shape, context
        torch.cuda.set_device(rank)
        torch.manual_seed(rank)
        self._heads, self._kv_heads = shape.heads // world, shape.kv_heads // world
        self._feed_forward = shape.feed_forward // world
        self._layers = [
            {
                "qkv": self._weight((self._heads + 2 * self._kv_heads) * shape.head_dim, shape.width),
                "out": self._weight(shape.width, self._heads * shape.head_dim),
                "up": self._weight(2 * self._feed_forward, shape.width),
                "down": self._weight(shape.width, self._feed_forward),
            }
            for _ in range(shape.layers)
        ]
        self._head = self._weight(shape.vocabulary // world, shape.width)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Any]] = {}

    @staticmethod
    def _weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02

    def step(self, prefill: int, decode: int) -> torch.cuda.CUDAGraph:
        """Return the graph of a step with `prefill` prompt tokens and `decode` sequences."""
        key = (prefill, decode)
        if key not in self._graphs:
            self._graphs[key] = self._capture(prefill, decode)
        return self._graphs[key][0]

    def forget(self) -> None:
        """Free all captured steps and their caches."""
        self._graphs.clear()
        torch.cuda.empty_cache()

    def _capture(self, prefill: int, decode: int) -> tuple[torch.cuda.CUDAGraph, Any]:
        past = self._context // 2
        width, head_dim = self._shape.width, self._shape.head_dim
        hidden = self._weight(prefill + decode, width)
        widths = self._heads * head_dim, self._kv_heads * head_dim, self._kv_heads * head_dim
        caches = []
        for _ in range(self._shape.layers):
            prompt = [self._weight(1, self._kv_heads, past + prefill, head_dim) for _ in range(2)] if prefill else None
            running = (
                [self._weight(decode, self._kv_heads, self._context, head_dim) for _ in range(2)] if decode else None
            )
            caches.append((prompt, running))

        def attend(x: torch.Tensor, prompt: Any, running: Any) -> torch.Tensor:
            query, key, value = x.split(widths, -1)
            parts = []
            if prompt:
                for cache, new in zip(prompt, (key, value), strict=True):
                    cache[0, :, past:] = new[:prefill].view(prefill, self._kv_heads, head_dim).transpose(0, 1)
                heads = query[:prefill].view(1, prefill, self._heads, head_dim).transpose(1, 2)
                out = F.scaled_dot_product_attention(heads, prompt[0], prompt[1], enable_gqa=True)
                parts.append(out.transpose(1, 2).reshape(prefill, -1))
            if running:
                for cache, new in zip(running, (key, value), strict=True):
                    cache[:, :, -1] = new[prefill:].view(decode, self._kv_heads, head_dim)
                heads = query[prefill:].view(decode, 1, self._heads, head_dim).transpose(1, 2)
                out = F.scaled_dot_product_attention(heads, running[0], running[1], enable_gqa=True)
                parts.append(out.transpose(1, 2).reshape(decode, -1))
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        def add_up(x: torch.Tensor) -> torch.Tensor:
            if self._world > 1:
                dist.all_reduce(x)
            return x

        def forward() -> torch.Tensor:
            x = hidden
            for layer, (prompt, running) in zip(self._layers, caches, strict=True):
                attended = attend(F.rms_norm(x, (width,)) @ layer["qkv"].T, prompt, running)
                x = x + add_up(attended @ layer["out"].T)
                gate, up = (F.rms_norm(x, (width,)) @ layer["up"].T).chunk(2, -1)
                x = x + add_up((F.silu(gate) * up) @ layer["down"].T)
            last = x[prefill - 1 :] if prefill else x
            return (F.rms_norm(last, (width,)) @ self._head.T).argmax(-1)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            forward()
            forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # NCCL's own thread must not end the capture.
        with torch.no_grad(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            forward()
        # A graph holds addresses, not tensors: what it reads and writes must live as long as it does.
        return graph, (hidden, caches)


@dataclass
class Sequence:
    """A request on its way through the batch; lengths in tokens."""

    request_id: str
    prompt: int
    output: int
    prompt_left: int = field(init=False)
    output_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_left, self.output_left = self.prompt, self.output


class Engine:
    """The scheduler on rank 0; other ranks follow it."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.model = Model(rank, world)
        self._order = torch.zeros(3, dtype=torch.int64)
        self._control = dist.new_group(backend="gloo") if world > 1 else None

    def warm_up(self) -> None:
        """Capture every step that serving needs, in the same order on all ranks."""
        for bucket in BUCKETS:
            self.model.step(CHUNK, bucket)
            if bucket:
                self.model.step(0, bucket)
        torch.cuda.synchronize()

    def follow(self) -> None:
        """Replay what rank 0 orders until it says stop."""
        while True:
            dist.broadcast(self._order, 0, group=self._control)
            prefill, decode, times = self._order.tolist()
            if times == 0:
                return
            self._replay(prefill, decode, times)

    def stop(self) -> None:
        """End the followers."""
        if self.world > 1:
            self._order[:] = 0
            dist.broadcast(self._order, 0, group=self._control)

    def run(self, prefill: int, decode: int, times: int = 1) -> tuple[int, int]:
        """Run a step some times on all ranks; return its start and end, epoch nanoseconds."""
        if self.world > 1:
            self._order[:] = torch.tensor((prefill, decode, times))
            dist.broadcast(self._order, 0, group=self._control)
        return self._replay(prefill, decode, times)

    def _replay(self, prefill: int, decode: int, times: int) -> tuple[int, int]:
        graph = self.model.step(prefill, decode)
        start_ns = time.time_ns()
        for _ in range(times):
            graph.replay()
        torch.cuda.synchronize()
        return start_ns, time.time_ns()

    def steady(self, prefill: int, decode: int, seconds: float) -> tuple[int, int, int]:
        """Run one kind of step for a while; return start, end (ns) and the number of steps."""
        self.run(prefill, decode)
        start_ns, steps = time.time_ns(), 0
        while time.time_ns() - start_ns < seconds * 1e9:
            self.run(prefill, decode, 5)
            steps += 5
        return start_ns, time.time_ns(), steps

    def serve(self, rate: float, seconds: float, seed: int, prefix: str, report: Report) -> None:
        """Serve Poisson arrivals for a while and then until all are done; report requests and steps as they happen."""
        rng = random.Random(seed)
        arrivals, at = [], 0.0
        while at < seconds:
            at += rng.expovariate(rate)
            arrivals.append((at, rng.choice(PROMPTS), rng.choice(OUTPUTS), rng.choice(TENANTS)))
        waiting: list[Sequence] = []
        running: list[Sequence] = []
        begin, number = time.perf_counter(), 0
        while arrivals or waiting or running:
            now = time.perf_counter() - begin
            while arrivals and arrivals[0][0] <= now:
                _, prompt, output, tenant = arrivals.pop(0)
                number += 1
                sequence = Sequence(f"{prefix}-{number}", prompt, output)
                report("start", {"id": sequence.request_id, "t_ns": time.time_ns(), "tenant": tenant, "prompt": prompt})
                waiting.append(sequence)
            if not waiting and not running:
                time.sleep(0.001)
                continue
            self.serve_step(waiting, running, bool(arrivals), report)

    def serve_step(self, waiting: list[Sequence], running: list[Sequence], more: bool, report: Report) -> None:
        """Run a step of what waits and runs, moving sequences on; with `more` to come, a single one.

        Reports the `step`, then each `first_token` and `end`, by request id and time.
        """
        decoding = running[: BUCKETS[-1]]
        bucket = next(size for size in BUCKETS if size >= len(decoding))
        filling = waiting[0] if waiting and len(running) < BUCKETS[-1] else None
        times = 1 if filling or more else min(4, *(s.output_left for s in decoding), 4)
        start_ns, end_ns = self.run(CHUNK if filling else 0, bucket, times)
        report(
            "step",
            {
                "start_ns": start_ns,
                "end_ns": end_ns,
                "steps": times,
                "prefill": {"id": filling.request_id, "tokens": CHUNK} if filling else None,
                "decode": [s.request_id for s in decoding],
            },
        )
        for sequence in decoding:
            sequence.output_left -= times
            if sequence.output_left <= 0:
                running.remove(sequence)
                _report_end(sequence, end_ns, report)
        if filling:
            filling.prompt_left -= CHUNK
            if filling.prompt_left <= 0:
                waiting.pop(0)
                filling.output_left -= 1
                report("first_token", {"id": filling.request_id, "t_ns": end_ns})
                if filling.output_left > 0:
                    running.append(filling)
                else:
                    _report_end(filling, end_ns, report)


def _report_end(sequence: Sequence, end_ns: int, report: Report) -> None:
    report("end", {"id": sequence.request_id, "t_ns": end_ns, "output": sequence.output})


def started() -> Engine:
    """Return this rank's engine; with RANK and WORLD_SIZE set (torchrun), one of several."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    return Engine(rank, world)
