"""A serving engine with continuous batching and chunked prefill, whose steps cost exactly what a law says.

Written apart from the ledger: it knows every step's members and energy, so it knows the truth for each request.
"""

import random
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from jouletrace.energy.timeline import Timeline
from jouletrace.requests.records import PrefillPart, RequestRecord, Status, StepRecord, Usage

S = 1_000_000_000
START_NS = 1_700_000_000 * S
IDLE_WATTS = 120.0
BUSY_WATTS = 600.0


@dataclass
class Cost:
    """Joules per step, prefill token and decoding sequence."""

    a: float
    c_p: float
    c_d: float


@dataclass
class Job:
    request_id: str
    arrival_ns: int
    tokens: int
    cached: int
    output: int
    tenant: str
    cancel_after: int | None = None
    """Output tokens after which the client goes away."""
    left: int = 0
    done: int = 0
    first_ns: int | None = None
    end_ns: int | None = None

    @property
    def status(self) -> Status:
        cancelled = self.cancel_after is not None and self.cancel_after < self.output
        return Status.CANCELLED if cancelled else Status.FINISHED

    def record(self, engine_id: str, model: str = "m") -> RequestRecord:
        return RequestRecord(
            request_id=self.request_id,
            engine_id=engine_id,
            model=model,
            tenant=self.tenant,
            arrival_ns=self.arrival_ns,
            first_token_ns=self.first_ns,
            end_ns=self.end_ns,
            status=self.status,
            usage=Usage(input=self.tokens, cached_input=self.cached, output=self.done),
        )

    def live(self, engine_id: str, model: str = "m") -> list[tuple[int, RequestRecord]]:
        """The same in three records, with the times at which they are sent."""
        name = {"request_id": self.request_id, "engine_id": engine_id}
        usage = Usage(input=self.tokens, cached_input=self.cached)
        start = RequestRecord(
            **name, model=model, tenant=self.tenant, arrival_ns=self.arrival_ns, status=Status.RUNNING, usage=usage
        )
        first = RequestRecord(**name, first_token_ns=self.first_ns)
        end = RequestRecord(
            **name,
            end_ns=self.end_ns,
            status=self.status,
            usage=Usage(input=self.tokens, cached_input=self.cached, output=self.done),
        )
        return [(self.arrival_ns, start), (self.first_ns or 0, first), (self.end_ns or 0, end)]


@dataclass
class Run:
    """What happened."""

    jobs: list[Job]
    steps: list[StepRecord]
    step_joules: list[float]
    truth: dict[str, float]
    prefill_truth: dict[str, float]
    end_ns: int

    def timeline(self, *, share: float = 1.0, seconds_after: float = 5.0) -> Timeline:
        """One device's timeline with `share` of each step's energy and idle power in between."""
        line = Timeline(START_NS)
        for step, joules in zip(self.steps, self.step_joules, strict=True):
            pause = step.start_ns - line.end_ns
            if pause > 0:
                line.extend([step.start_ns], [IDLE_WATTS * pause / S])
            line.extend([step.end_ns], [share * joules])
        line.extend([line.end_ns + round(seconds_after * S)], [IDLE_WATTS * seconds_after])
        return line

    def counted(self) -> list[StepRecord]:
        """The steps without ids."""
        return [
            StepRecord(
                engine_id=step.engine_id,
                start_ns=step.start_ns,
                end_ns=step.end_ns,
                prefill_tokens=sum(part.tokens for part in step.prefill or ()),
                prefill_requests=len(step.prefill or ()),
                decode_requests=len(step.decode or ()),
            )
            for step in self.steps
        ]


@dataclass
class Simulator:
    """First come, first served, one chunk a step."""

    cost: Cost
    rate: float = 5.0
    seconds: float = 20.0
    chunk: int = 512
    most: int = 64
    seed: int = 1
    prompts: tuple[int, ...] = (64, 256, 1024, 4096)
    outputs: tuple[int, ...] = (16, 64, 256)
    cached_part: float = 0.0
    """Part of requests whose prompt is three quarters in the prefix cache."""
    cancelled_part: float = 0.0
    engine_id: str = "e"
    prefix: str = "r"
    tenants: tuple[str, ...] = ("a", "b", "c")

    def jobs(self) -> list[Job]:
        rng, t, jobs = random.Random(self.seed), 0.0, []
        while (t := t + rng.expovariate(self.rate)) < self.seconds:
            tokens, output = rng.choice(self.prompts), rng.choice(self.outputs)
            cached = tokens * 3 // 4 if rng.random() < self.cached_part else 0
            cancel = rng.randrange(1, output) if output > 1 and rng.random() < self.cancelled_part else None
            name = f"{self.prefix}{len(jobs)}"
            jobs.append(Job(name, START_NS + round(t * S), tokens, cached, output, rng.choice(self.tenants), cancel))
        return jobs

    def run(self) -> Run:
        jobs = self.jobs()
        cost, now = self.cost, START_NS
        queue, running = list(jobs), []
        steps, energies = [], []
        truth: dict[str, float] = defaultdict(float)
        prefill_truth: dict[str, float] = defaultdict(float)
        for job in jobs:
            job.left = job.tokens - job.cached
        while queue or running:
            if not running and queue[0].arrival_ns > now:
                now = queue[0].arrival_ns
            head = queue[0] if queue and queue[0].arrival_ns <= now and len(running) < self.most else None
            tokens = min(self.chunk, head.left) if head else 0
            count = len(running) + (head is not None)
            joules = cost.a + cost.c_p * tokens + cost.c_d * len(running)
            end = now + round(joules / BUSY_WATTS * S)
            for job in running:
                truth[job.request_id] += cost.a / count + cost.c_d
            if head is not None:
                mine = cost.a / count + cost.c_p * tokens
                truth[head.request_id] += mine
                prefill_truth[head.request_id] += mine
            parts = (PrefillPart(request_id=head.request_id, tokens=tokens),) if head else ()
            names = tuple(job.request_id for job in running)
            steps.append(StepRecord(engine_id=self.engine_id, start_ns=now, end_ns=end, prefill=parts, decode=names))
            energies.append(joules)
            now = end
            for job in running:
                job.done += 1
            for job in [job for job in running if job.done >= min(job.output, job.cancel_after or job.output)]:
                job.end_ns = now
                running.remove(job)
            if head is not None:
                head.left -= tokens
                if head.left <= 0:
                    queue.pop(0)
                    head.first_ns, head.done = now, 1
                    running.append(head)
                    if head.output == 1:
                        head.end_ns = now
                        running.remove(head)
        return Run(jobs, steps, energies, dict(truth), dict(prefill_truth), now)


def relative_errors(found: dict[str, float], truth: dict[str, float]) -> tuple[float, float]:
    """Median and 95th percentile."""
    off = [abs(found[name] / joules - 1) for name, joules in truth.items()]
    return float(np.median(off)), float(np.percentile(off, 95))
