"""Which engine a span comes from, by the attributes of its resource.

1. `jouletrace.engine_id`, where an operator has set it, is the engine; when its data-parallel ranks are announced,
   each as an engine of its own, nobody knows which of them a span is of.
2. Else an engine that another feed has announced (plug-in, scrape, API), when its process is the one that the resource
   names (`vllm.process_id` or `process.pid`); one that names no process is the only announced engine of its kind, as
   long as no other sender of that kind is about.
3. Else an engine of its own: `service.name`, then pod or host where they are given, then the process id.

Process ids are those of the sender's own pid namespace. They are looked for in /proc, where the kernel lists the id
that each process has inside its container; that needs the node's pid namespace (`hostPID` in Kubernetes).
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from jouletrace.engines.otlp.spans import ID_CHARACTERS, LABEL_CHARACTERS, Value
from jouletrace.requests.records import EngineRecord, Role
from jouletrace.workloads.processes import lineage

ENGINE_ATTRIBUTE: Final = "jouletrace.engine_id"
MODEL_ATTRIBUTE: Final = "gen_ai.request.model"
REPEAT_SECONDS: Final = 60.0
"""How often it is looked again who a sender is: another feed may have announced its engine since."""
RECENT_SECONDS: Final = 15.0
"""Senders without a process id that were heard of within that time count as being there."""
SENDERS: Final = 1024
"""Senders that are remembered; a node has some tens."""
MODELS: Final = 256
"""Most models that an engine record may name."""

_PROCESS = ("vllm.process_id", "process.pid")
_PLACE = ("k8s.pod.name", "host.name")
_RANK = "-dp[0-9]{1,6}"
"""What stands behind the id of an engine whose data-parallel ranks are engines of their own."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a resource says of the process that a span comes from."""

    kind: str
    role: Role
    engine_id: str
    service: str
    place: str
    pid: int
    """In the sender's own pid namespace; 0 when it is not told."""
    instance: str
    container_id: str
    pod_uid: str
    model: str
    """What it serves, where an operator has said so: vLLM's spans do not."""

    @property
    def own_name(self) -> str:
        """What an engine is called that nobody else has named."""
        service = self.service if self.service and not self.service.startswith("unknown_service") else self.kind
        parts = [service, self.place, str(self.pid) if self.pid else ""]
        return "-".join(part for part in parts if part)[-ID_CHARACTERS:]


@dataclass(slots=True)
class Sender:
    """An engine's process that exports spans."""

    engine_id: str | None
    """None when several announced engines are this process: nobody knows which of them the span is of."""
    record: EngineRecord | None
    """How it is announced; None when somebody else does that."""
    announced: EngineRecord | None = None
    models: dict[str, None] = field(default_factory=dict)
    heard_at: float = 0.0
    repeat_at: float = 0.0

    def serve(self, model: str | None) -> None:
        """Note a model that a request names."""
        if model is not None and model not in self.models and self.record is not None and len(self.models) < MODELS:
            self.models[model] = None
            self.record = msgspec.structs.replace(self.record, models=tuple(self.models))


def identity(resource: Mapping[str, Value], kind: str, role: Role) -> Identity:
    """Return what a resource's attributes say."""

    def text(name: str) -> str:
        value = resource.get(name, "")
        return value.strip()[:ID_CHARACTERS] if isinstance(value, str) else ""

    pid = next((_pid(resource[name]) for name in _PROCESS if name in resource), 0)
    place = next((text(name) for name in _PLACE if text(name)), "")
    return Identity(
        kind, role, text(ENGINE_ATTRIBUTE), text("service.name")[:LABEL_CHARACTERS], place, pid,
        text("service.instance.id"), text("container.id"), text("k8s.pod.uid"),
        text(MODEL_ATTRIBUTE)[:LABEL_CHARACTERS],
    )  # fmt: skip


def _pid(value: Value) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 11:
        value = int(value)
    return value if isinstance(value, int) and 0 < value < 2**31 else 0


