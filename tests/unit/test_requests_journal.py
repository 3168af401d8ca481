import os
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from jouletrace.requests.journal import FILE, MAGIC, PIECE_ENTRIES, Journal, JournalError, boot_id


class Entry(msgspec.Struct, frozen=True):
    joules: float
    name: str | None = None


class Account(msgspec.Struct, frozen=True):
    clock: int = 0
    note: str | None = None
    totals: dict[tuple[str, str], float] = {}
    running: dict[str, Entry] = {}
    rows: list[tuple[int, float]] = []


def journal(directory: Path, boot: str = "boot-1", **options: Any) -> Journal[Account]:
    return Journal(directory, Account, boot=boot, **options)


def reopened(directory: Path, boot: str = "boot-1") -> Account | None:
    one = journal(directory, boot)
    try:
        return one.open()
    finally:
        one.close()


def history() -> list[Account]:
    """Return an account as it goes on: entries come, change and go."""
    return [
        Account(),
        Account(1, "début", {("m", "t"): 1.5}, {"a": Entry(0.25)}, [(1, 0.5)]),
        Account(2, None, {("m", "t"): 2.5, ("m", "u"): 1.0}, {"a": Entry(0.5, "x"), "b": Entry(1.0)}, [(1, 0.5)]),
        Account(3, None, {("m", "t"): 2.5, ("m", "u"): 1.0}, {"b": Entry(1.0)}, [(1, 0.5), (2, 1e300)]),
        Account(4, "", {("m", "t"): 1e18, ("m", "u"): 1.0}, {}, []),
    ]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    for count in range(1, len(history()) + 1):
        directory = tmp_path / str(count)
        one = journal(directory)
        assert one.open() is None
        for state in history()[:count]:
            one.write(state)
        one.close()
        assert reopened(directory) == history()[count - 1]


def test_only_changes_are_appended(tmp_path: Path) -> None:
    one = journal(tmp_path)
    one.open()
    big = {f"r{i}": Entry(float(i)) for i in range(10_000)}
    one.write(Account(running=big))
    before = (tmp_path / FILE).stat().st_size
    one.write(Account(running=big))
    assert (tmp_path / FILE).stat().st_size == before
    one.write(Account(running=big | {"r5": Entry(0.0)}))
    assert (tmp_path / FILE).stat().st_size - before < 100


@pytest.mark.parametrize("told", [history(), history()[2:]], ids=["from nothing", "from entries"])
def test_a_file_cut_at_any_byte_gives_the_last_complete_state(tmp_path: Path, told: list[Account]) -> None:
    one = journal(tmp_path / "whole")
    one.open()
    ends = []
    for state in told:
        one.write(state)
        ends.append((tmp_path / "whole" / FILE).stat().st_size)
    one.close()
    content = (tmp_path / "whole" / FILE).read_bytes()
    assert ends[-1] == len(content)
    cut = tmp_path / "cut"
    cut.mkdir()
    for length in range(len(content) + 1):
        (cut / FILE).write_bytes(content[:length])
        complete = sum(1 for end in ends if end <= length)
        with capture_logs() as logs:
            found = reopened(cut)
        assert found == (told[complete - 1] if complete else None), length
        assert len(logs) == (0 if length in ends else 1), length


