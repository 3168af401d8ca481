"""Unix sockets that are ours: bound with a mode, in the place of a stale one, and removed at the end."""

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path
from typing import Final

MODES: Final = {"owner": 0o600, "group": 0o660, "everyone": 0o666}


class SocketError(Exception):
    """A socket cannot be opened; the message says which, why and what to do."""


def bound(path: Path, kind: socket.SocketKind, mode: int) -> socket.socket:
    """Return a bound socket, in the place of one that nobody listens on any more; raises SocketError."""
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        _make_room(path, kind)
        # The mode is set by the mask, so that at no moment the socket is open to more than it should be.
        mask = os.umask(0o777 & ~mode)
        try:
            sock.bind(str(path))
        finally:
            os.umask(mask)
    except OSError as error:
        sock.close()
        raise SocketError(f"Cannot listen on {path}: {_reason(path, error)}") from error
    except SocketError:
        sock.close()
        raise
    return sock


def _make_room(path: Path, kind: socket.SocketKind) -> None:
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise SocketError(
            f"Cannot listen on {path}: there is a file that is not a socket; remove it or choose another."
        )
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # Somebody listens and is busy.
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise
    raise SocketError(
        f"Cannot listen on {path}: somebody does already, perhaps another jouletrace; `ss -xlp` shows who. "
        "Stop that, or choose another path."
    )


def _reason(path: Path, error: OSError) -> str:
    match error.errno:
        case errno.ENOENT:
            return f"the directory {path.parent} does not exist; create it or choose another path."
        case errno.EACCES | errno.EPERM:
            return f"this user may not write to {path.parent}; change its owner or choose another path."
        case None:
            # bind() of a path over 107 bytes (sun_path, unix(7)) has no number, only words.
            return "the path is longer than the 107 bytes that Linux allows; choose a shorter one."
        case _:
            return f"{error.strerror}."


def remove(path: Path) -> None:
    """Remove a socket's file, if it is there still."""
    with contextlib.suppress(OSError):
        path.unlink()