class Senders:
    """Knows the senders. `engines` returns the engines that are in the account, whoever announced them."""

    def __init__(
        self,
        engines: Callable[[], Sequence[EngineRecord]],
        *,
        proc: Path = Path("/proc"),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engines = engines
        self._proc = proc
        self._monotonic = monotonic
        self._known: dict[Identity, Sender] = {}
        self._own: set[str] = set()

    def find(self, who: Identity) -> Sender | None:
        """Return a sender that has been looked up lately, else None: then call `look_up`."""
        sender = self._known.get(who)
        now = self._monotonic()
        if sender is None or now >= sender.repeat_at:
            return None
        sender.heard_at = now
        return sender

    def look_up(self, who: Identity) -> Sender:
        """Return a sender after a look at who it is; reads /proc, which takes up to some tens of milliseconds."""
        pid = find_process(who.pid, who.kind, self._proc) if who.pid else None
        engine_id, announces = self._engine(who, pid)
        record = None
        if announces and engine_id is not None:
            record = EngineRecord(
                engine_id=engine_id,
                kind=who.kind,
                pid=pid,
                container_id=who.container_id or None,
                pod_uid=who.pod_uid or None,
                role=who.role,
            )
            self._own.add(engine_id)
        now = self._monotonic()
        sender = Sender(engine_id, record, heard_at=now, repeat_at=now + REPEAT_SECONDS)
        sender.serve(who.model or None)
        before = self._known.pop(who, None)
        if before is not None:
            sender.announced = before.announced
            for model in before.models:
                sender.serve(model)
        self._known[who] = sender
        if len(self._known) > SENDERS:
            gone = self._known.pop(next(iter(self._known)))
            self._own.discard(gone.engine_id or "")
        return sender

    def _engine(self, who: Identity, pid: int | None) -> tuple[str | None, bool]:
        """Return a sender's engine id and whether it must be announced from here."""
        others = [record for record in self._engines() if record.engine_id not in self._own]
        if who.engine_id:
            if any(re.fullmatch(re.escape(who.engine_id) + _RANK, record.engine_id) for record in others):
                return None, False
            return who.engine_id, all(record.engine_id != who.engine_id for record in others)
        if pid is not None:
            line = lineage(pid, self._proc)
            found = [one for one in others if one.pid and (one.pid in line or pid in lineage(one.pid, self._proc))]
        elif not who.pid and self._is_alone(who):
            found = [one for one in others if one.kind == who.kind]
            if len(found) > 1:
                return who.own_name, True
        else:
            found = []
        if found:
            return (found[0].engine_id if len(found) == 1 else None), False
        return who.own_name, True

    def _is_alone(self, who: Identity) -> bool:
        """Return whether no other sender of this kind that names no process has been heard of lately."""
        since = self._monotonic() - RECENT_SECONDS
        return not any(
            other.kind == who.kind and not other.pid and other != who and sender.heard_at > since
            for other, sender in self._known.items()
        )


def find_process(inner_pid: int, kind: str, proc: Path = Path("/proc")) -> int | None:
    """Return our pid of the only process of this kind that has `inner_pid` in its own pid namespace, else None.

    A process is of a kind when its command line says so. Two containers of one image often have the same ids inside.
    """
    found = [
        int(folder.name)
        for folder in proc.iterdir()
        if folder.name.isdigit() and _inner_pid(folder) == inner_pid and kind in _command(folder)
    ]
    return found[0] if len(found) == 1 else None


def _inner_pid(folder: Path) -> int:
    """Return the pid that a process has in its innermost namespace (NSpid in proc(5)); 0 when it is gone."""
    try:
        status = (folder / "status").read_bytes()
    except OSError:
        return 0
    start = status.find(b"\nNSpid:")
    return int(status[start + 7 : status.index(b"\n", start + 7)].split()[-1]) if start >= 0 else 0


def _command(folder: Path) -> str:
    try:
        command = (folder / "cmdline").read_bytes()
    except OSError:
        return ""
    return command[: 64 << 10].decode(errors="replace").lower()
