import os
import socket
import stat
from pathlib import Path

import pytest

from jouletrace.unix_sockets import MODES, SocketError, bound, remove

KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("access", "mode"), [("owner", 0o600), ("group", 0o660), ("everyone", 0o666)])
def test_the_mode_is_the_one_asked_for_whatever_the_mask(
    tmp_path: Path, kind: socket.SocketKind, access: str, mode: int
) -> None:
    before = os.umask(0o027)
    try:
        with bound(tmp_path / "s", kind, MODES[access]):
            assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == mode
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    remove(tmp_path / "s")
    remove(tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left_kind", KINDS)
def test_a_socket_that_was_left_behind_is_replaced(
    tmp_path: Path, kind: socket.SocketKind, left_kind: socket.SocketKind
) -> None:
    with socket.socket(socket.AF_UNIX, left_kind) as left:
        left.bind(str(tmp_path / "s"))
    with bound(tmp_path / "s", kind, 0o600) as sock:
        assert sock.getsockname() == str(tmp_path / "s")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other_kind", KINDS)
def test_a_socket_in_use_is_left_alone(tmp_path: Path, kind: socket.SocketKind, other_kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_UNIX, other_kind) as other:
        other.bind(str(tmp_path / "s"))
        if other_kind is socket.SOCK_STREAM:
            other.listen()
        inode = (tmp_path / "s").stat().st_ino
        with pytest.raises(SocketError, match="somebody does already, perhaps another jouletrace"):
            bound(tmp_path / "s", kind, 0o600)
        assert (tmp_path / "s").stat().st_ino == inode


def test_what_else_can_be_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    cases = {
        tmp_path / "file": "there is a file that is not a socket",
        tmp_path / "no" / "s": "no does not exist; create it",
        tmp_path / ("x" * 120): "longer than the 107 bytes",
    }
    for path, reason in cases.items():
        with pytest.raises(SocketError, match=reason):
            bound(path, socket.SOCK_STREAM, 0o600)
    assert (tmp_path / "file").read_text() == "precious"
