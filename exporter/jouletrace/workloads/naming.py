"""Asks the kubelet and its log folders for the names of the pods on the devices, as seldom as their names allow."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from jouletrace.clock import Clock
from jouletrace.config import ConfigError
from jouletrace.logs import Transitions
from jouletrace.workloads.pods import Claim, KubeletError, LivePod, PodName, PodNames

NS: Final = 1_000_000_000
REFRESH_NS: Final = 30 * NS
"""How often the kubelet is asked when nothing is new: it lists ended pods too, and which of two came later is told from
when each was first listed."""
RETRY_NS: Final = 2 * NS
"""How soon a kubelet that did not answer is asked again while a pod waits for its name."""
MOST_FOLDERS: Final = 4096
"""Log folders that are looked at; the kubelet runs 110 pods by default and keeps the logs of few dead ones."""

_log = structlog.get_logger(__name__)


def kubelet_at(socket: str) -> Callable[[], Sequence[Claim]]:
    """Return what asks the kubelet at a socket and may raise KubeletError; raises ConfigError without grpcio."""
    try:
        # grpcio takes 60 ms to import and 8 MiB, and not everybody has it.
        from jouletrace.workloads.kubelet import list_claims  # noqa: PLC0415
    except ModuleNotFoundError:
        raise ConfigError(
            "workloads.pod_resources_socket: needs the package grpcio, which is not installed; "
            "run `pip install 'jouletrace[grpc]'`, or set it to nothing where workloads.pod_logs_dir can be read"
        ) from None
    return partial(list_claims, Path(socket))


class PodNaming:
    """Keeps the names of the pods on devices; an empty `socket` or `logs_dir` is not asked. For one thread.

    Raises ConfigError when the kubelet is to be asked without grpcio.
    """

    def __init__(self, socket: str, logs_dir: str, clock: Clock) -> None:
        self.names = PodNames()
        self.answered_ns: int | None = None
        """When the kubelet was asked that answered last."""
        self.errors: dict[str, int] = {}
        """Questions without an answer, by gRPC's name of the reason."""
        self._socket = socket
        self._list_claims = kubelet_at(socket) if socket else None
        self._logs_dir = logs_dir
        self._clock = clock
        self._asked_ns: int | None = None
        self._failures = Transitions(_log, time.monotonic_ns)

    def update(self, pods: Sequence[LivePod], devices: Collection[str]) -> None:
        """Name the pods that are on devices now, as far as it is certain; may wait a second for the kubelet."""
        unnamed = self.names.keep(pods)
        if unnamed and self._logs_dir:
            self.names.bind_logged(unnamed, self._logged())
            unnamed = self.names.keep(pods)
        if self._list_claims is not None and self._is_due(unnamed):
            self._ask(self._list_claims)
        if unnamed and self.answered_ns is not None:
            self.names.bind_listed(unnamed, devices, self.answered_ns)

    def _is_due(self, unnamed: Sequence[LivePod]) -> bool:
        if self._asked_ns is None:
            return True
        waited_ns = self._clock.now_ns() - self._asked_ns
        is_waited_for = any(self.answered_ns is None or pod.seen_ns > self.answered_ns for pod in unnamed)
        if is_waited_for:
            return self._asked_ns == self.answered_ns or waited_ns >= RETRY_NS
        return waited_ns >= REFRESH_NS

    def _ask(self, list_claims: Callable[[], Sequence[Claim]]) -> None:
        self._asked_ns = self._clock.now_ns()
        try:
            claims = list_claims()
        except KubeletError as failure:
            self.errors[failure.code] = self.errors.get(failure.code, 0) + 1
            self._failures.failed(
                "kubelet",
                "the kubelet does not say which pods hold the GPUs, new pods may stay without a name: mount the folder "
                "of its pod-resources socket and let jouletrace's user connect to it, or set "
                "workloads.pod_resources_socket to nothing",
                socket=self._socket,
                error=str(failure),
            )
            return
        self.answered_ns = self._asked_ns
        self.names.learn(claims, self._asked_ns)
        self._failures.recovered("kubelet", "the kubelet answers again", socket=self._socket)

    def _logged(self) -> Mapping[str, PodName]:
        try:
            found = logged_pods(Path(self._logs_dir))
        except OSError as failure:
            self._failures.failed(
                "logs",
                "the log folders of pods cannot be read, so names come from the kubelet alone: mount them or set "
                "workloads.pod_logs_dir to nothing",
                directory=self._logs_dir,
                error=failure.strerror,
            )
            return {}
        self._failures.recovered("logs", "the log folders of pods can be read", directory=self._logs_dir)
        return found


def logged_pods(folder: Path) -> dict[str, PodName]:
    """Return by uid the pods that have a log folder, `NAMESPACE_NAME_UID`; raises OSError."""
    found = {}
    for number, entry in enumerate(folder.iterdir()):
        parts = entry.name.split("_")
        if len(parts) == 3 and all(parts):
            found[parts[2]] = PodName(parts[0], parts[1])
        if number == MOST_FOLDERS:
            break
    return found
