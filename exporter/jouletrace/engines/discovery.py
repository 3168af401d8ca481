"""Finds the serving engines of this machine: processes on a GPU, the engine that they belong to, its metrics page.

A GPU is held by a worker; who listens is often its ancestor (vLLM) or a sibling (TGI's router). So the family is looked
at: the oldest ancestor in the same container that is known as an engine, and all that descend from it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from jouletrace.engines.families import KINDS
from jouletrace.engines.scraping import Target, falls_asleep
from jouletrace.workloads.cgroups import Membership, membership_of
from jouletrace.workloads.listeners import Listener, NoPermissionError, listeners
from jouletrace.workloads.processes import command_line, environment, family, lineage, parents

_log = structlog.get_logger(__name__)

_PYTHON: Final = re.compile(r"python[0-9.]*|pypy[0-9.]*|uv|uvx")
_PACKAGE: Final = re.compile(r"\.|::")
_NAMES: Final = {
    "vllm_nvext": "nim",
    "nim_llm": "nim",
    "VLLM": "vllm",
    "vllm": "vllm",
    "sglang": "sglang",
    "trtllm-serve": "trtllm",
    "tensorrt_llm": "trtllm",
    "tritonserver": "triton",
    "text-generation-launcher": "tgi",
    "text-generation-router": "tgi",
    "text-generation-server": "tgi",
    "text_generation_server": "tgi",
    "llama-server": "llamacpp",
    "dynamo": "dynamo",
}
"""By program, script, Python package, or what stands before `::` in a process title."""
DYNAMO_PORT: Final = 8081
"""Of a Dynamo worker's pages; its frontend holds no GPU."""
_PORT_FLAGS: Final[Mapping[str, tuple[str, ...]]] = {
    "triton": ("--metrics-port",),
    "tgi": ("--port", "-p"),
    "dynamo": (),
}
_PORT_VARIABLES: Final = {
    "tgi": "PORT",
    "dynamo": "DYN_SYSTEM_PORT",
    "nim": "NIM_SERVER_PORT",
    "llamacpp": "LLAMA_ARG_PORT",
}
_LIMIT_FLAGS: Final[Mapping[str, tuple[str, ...]]] = {
    "vllm": ("--max-num-seqs", "--max_num_seqs"),
    "sglang": ("--max-running-requests",),
    "trtllm": ("--max_batch_size", "--max-batch-size"),
    "llamacpp": ("--parallel", "-np"),
    "dynamo": ("--max-num-seqs", "--max-running-requests"),
}


@dataclass(frozen=True, slots=True)
class _Family:
    """An engine's processes."""

    kind: str
    root: int
    pids: tuple[int, ...]
    gpu_uuids: tuple[str, ...]