@pytest.mark.parametrize("told", [history(), history()[2:]], ids=["from nothing", "from entries"])
def test_a_byte_damaged_anywhere_is_found(tmp_path: Path, told: list[Account]) -> None:
    one = journal(tmp_path)
    one.open()
    for state in told:
        one.write(state)
    one.close()
    content = (tmp_path / FILE).read_bytes()
    for at in range(len(content)):
        (tmp_path / FILE).write_bytes(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
        assert reopened(tmp_path) in [None, *told[:-1]], at


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_any_content_is_survived(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "garbage"
    directory.mkdir(exist_ok=True)
    frame = len(content).to_bytes(4, "little") + zlib.crc32(content).to_bytes(4, "little") + content
    for whole in (content, MAGIC + content, MAGIC + frame, MAGIC + frame * 2):
        (directory / FILE).write_bytes(whole)
        assert reopened(directory) is None


def test_a_whole_state_in_pieces_counts_only_when_all_are_there(tmp_path: Path) -> None:
    state = Account(
        7, "x", {("m", "t"): 1.5}, {str(number): Entry(number / 8) for number in range(2 * PIECE_ENTRIES + 1)}
    )
    one = journal(tmp_path)
    one.open()
    one.write(state)
    one.close()
    assert reopened(tmp_path) == state
    content = (tmp_path / FILE).read_bytes()
    for part in (0.1, 0.5, 0.9):
        (tmp_path / FILE).write_bytes(content[: int(len(content) * part)])
        assert reopened(tmp_path) is None


def test_after_a_crash_it_goes_on_from_there(tmp_path: Path) -> None:
    """The tail that was cut must not hide what is written after it."""
    one = journal(tmp_path)
    one.open()
    for state in history():
        one.write(state)
    one.close()
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[:-3])
    two = journal(tmp_path)
    assert two.open() == history()[-2]
    two.write(Account(clock=99))
    two.close()
    assert reopened(tmp_path) == Account(clock=99)


def test_another_boot_starts_anew(tmp_path: Path) -> None:
    one = journal(tmp_path)
    one.open()
    one.write(history()[1])
    one.close()
    assert reopened(tmp_path, boot="boot-2") is None
    assert reopened(tmp_path) == history()[1]
    assert reopened(tmp_path, boot="") is None


def test_the_boot_id_is_the_kernels() -> None:
    assert boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_the_size_is_bounded(tmp_path: Path) -> None:
    one = journal(tmp_path, limit_bytes=20_000)
    one.open()
    largest = 0
    for i in range(3000):
        one.write(Account(clock=i, running={f"r{n}": Entry(i + n / 8) for n in range(i % 50)}))
        largest = max(largest, sum(file.stat().st_size for file in tmp_path.iterdir()))
    one.close()
    assert largest <= 22_000
    assert reopened(tmp_path) == Account(clock=2999, running={f"r{n}": Entry(2999 + n / 8) for n in range(49)})


def test_a_state_larger_than_the_bound_is_kept_all_the_same(tmp_path: Path) -> None:
    one = journal(tmp_path, limit_bytes=1000)
    one.open()
    large = {f"r{n}": Entry(n / 8) for n in range(1000)}
    for i in range(50):
        one.write(Account(clock=i, running=large))
    one.close()
    assert reopened(tmp_path) == Account(clock=49, running=large)
    assert (tmp_path / FILE).stat().st_size < 2.1 * len(msgspec.msgpack.encode(Account(running=large)))


def test_two_daemons_do_not_share_a_directory(tmp_path: Path) -> None:
    one = journal(tmp_path)
    one.open()
    with pytest.raises(JournalError, match="another jouletrace keeps its account there"):
        journal(tmp_path).open()
    one.close()
    assert reopened(tmp_path) is None


def test_a_directory_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match=r"file/x.*set state_dir to a writable place"):
        journal(tmp_path / "file" / "x").open()


def test_a_full_disk_is_logged_once_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = journal(tmp_path)
    one.open()
    one.write(history()[1])
    real = os.write

    def full(file: int, content: bytes) -> int:
        real(file, bytes(content)[:5])
        raise OSError(28, "No space left on device")

    with capture_logs() as logs:
        monkeypatch.setattr(os, "write", full)
        one.write(history()[2])
        one.write(history()[3])
        assert reopened_copy(tmp_path) == history()[1]
        monkeypatch.setattr(os, "write", real)
        one.write(history()[4])
    one.close()
    assert [entry["log_level"] for entry in logs if "cannot" in entry["event"] or "again" in entry["event"]] == [
        "warning",
        "info",
    ]
    assert reopened(tmp_path) == history()[4]


def reopened_copy(directory: Path) -> Account | None:
    copy = directory / "copy"
    copy.mkdir()
    shutil.copy(directory / FILE, copy / FILE)
    return reopened(copy)


WRITER = """
import sys
from pathlib import Path
from jouletrace import logs
logs.configure("warning", "json")  # to standard error: standard output is read as numbers
from tests.unit.test_requests_journal import Account, Entry, journal
one = journal(Path(sys.argv[1]), limit_bytes=3000)
state = one.open() or Account()
print(state.clock, flush=True)
clock = state.clock
while True:
    clock += 1
    running = {str(n): Entry(clock) for n in range(clock % 9)}
    one.write(Account(clock, None, {("m", str(clock % 7)): clock / 2}, running))
    # What is printed is what a scrape would have seen.
    sys.stdout.write(f"{clock}\\n")
    sys.stdout.flush()
"""


def test_a_kill_at_any_moment_loses_nothing_that_was_shown(tmp_path: Path) -> None:
    shown = 0
    for attempt in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([".", *filter(None, sys.path)])},
        )
        assert writer.stdout is not None
        try:
            assert int(writer.stdout.readline()) >= shown
            for _ in range(50 + 37 * attempt):
                shown = int(writer.stdout.readline())
        finally:
            os.kill(writer.pid, signal.SIGKILL)
            rest = writer.stdout.read()
            writer.stdout.close()
            writer.wait(10)
        complete = rest[: rest.rfind(b"\n") + 1].split()
        shown = int(complete[-1]) if complete else shown
    kept = reopened(tmp_path)
    assert kept is not None
    assert kept.clock in (shown, shown + 1)
    assert kept.running == {str(n): Entry(kept.clock) for n in range(kept.clock % 9)}
