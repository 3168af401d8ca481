"""Where processes listen, from /proc/PID/net: also those in another network namespace, as containers are."""

import ipaddress
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_LISTEN: Final = b"0A"
"""TCP_LISTEN of the kernel's tcp_states.h."""
_SOCKET: Final = re.compile(r"socket:\[([0-9]+)\]")
_LOCAL: Final = re.compile(r"\|-- ([0-9.]+)\n\s+/32 host LOCAL")
"""An address of a namespace's own in /proc/net/fib_trie."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP port that a process listens on."""

    pid: int
    host: str
    """Where it can be reached from here."""
    port: int


class NoPermissionError(Exception):
    """The open files of a process may not be seen."""


def listeners(pids: Collection[int], proc: Path = Path("/proc")) -> list[Listener]:
    """Return the ports of some processes; raises NoPermissionError when one's open files may not be seen.

    One that listens on every address is reached over loopback, in another network namespace over its first address.
    """
    found: list[Listener] = []
    namespaces: dict[str, Mapping[int, tuple[str, int]]] = {}
    for pid in pids:
        namespace = _namespace(pid, proc)
        if namespace is None:
            continue
        if namespace not in namespaces:
            namespaces[namespace] = _listening(pid, proc, is_ours=namespace == _namespace("self", proc))
        sockets = namespaces[namespace]
        found.extend(Listener(pid, *sockets[inode]) for inode in _inodes(pid, proc) if inode in sockets)
    return found


def _namespace(pid: int | str, proc: Path) -> str | None:
    try:
        return str((proc / str(pid) / "ns" / "net").readlink())
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise NoPermissionError from error


def _inodes(pid: int, proc: Path) -> Iterable[int]:
    try:
        files = list((proc / str(pid) / "fd").iterdir())
    except FileNotFoundError:
        return
    except PermissionError as error:
        raise NoPermissionError from error
    for file in files:
        try:
            match = _SOCKET.fullmatch(str(file.readlink()))
        except OSError:
            continue
        if match:
            yield int(match[1])


def _listening(pid: int, proc: Path, *, is_ours: bool) -> Mapping[int, tuple[str, int]]:
    """Return by inode where the sockets of a process's network namespace listen."""
    net, found = proc / str(pid) / "net", {}
    for file in ("tcp", "tcp6"):
        try:
            lines = (net / file).read_bytes().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if len(words) > 9 and words[3] == _LISTEN:
                address, _, port = words[1].partition(b":")
                found[int(words[9])] = (_address(address), int(port, 16))
    own = "127.0.0.1" if is_ours else _own_address(net)
    return {
        inode: (own if host.is_unspecified else str(host), port)
        for inode, (host, port) in found.items()
        if is_ours or not host.is_loopback
    }


def _address(text: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an address from the kernel's hexadecimal: words of 32 bits in the machine's order, here little endian."""
    raw = bytes.fromhex(text.decode())
    swapped = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    address = ipaddress.ip_address(swapped)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _own_address(net: Path) -> str:
    """Return the first address of a network namespace that is not loopback."""
    try:
        addresses = _LOCAL.findall((net / "fib_trie").read_text())
    except OSError:
        addresses = []
    return next((one for one in addresses if not one.startswith("127.")), "127.0.0.1")
