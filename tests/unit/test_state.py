import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import structlog.testing

from jouletrace.energy.baseline import IdleKind, IdleLevel, encode
from jouletrace.state import IDLE_FILE, StateDirectory, replace

LEVELS = {"GPU-1": {IdleKind.BARE: IdleLevel(79.25, 12, 1)}}
OTHER = {"GPU-1": {IdleKind.BARE: IdleLevel(80.0, 120, 2)}, "GPU-2": {IdleKind.PARKED: IdleLevel(121.0, 6, 3)}}


def test_what_was_saved_is_there_again(tmp_path: Path) -> None:
    directory = tmp_path / "not" / "yet" / "there"
    with structlog.testing.capture_logs() as logs:
        assert StateDirectory(directory).load_idle_levels() == {}
        StateDirectory(directory).save_idle_levels(LEVELS)
        assert StateDirectory(directory).load_idle_levels() == LEVELS
        StateDirectory(directory).save_idle_levels(OTHER)
        assert StateDirectory(directory).load_idle_levels() == OTHER
    assert logs == []
    assert [file.name for file in directory.iterdir()] == [IDLE_FILE]


def test_nothing_learnt_destroys_nothing(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    state.save_idle_levels({})
    assert list(tmp_path.iterdir()) == []
    state.save_idle_levels(LEVELS)
    state.save_idle_levels({})
    assert state.load_idle_levels() == LEVELS


@pytest.mark.parametrize(
    "content",
    [b"", b"{", os.urandom(100), encode(LEVELS)[:-20], b'{"format": 99, "devices": {}}', b'{"format": 1, "x": 1}'],
)
def test_a_file_that_makes_no_sense_is_put_aside(tmp_path: Path, content: bytes) -> None:
    (tmp_path / IDLE_FILE).write_bytes(content)
    state = StateDirectory(tmp_path)
    with structlog.testing.capture_logs() as logs:
        assert state.load_idle_levels() == {}
    (line,) = logs
    assert line["event"] == "idle levels make no sense, they are learnt anew"
    assert line["file"] == str(tmp_path / IDLE_FILE)
    assert line["error"]
    assert Path(line["kept_as"]).read_bytes() == content
    state.save_idle_levels(LEVELS)
    assert state.load_idle_levels() == LEVELS
    assert Path(line["kept_as"]).read_bytes() == content


def test_a_file_that_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / IDLE_FILE).mkdir()
    with structlog.testing.capture_logs() as logs:
        assert StateDirectory(tmp_path).load_idle_levels() == {}
    (line,) = logs
    assert line["event"] == "idle levels cannot be read, they are learnt anew"
    assert line["error"] == "Is a directory"
    assert (tmp_path / IDLE_FILE).is_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_without_permission(tmp_path: Path) -> None:
    StateDirectory(tmp_path).save_idle_levels(LEVELS)
    (tmp_path / IDLE_FILE).chmod(0)
    tmp_path.chmod(0o500)
    try:
        with structlog.testing.capture_logs() as logs:
            assert StateDirectory(tmp_path).load_idle_levels() == {}
            StateDirectory(tmp_path).save_idle_levels(OTHER)
        assert [line["error"] for line in logs] == ["Permission denied"] * 2
    finally:
        tmp_path.chmod(0o700)
        (tmp_path / IDLE_FILE).chmod(0o600)
    assert StateDirectory(tmp_path).load_idle_levels() == LEVELS


def test_a_directory_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    state = StateDirectory(tmp_path / "file")
    with structlog.testing.capture_logs() as logs:
        assert state.load_idle_levels() == {}
        for _ in range(3):
            state.save_idle_levels(LEVELS)
        (tmp_path / "file").unlink()
        state.save_idle_levels(LEVELS)
        (tmp_path / "file" / IDLE_FILE).unlink()
        (tmp_path / "file").rmdir()
        (tmp_path / "file").write_text("in the way again")
        state.save_idle_levels(LEVELS)
    assert [line["event"].partition(",")[0] for line in logs] == [
        "idle levels cannot be read",
        "idle levels cannot be saved",
        "idle levels cannot be saved",
    ]
    assert "set state_dir to a writable place" in logs[1]["event"]
    assert logs[1]["directory"] == str(tmp_path / "file")


def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / IDLE_FILE
    replace(file, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace(file, b"new")
    assert file.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == [IDLE_FILE]


KILLED = """
import os, signal, sys
from pathlib import Path
from jouletrace import state

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "write":
    os.fsync = die  # written, in part or in whole, not yet safe
else:
    Path.replace = die  # safe, not yet renamed
state.replace(Path(sys.argv[1]), b"new" * 10_000)
"""


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_kill_at_any_moment_leaves_the_old_content(tmp_path: Path, moment: str) -> None:
    StateDirectory(tmp_path).save_idle_levels(LEVELS)
    command = [sys.executable, "-c", KILLED, str(tmp_path / IDLE_FILE), moment]
    done = subprocess.run(command, check=False, timeout=30, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert StateDirectory(tmp_path).load_idle_levels() == LEVELS
    StateDirectory(tmp_path).save_idle_levels(OTHER)
    assert StateDirectory(tmp_path).load_idle_levels() == OTHER
