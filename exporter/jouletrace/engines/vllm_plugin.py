"""Tells jouletrace about each step and each finished request of vLLM, from inside vLLM; needs nothing else.

vLLM loads `StatLogger` by its entry point and calls `record` once a step on the event loop of its API server. So
`record` makes one line of JSON for the step and one for each request that ended, and hands them to the kernel as one
datagram: 5 us a step and 3 us a request. It never waits and never raises. What the kernel does not take at once goes
with a later step; the oldest of what piles up is dropped and counted.

vLLM declares the objects that it passes unstable: whatever is missing or has changed is left out.

    JOULETRACE_DATAGRAM_SOCKET   path of the daemon's datagram socket, /run/jouletrace/ingest.dgram
    JOULETRACE_ENGINE_ID         what this server is called, vllm-HOSTNAME-PID

**When a step was.** `record` is not told. Its end is the time at which its output reached the API server, or earlier
where the engine's own interval since the last token says so: that takes out the waits of a busy event loop, and what
remains is the delay of the quickest of the last steps, tenths of a millisecond. With
`--enable-logging-iteration-details` a step begins `elapsed_ms` before its end, but never before the end of the step
before: with asynchronous scheduling what vLLM reports overlaps, so its sum means nothing. Without, it begins at the
end of the step before or, where the engine had nothing to do, at the arrival of its oldest request, which is early by
the time for tokenization. Either way a step is never taken to be longer than five seconds.
"""

import asyncio
import contextlib
import errno
import itertools
import json
import logging
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

try:
    from vllm.v1.metrics.loggers import StatLoggerBase as _Base
except ModuleNotFoundError as _missing:
    if "vllm" in sys.modules:
        # A vLLM that keeps its base class elsewhere. It refuses to start with a plug-in that is not derived from
        # it, and only logs one that cannot be imported.
        raise ImportError("this vLLM has no vllm.v1.metrics.loggers.StatLoggerBase to build on") from _missing
    _Base = object

SOCKET_VARIABLE = "JOULETRACE_DATAGRAM_SOCKET"
ENGINE_VARIABLE = "JOULETRACE_ENGINE_ID"
DEFAULT_SOCKET = "/run/jouletrace/ingest.dgram"
"""Where the packaged systemd service has it."""
RETRY_SECONDS = 1.0
"""Between two attempts to reach a daemon that is not there; one takes 10 us."""
REPEAT_SECONDS = 60.0
"""How often the engine is announced again, for a daemon that forgot it, and losses are logged."""
FULL_SECONDS = 0.02
"""When the daemon is behind, until the next attempt, if no step comes first."""
QUEUE_LINES = 1000
"""What is kept for a daemon that is behind or being restarted: some seconds of a busy engine, 300 kB."""
DATAGRAM_LINES = 64
"""Records that travel together: 160 kB at worst, and a socket sends 208 kB (net.core.wmem_default)."""
LONGEST_STEP_NS = 5_000_000_000
"""A step is not taken to be longer: a prompt of 100,000 tokens on a large model takes a few seconds."""
RESET_NS = 1_000_000_000
"""An output later than this behind the engine's intervals means that the wall clock was set."""
LABEL_LENGTH = 128
IDENTIFIER_LENGTH = 256
"""What jouletrace takes as a model's name and as an id."""

_STATUS = {"abort": "cancelled", "error": "failed"}
_ROLES = {"kv_producer": "prefill", "kv_consumer": "decode"}

# Below vLLM's own logger, so that its handlers and its format apply.
_log = logging.getLogger("vllm.jouletrace")