class Discovery:
    """Looks for engines. `holders` returns by device uuid the pids that hold a context; called from any thread."""

    def __init__(self, holders: Callable[[], Mapping[str, Sequence[int]]], proc: Path = Path("/proc")) -> None:
        self._holders = holders
        self._proc = proc
        self._complained: set[tuple[int, str]] = set()

    def targets(self) -> list[Target]:
        """Return the engines that hold a GPU now and whose metrics can be asked for."""
        held: dict[int, list[str]] = {}
        for uuid, pids in self._holders().items():
            for pid in pids:
                held.setdefault(pid, []).append(uuid)
        families = self._families(held) if held else []
        targets = [target for one in families if (target := self._target(one)) is not None]
        self._complained = {
            (root, word) for root, word in self._complained if any(one.root == root for one in families)
        }
        return targets

    def _families(self, held: Mapping[int, Sequence[str]]) -> list[_Family]:
        roots: dict[int, tuple[str, dict[str, None]]] = {}
        for pid, uuids in held.items():
            root = self._root(pid)
            if root is not None:
                roots.setdefault(root[0], (root[1], {}))[1].update(dict.fromkeys(uuids))
        if not roots:
            return []
        parent_of = parents(self._proc)
        return [
            _Family(kind, root, tuple(family(root, parent_of)), tuple(sorted(uuids)))
            for root, (kind, uuids) in roots.items()
        ]

    def _root(self, pid: int) -> tuple[int, str] | None:
        """Return the oldest process of the engine that a process belongs to, and its kind; None for no engine."""
        found = None
        home = membership_of(pid, self._proc)
        for one in lineage(pid, self._proc):
            if one == 1 and pid != 1 and not home.container_id:
                break
            if one != pid and membership_of(one, self._proc).container_id != home.container_id:
                break
            kind = engine_kind(command_line(one, self._proc))
            if kind is not None:
                # A Dynamo worker may run its engine in processes of its own.
                found = (one, kind)
        return found

    def _target(self, engine: _Family) -> Target | None:
        arguments = [command_line(pid, self._proc) for pid in engine.pids]
        try:
            sockets = listeners(engine.pids, self._proc)
        except NoPermissionError:
            self._complain(
                engine,
                "permission",
                "an engine's processes may not be looked into: run jouletrace as root, or name the engine in "
                "engines.targets",
            )
            return None
        socket = self._metrics_socket(engine, arguments, sockets)
        if socket is None:
            if sockets:  # While it loads its model nobody listens.
                self._complain(
                    engine,
                    "port",
                    "an engine listens on several ports and none is known as that of its metrics: name it in "
                    "engines.targets",
                    ports=sorted({one.port for one in sockets}),
                )
            return None
        home = membership_of(engine.root, self._proc)
        host = f"[{socket.host}]" if ":" in socket.host else socket.host
        return Target(
            url=f"http://{host}:{socket.port}",
            engine_id=_engine_id(engine.kind, home, socket.port),
            kind=None if engine.kind == "dynamo" else engine.kind,
            path="/metrics" if engine.kind == "dynamo" else None,
            pid=engine.root,
            pids=frozenset(engine.pids),
            container_id=home.container_id or None,
            pod_uid=home.pod_uid or None,
            gpu_uuids=engine.gpu_uuids,
            max_num_seqs=_number(_given(arguments, _LIMIT_FLAGS.get(engine.kind, ()))),
            falls_asleep=engine.kind == "llamacpp" and any(map(falls_asleep, arguments)),
        )

    def _metrics_socket(
        self, engine: _Family, arguments: Sequence[Sequence[str]], sockets: Sequence[Listener]
    ) -> Listener | None:
        """Return where the page is; ports that nobody has named are not tried, as a stray byte upsets NCCL's."""
        variable = _PORT_VARIABLES.get(engine.kind)
        said = [_number(_given(arguments, _PORT_FLAGS.get(engine.kind, ("--port",))))]
        if variable:
            said += [_number(environment(pid, {variable}, self._proc).get(variable)) for pid in engine.pids]
        usual = DYNAMO_PORT if engine.kind == "dynamo" else KINDS[engine.kind].port
        for port in (*said, usual):
            for one in sockets:
                if one.port == port:
                    return one
        own = {(one.host, one.port): one for one in sockets if one.pid == engine.root}
        return next(iter(own.values())) if len(own) == 1 and engine.kind != "triton" else None

    def _complain(self, engine: _Family, word: str, sentence: str, **fields: object) -> None:
        if (engine.root, word) not in self._complained:
            self._complained.add((engine.root, word))
            _log.warning(sentence, kind=engine.kind, pid=engine.root, **fields)


def engine_kind(arguments: Sequence[str]) -> str | None:
    """Return which kind of engine a command line starts, None for none."""
    kinds = (_NAMES.get(_PACKAGE.split(name)[0]) for name in _programs(arguments) if not name.endswith(".py"))
    return next((kind for kind in kinds if kind is not None), None)


def _programs(arguments: Sequence[str]) -> list[str]:
    """Return what a command line runs: its program, and for Python the module or script."""
    if not arguments:
        return []
    program = arguments[0].strip().rpartition("/")[2]
    if not _PYTHON.fullmatch(program):
        return [program]
    rest = iter(arguments[1:])
    for argument in rest:
        if argument == "-m":
            return [next(rest, "")]
        if argument in ("-c", "-"):
            return []
        if argument in ("-W", "-X"):
            next(rest, "")
        elif not argument.startswith("-") and argument != "run":
            return [argument.rpartition("/")[2]]
    return []


def _given(lines: Sequence[Sequence[str]], flags: Sequence[str]) -> str | None:
    """Return the value of a flag on the first command line that has it."""
    for line in lines:
        for at, argument in enumerate(line):
            flag, equals, value = argument.partition("=")
            if flag in flags:
                return value if equals else next(iter(line[at + 1 : at + 2]), None)
    return None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch("[1-9][0-9]{0,8}", text) else None


def _engine_id(kind: str, home: Membership, port: int) -> str:
    place = home.container_id[:12]
    return f"{kind}-{place}-{port}" if place else f"{kind}-{port}"
