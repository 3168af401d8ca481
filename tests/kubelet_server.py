"""A kubelet's pod-resources API on a Unix socket: real gRPC, its messages encoded by hand from the wire format.

Numbers of fields as in kubernetes' api.proto of podresources v1; fields that jouletrace does not read are there too.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import grpc

GPU = "nvidia.com/gpu"


@dataclass(frozen=True)
class Pod:
    """A pod as the kubelet lists it: device ids by container, of one resource."""

    namespace: str
    name: str
    containers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    resource: str = GPU

    def encoded(self) -> bytes:
        """Return a PodResources message."""
        containers = [
            _text(1, name)
            + _part(2, _text(1, "rdma/hca") + _text(2, "mlx5_0"))
            + _part(2, _text(1, self.resource) + b"".join(_text(2, one) for one in ids) + _part(3, _NUMA_NODE))
            + _CPU_IDS
            + _part(5, _text(1, "gpu.example.com") + _text(2, "claim"))
            for name, ids in self.containers.items()
        ]
        return _text(1, self.name) + _text(2, self.namespace) + b"".join(_part(3, one) for one in containers)


def _part(number: int, content: bytes) -> bytes:
    """Return a length-delimited field (wire type 2)."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _text(number: int, text: str) -> bytes:
    return _part(number, text.encode())


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


_CPU_IDS = _part(3, bytes([0, 1, 2]))
_NUMA_NODE = _part(1, bytes([1 << 3, 0]))


class KubeletServer:
    """Answers `List` with `pods` while it is started; a context manager. `slow` holds answers back until it is set."""

    def __init__(self, socket: Path, *pods: Pod) -> None:
        self.socket = socket
        self.pods: Sequence[Pod] = pods
        self.raw: bytes | None = None
        """What is answered instead of the pods."""
        self.asked = 0
        self.release = threading.Event()
        self.release.set()
        self._server: grpc.Server | None = None

    def start(self) -> None:
        """Listen, on a new socket."""
        self.socket.unlink(missing_ok=True)
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(self._list)
        service = grpc.method_handlers_generic_handler("v1.PodResourcesLister", {"List": handler})
        self._server.add_generic_rpc_handlers((service,))
        self._server.add_insecure_port(f"unix:{self.socket}")
        self._server.start()

    def stop(self) -> None:
        """Stop at once; the socket goes."""
        if self._server is not None:
            self.release.set()
            self._server.stop(0).wait(5)
            self._server = None
        self.socket.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _list(self, request: bytes, context: "grpc.ServicerContext") -> bytes:
        self.asked += 1
        self.release.wait(10)
        return b"".join(_part(1, pod.encoded()) for pod in self.pods) if self.raw is None else self.raw
