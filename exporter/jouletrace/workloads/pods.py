"""Which name a pod's uid stands for: pure joins of what /proc, the kubelet and its log folders say.

A process tells its pod's uid, its container's name and its devices; the kubelet tells which pods hold a device but not
their uids, and lists pods that have ended; the kubelet's log folders tell both where they may be read. A name that
these do not settle stays unknown.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

MOST_REMEMBERED: Final = 4096
"""Claims that are remembered when they are listed no more: those of a day with three new pods a minute."""


class PodName(NamedTuple):
    """A pod as the cluster names it."""

    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A device that a container of a pod was given, or is still listed with."""

    namespace: str
    pod: str
    container: str
    resource: str
    device_id: str
    """A GPU's or MIG instance's UUID, `UUID::3` for a time slice, or whatever else the device plugin calls it."""


class KubeletError(Exception):
    """The kubelet gave no answer; `code` is gRPC's name of the reason."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code


@dataclass(frozen=True, slots=True)
class LivePod:
    """A pod of which a process is on a device now."""

    uid: str
    seen_ns: int
    """When its youngest process was first seen."""
    containers: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By container name, empty for unknown: the uuids of the devices that its processes are on."""


class PodNames:
    """The names of the pods that are on devices. A name holds until the pod's last process is gone."""

    def __init__(self) -> None:
        self._bound: dict[str, PodName] = {}
        self._since: dict[Claim, int] = {}
        """When each claim was first listed, of those that are."""
        self._gone: dict[Claim, None] = {}
        """Claims that were listed once, the latest last."""
        self._returned: set[Claim] = set()
        """Claims that are listed again."""
        self._newest: dict[tuple[str, str], int] = {}
        """When the newest claim to a device id came, by resource and id."""

    def __getitem__(self, uid: str) -> PodName | None:
        """Return a pod's name, None while it is not known."""
        return self._bound.get(uid)

    def learn(self, claims: Iterable[Claim], asked_ns: int) -> None:
        """Take in an answer of the kubelet."""
        before, self._since = self._since, {claim: self._since.get(claim, asked_ns) for claim in claims}
        self._returned = {claim for claim in self._since if claim in self._returned or claim in self._gone}
        self._gone |= dict.fromkeys(before)
        remembered = [claim for claim in self._gone if claim not in self._since]
        self._gone = dict.fromkeys(remembered[-MOST_REMEMBERED:])
        self._newest = {}
        for claim, since_ns in self._since.items():
            key = claim.resource, claim.device_id
            self._newest[key] = max(since_ns, self._newest.get(key, 0))

    def keep(self, pods: Sequence[LivePod]) -> Sequence[LivePod]:
        """Forget all pods but these; return those whose names are not known."""
        alive = {pod.uid for pod in pods}
        self._bound = {uid: name for uid, name in self._bound.items() if uid in alive}
        return [pod for pod in pods if pod.uid not in self._bound]

    def bind_logged(self, pods: Iterable[LivePod], logged: Mapping[str, PodName]) -> None:
        """Name the pods that have a log folder: it says both name and uid."""
        self._bound |= {pod.uid: logged[pod.uid] for pod in pods if pod.uid in logged}

    def bind_listed(self, pods: Iterable[LivePod], devices: Collection[str], asked_ns: int) -> None:
        """Name the pods that only one listed pod can be; `devices` are the uuids of all GPUs here.

        The answer, asked for at `asked_ns`, must be younger than the pod's first process: then the pod is in it.
        """
        taken = set(self._bound.values())
        possible = {pod.uid: self._candidates(pod, devices) - taken for pod in pods if pod.seen_ns <= asked_ns}
        while True:
            only = {uid: next(iter(names)) for uid, names in possible.items() if len(names) == 1}
            # One name for two uids: one of these pods uses a GPU that it has not claimed, and nobody can say which.
            found = {uid: name for uid, name in only.items() if list(only.values()).count(name) == 1}
            if not found:
                return
            self._bound |= found
            possible = {uid: names - set(found.values()) for uid, names in possible.items() if uid not in found}

    def container(self, uid: str, device: str, devices: Collection[str]) -> str:
        """Return the only container of a pod that may hold a device; empty for several or none."""
        names = {
            claim.container
            for claim in self._since
            if (claim.namespace, claim.pod) == self._bound.get(uid) and may_be(claim, device, devices)
        }
        return names.pop() if len(names) == 1 else ""

    def _candidates(self, pod: LivePod, devices: Collection[str]) -> set[PodName]:
        """Return the listed pods that hold all devices of a live pod in containers of the same names."""
        found: set[PodName] | None = None
        for container, used in pod.containers.items():
            for device in used:
                holders = {
                    PodName(claim.namespace, claim.pod)
                    for claim in self._current()
                    if container in ("", claim.container) and may_be(claim, device, devices)
                }
                found = holders if found is None else found & holders
        return found or set()

    def _current(self) -> Iterable[Claim]:
        """Yield the claims that may still hold: of several to one device id only the newest does, the others' pods
        have ended. One that is listed again may be an ended pod's that a restarted kubelet remembers, or a new pod's
        of the old name: then all may hold.
        """
        unclear = {(claim.resource, claim.device_id) for claim in self._returned}
        for claim, since_ns in self._since.items():
            key = claim.resource, claim.device_id
            if key in unclear or since_ns == self._newest[key]:
                yield claim


def may_be(claim: Claim, device: str, devices: Collection[str]) -> bool:
    """Return whether what was claimed may be (a part of) a device.

    `UUID`, `UUID::3` and `MIG-UUID/3/0` name the GPU. Other ids (a MIG instance's own UUID, an index) may be any.
    """
    named = next((uuid for uuid in devices if uuid in claim.device_id), None)
    return named == device if named or "GPU-" in claim.device_id else True
