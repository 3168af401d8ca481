"""What the kubelet says about who holds which device: its pod-resources API v1, `List`, over its Unix socket.

Needs grpcio. The messages are declared here as far as they are used (kubernetes, staging/src/k8s.io/kubelet,
pkg/apis/podresources/v1/api.proto); a protobuf reader passes over the other fields.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from jouletrace.workloads.pods import Claim, KubeletError

METHOD: Final = "/v1.PodResourcesLister/List"
TIMEOUT_SECONDS: Final = 1.0
"""The kubelet answers from memory, in milliseconds; pod names are to be right within 2 s of a pod's start."""
MOST_BYTES: Final = 16 << 20
"""What the kubelet's own client takes (pkg/kubelet, defaultPodResourcesMaxSize)."""
RESOURCES: Final = "nvidia.com/"
"""Beginning of the names of the resources that are GPUs or parts of them."""

_Proto = descriptor_pb2.FieldDescriptorProto
_MESSAGES: Final[Mapping[str, Mapping[str, tuple[int, str]]]] = {
    "ListPodResourcesResponse": {"pod_resources": (1, "PodResources")},
    "PodResources": {"name": (1, ""), "namespace": (2, ""), "containers": (3, "ContainerResources")},
    "ContainerResources": {"name": (1, ""), "devices": (2, "ContainerDevices")},
    "ContainerDevices": {"resource_name": (1, ""), "device_ids": (2, "")},
}
"""By message and field: its number and the message that it repeats; else it is text."""
_REPEATED_TEXT: Final = "device_ids"


def list_claims(socket: Path, timeout_seconds: float = TIMEOUT_SECONDS) -> list[Claim]:
    """Return who holds GPUs; blocks. Also pods that have ended and are not deleted. Raises KubeletError."""
    options = (
        ("grpc.max_receive_message_length", MOST_BYTES),
        # Else it is the socket's path, percent-encoded, which some servers refuse.
        ("grpc.default_authority", "localhost"),
        # A channel for each call: nothing waits out a backoff when the kubelet has just come back.
        ("grpc.use_local_subchannel_pool", 1),
    )
    with grpc.insecure_channel(f"unix:{socket}", options) as channel:
        ask: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        try:
            answer = ask(b"", timeout=timeout_seconds)
        except grpc.RpcError as failure:
            # What a call raises is the call as well, which the types do not say.
            call: Any = failure
            raise KubeletError(call.code().name, call.details()) from None
    try:
        return _claims(_response.FromString(answer))
    except DecodeError as failure:
        raise KubeletError("INTERNAL", f"its answer makes no sense ({failure})") from None


def _claims(response: Any) -> list[Claim]:
    return [
        Claim(pod.namespace, pod.name, container.name, devices.resource_name, device_id)
        for pod in response.pod_resources
        for container in pod.containers
        for devices in container.devices
        if devices.resource_name.startswith(RESOURCES)
        for device_id in devices.device_ids
    ]


def _message_class() -> Any:
    """Return the class of the answer."""
    file = descriptor_pb2.FileDescriptorProto(name="jouletrace/podresources.proto", package="v1", syntax="proto3")
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, (number, part) in fields.items():
            described.field.add(
                name=name,
                number=number,
                label=_Proto.LABEL_REPEATED if part or name == _REPEATED_TEXT else _Proto.LABEL_OPTIONAL,
                type=_Proto.TYPE_MESSAGE if part else _Proto.TYPE_STRING,
                type_name=f".v1.{part}" if part else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("v1.ListPodResourcesResponse"))


_response: Final = _message_class()