class _Recorder:
    """What `StatLogger` does; kept apart from vLLM's base class, which may demand more methods than we know of."""

    def __init__(self, vllm_config: Any = None, engine_index: int = 0, *_: Any, **__: Any) -> None:
        self._socket: socket.socket | None = None
        self._path = os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET
        self._retry_at = self._repeat_at = 0.0
        self._waiting: deque[str] = deque()
        self._is_due = False
        self._end_ns = 0
        self._is_busy = False
        self.sent = 0
        """Records that the kernel took."""
        self.dropped = 0
        """Records that had to give way to newer ones, because the daemon was away or behind."""
        self._reported = 0
        self._problem = ""
        self._faults = 0
        self._engine: dict[str, Any] = {"record": "engine", "engine_id": "vllm", "kind": "vllm"}
        self._servers = 1
        self._most_tokens = 0
        self._gpus = 1
        try:
            self._describe(vllm_config, engine_index)
        except Exception:
            self._fault()
        self._names = f'"engine_id":{json.dumps(self._engine["engine_id"])}'
        self._head = f'{{"record":"step",{self._names},"start_ns":'
        if "models" in self._engine:
            self._names += f',"model":{json.dumps(self._engine["models"][0])}'
        self._tend()

    def record(self, scheduler_stats: Any = None, iteration_stats: Any = None, *_: Any, **__: Any) -> None:
        """Take what vLLM tells of a step. Either may be None."""
        try:
            self._record(scheduler_stats, iteration_stats)
        except Exception:
            self._fault()

    def log(self) -> None:
        """Announce the engine when it is time; vLLM calls this every 10 s, working or not."""
        with contextlib.suppress(Exception):
            self._tend()
            self._flush()

    def log_engine_initialized(self) -> None:
        """Do nothing: the engine was announced when it was made."""

    def close(self) -> None:
        """Let go of the socket; vLLM has no use for it, as it keeps its loggers until it ends."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # ---------------------------------------------------------------- what is known of the engine

    def _describe(self, config: Any, engine_index: int) -> None:
        parallel = getattr(config, "parallel_config", None)
        # Servers of one engine have a parent in common, and must give the engine the same name.
        self._servers = _whole(getattr(parallel, "_api_process_count", 1)) or 1
        pid = os.getppid() if self._servers > 1 else os.getpid()
        engine_id = os.environ.get(ENGINE_VARIABLE) or f"vllm-{socket.gethostname()}-{pid}"
        if _whole(getattr(parallel, "data_parallel_size", 1)) > 1:
            engine_id += f"-dp{engine_index}"
        self._engine["engine_id"] = engine_id[-IDENTIFIER_LENGTH:]
        ranks = (getattr(parallel, name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size"))
        for size in ranks:
            self._gpus *= _whole(size) or 1
        scheduler = getattr(config, "scheduler_config", None)
        self._most_tokens = _whole(getattr(scheduler, "max_num_batched_tokens", 0))
        most_sequences = _whole(getattr(scheduler, "max_num_seqs", 0))
        if most_sequences:
            self._engine["max_num_seqs"] = most_sequences
        role = _ROLES.get(str(getattr(getattr(config, "kv_transfer_config", None), "kv_role", None)))
        if role:
            self._engine["role"] = role
        model = getattr(config, "model_config", None)
        names = getattr(model, "served_model_name", None) or getattr(model, "model", None) or ()
        names = [names] if isinstance(names, str) else [str(name) for name in names]
        if names:
            self._engine["models"] = [name[:LABEL_LENGTH] for name in names]

    # ---------------------------------------------------------------- steps and requests

    def _record(self, scheduler: Any, iteration: Any) -> None:
        received = getattr(iteration, "iteration_timestamp", None)
        received_ns = int(received * 1e9) if received else time.time_ns()
        intervals = getattr(iteration, "inter_token_latencies_iter", None) or ()
        before_ns, end_ns = self._end_ns, received_ns
        if before_ns > end_ns + RESET_NS:  # The wall clock was set back.
            before_ns = end_ns
        if intervals:
            # That token and the one before came with steps that ended no later than what we took for their ends. A
            # thousandth more lets a delay that was once too short be forgotten.
            bound_ns = before_ns + int(intervals[0] * 1.001e9)
            if received_ns - bound_ns < RESET_NS:
                end_ns = min(end_ns, bound_ns)
        end_ns = max(end_ns, before_ns)
        lines: list[str] = []
        if scheduler is not None:
            step = self._step(scheduler, iteration, intervals, before_ns, end_ns)
            if step:
                lines.append(step)
            self._is_busy = bool(getattr(scheduler, "num_running_reqs", 0))
        self._end_ns = end_ns
        finished = getattr(iteration, "finished_requests", None)
        if finished:
            lines += [line for each in finished if (line := self._request(each, received_ns, end_ns))]
        if lines:
            self._send(lines)

    def _step(self, scheduler: Any, iteration: Any, intervals: Any, before_ns: int, end_ns: int) -> str:
        """Return the step's line, empty when it worked on no request."""
        details = getattr(scheduler, "iteration_details", None)
        if details is not None:
            prefills = int(details.num_ctx_requests)
            tokens = int(details.num_ctx_tokens)
            decodes = int(details.num_generation_requests)
            start_ns = end_ns - min(int(details.elapsed_ms * 1e6), LONGEST_STEP_NS)
        else:
            if iteration is None or self._servers > 1:
                # The first of several passes of a long prompt, or one of several servers' part of a step: what the
                # others did is not known. Requests tell of this time.
                return ""
            latencies = getattr(iteration, "time_to_first_tokens_iter", None) or ()
            prefills, decodes = len(latencies), len(intervals)
            tokens = self._prompt_tokens(iteration, decodes) if prefills else 0
            earliest_ns = end_ns - LONGEST_STEP_NS
            if self._is_busy:
                start_ns = max(before_ns, earliest_ns)
            else:
                start_ns = max(end_ns - int(max(latencies) * 1e9), earliest_ns) if prefills else end_ns
        if not (prefills or tokens or decodes):
            return ""
        line = (
            f'{self._head}{min(max(start_ns, before_ns), end_ns)},"end_ns":{end_ns},"prefill_tokens":{tokens},'
            f'"prefill_requests":{prefills},"decode_requests":{decodes},"running":{int(scheduler.num_running_reqs)},'
            f'"waiting":{self._queued(scheduler)}'
        )
        usage = getattr(scheduler, "kv_cache_usage", None)
        if usage is not None and 0.0 <= usage <= 1.0:
            line += f',"kv_usage":{usage:.6f}'
        work = getattr(scheduler, "perf_stats", None)
        flops = getattr(work, "num_flops_per_gpu", 0)
        if flops > 0:  # A pass without work reports bytes all the same.
            moved = getattr(work, "num_read_bytes_per_gpu", 0) + getattr(work, "num_write_bytes_per_gpu", 0)
            line += f',"flops":{int(flops * self._gpus)},"bytes":{int(moved * self._gpus)}'
        return line + "}"

    def _prompt_tokens(self, iteration: Any, decodes: int) -> int:
        """Return prompt tokens that the step computed, as far as that is told.

        A prompt that took several passes is told whole with its last one, so no more than a pass can hold.
        """
        source = getattr(iteration, "prompt_token_stats", None)
        told: Any = getattr(source, "computed", None)
        tokens = int(getattr(iteration, "num_prompt_tokens", 0) if told is None else told)
        most = self._most_tokens - decodes
        return min(tokens, most) if most > 0 else tokens

    @staticmethod
    def _queued(scheduler: Any) -> int:
        return int(getattr(scheduler, "num_waiting_reqs", 0)) + int(getattr(scheduler, "num_skipped_waiting_reqs", 0))

    def _request(self, finished: Any, received_ns: int, end_ns: int) -> str:
        """Return a finished request's line, empty when vLLM does not say which it is (before 0.20)."""
        request_id = getattr(finished, "request_id", None)
        if not request_id:
            return ""
        reason = getattr(finished, "finish_reason", None)
        total = max(int(getattr(finished, "num_prompt_tokens", 0)), 0)
        cached = min(max(int(getattr(finished, "num_cached_tokens", 0) or 0), 0), total)
        line = (
            f'{{"record":"request","request_id":{json.dumps(str(request_id)[-IDENTIFIER_LENGTH:])},{self._names},'
            f'"status":"{_STATUS.get(str(getattr(reason, "name", reason)).lower(), "finished")}","end_ns":{end_ns},'
            f'"usage":{{"input":{total},"cached_input":{cached},'
            f'"output":{max(int(getattr(finished, "num_generation_tokens", 0)), 0)}}}'
        )
        latency = getattr(finished, "e2e_latency", 0.0)
        if latency > 0:
            arrival_ns = min(received_ns - int(latency * 1e9), end_ns)
            line += f',"arrival_ns":{arrival_ns}'
            decode = getattr(finished, "decode_time", -1.0)
            prefill = getattr(finished, "prefill_time", -1.0)
            # A moment that never came is 0 in vLLM, and what is counted from it is years long.
            if 0.0 <= decode <= latency:
                first_ns = max(end_ns - int(decode * 1e9), arrival_ns)
                line += f',"first_token_ns":{first_ns}'
                if 0.0 <= prefill <= latency:
                    line += f',"scheduled_ns":{max(first_ns - int(prefill * 1e9), arrival_ns)}'
        return line + "}"

    # ---------------------------------------------------------------- the way out

    def _send(self, lines: list[str]) -> None:
        waiting = self._waiting
        waiting.extend(lines)
        for _ in range(len(waiting) - QUEUE_LINES):
            waiting.popleft()
            self.dropped += 1
        now = time.monotonic()
        if now >= (self._retry_at if self._socket is None else self._repeat_at):
            self._tend()
        self._flush()

    def _flush(self) -> None:
        """Hand over what waits, as far as the kernel takes it at once."""
        waiting = self._waiting
        while waiting and self._socket is not None:
            lines = list(itertools.islice(waiting, DATAGRAM_LINES))
            taken = self._hand_over("\n".join(lines).encode())
            if taken is None:
                return
            if taken:
                self.sent += len(lines)
            else:
                self.dropped += len(lines)
            for _ in lines:
                waiting.popleft()

    def _hand_over(self, data: bytes) -> bool | None:
        """Return whether the kernel took a datagram; None when it may later."""
        assert self._socket is not None
        try:
            self._socket.send(data)
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                return False
            if error.errno in (errno.EAGAIN, errno.ENOBUFS):
                self._flush_soon()
            else:
                self._lose(error)
            return None
        return True

    def _flush_soon(self) -> None:
        """Try again a little later, for no other step may follow; on the loop that calls `record`."""
        if not self._is_due:
            with contextlib.suppress(RuntimeError):  # There is no loop: the next step or `log` tries.
                asyncio.get_running_loop().call_later(FULL_SECONDS, self._flush_now)
                self._is_due = True

    def _flush_now(self) -> None:
        self._is_due = False
        with contextlib.suppress(Exception):
            self._flush()

    def _tend(self) -> None:
        """Reach the daemon, announce the engine and log what was lost, each when it is time."""
        now = time.monotonic()
        if self._socket is None and now >= self._retry_at:
            self._retry_at = now + RETRY_SECONDS
            self._connect()
        if self._socket is not None and now >= self._repeat_at:
            announced = self._hand_over(json.dumps(self._engine).encode())
            self.sent += bool(announced)
            self._repeat_at = now + (REPEAT_SECONDS if announced else RETRY_SECONDS)
            if announced and self.dropped > self._reported:
                _log.warning(
                    "jouletrace missed %d records of %s since this server started; if that grows while it runs, raise "
                    "net.unix.max_dgram_qlen and restart it",
                    self.dropped,
                    self._engine["engine_id"],
                )
                self._reported = self.dropped

    def _connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            sock.connect(self._path)
        except OSError as error:
            sock.close()
            self._lose(error)
            return
        self._socket = sock
        self._repeat_at = 0.0
        if self._problem:
            _log.info("jouletrace is reached at %s", self._path)
            self._problem = ""

    def _lose(self, error: OSError) -> None:
        """Let go of a daemon that is not there; say so once."""
        self.close()
        if not self._problem:
            self._problem = error.strerror or str(error)
            _log.warning(
                "jouletrace is not reached at %s (%s): it learns nothing of %s until it is. Start it, mount its socket "
                "into this container, or set %s",
                self._path,
                self._problem,
                self._engine["engine_id"],
                SOCKET_VARIABLE,
            )

    def _fault(self) -> None:
        """Report a fault of our own, the first time."""
        self._faults += 1
        if self._faults == 1:
            with contextlib.suppress(Exception):
                _log.warning(
                    "jouletrace cannot read what this vLLM tells; it goes on without. Please report this with vLLM's "
                    "version",
                    exc_info=True,
                )


def _whole(value: Any) -> int:
    """Return a positive int as it is, anything else as 0."""
    return value if isinstance(value, int) and value > 0 else 0


def _ignore(self: object, *_: Any, **__: Any) -> None:
    """Do nothing, where vLLM asks for a method that this module does not know."""


def _complete(base: type) -> type:
    """Return the recorder as a class derived from `base`, with every method that `base` wants."""
    demanded = frozenset(getattr(base, "__abstractmethods__", ()))
    methods: Mapping[str, Any] = {name: _ignore for name in demanded if not hasattr(_Recorder, name)}
    documented = {"__doc__": "What vLLM's entry point group `vllm.stat_logger_plugins` loads.", "__module__": __name__}
    return type("StatLogger", (_Recorder, base), {**methods, **documented})


StatLogger = _complete(_Base)
"""The plug-in: derived from vLLM's StatLoggerBase where there is a vLLM."""
