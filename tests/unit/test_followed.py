import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from jouletrace.config import ConfigError
from jouletrace.followed import FollowedFiles, Note, reloads


def number_in(file: Path, heard: Callable[[int], None] = lambda _: None) -> FollowedFiles[int]:
    def read(note: Note) -> int:
        note(file)
        try:
            return int(file.read_text())
        except ValueError:
            raise ConfigError(f"some.key: {file} holds no number") from None
        except OSError:
            raise ConfigError(f"some.key: {file} is not there") from None

    return FollowedFiles("some.key", read, on_change=heard)


async def test_what_changed_is_read_and_a_wrong_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "number"
    file.write_text("1")
    heard: list[int] = []
    followed = number_in(file, heard.append)
    with capture_logs() as logs:
        await followed.look()
        assert (followed.value, heard, logs) == (1, [], [])
        for wrong in ("on", "one"):  # half-written, then whole and still wrong
            file.write_text(wrong)
            await followed.look()
            await followed.look()
        assert (followed.value, followed.is_current, heard) == (1, False, [])
        file.unlink()
        await followed.look()
        assert len(logs) == 2, "another thing is wrong with it"
        await followed.look()
        assert len(logs) == 2
        await followed.reload()
        assert len(logs) == 3, "who asks for it is told"
        file.write_text("22")
        await followed.look()
    assert (followed.value, followed.is_current, heard) == (22, True, [22])
    refused = "some.key was not reloaded, the old one stays"
    assert [log["event"] for log in logs] == [*[refused] * 3, "some.key was reloaded"]
    assert ["holds no number" in log["problem"] for log in logs[:-1]] == [True, False, False]


async def test_a_link_that_points_elsewhere_is_a_change(tmp_path: Path) -> None:
    """As Kubernetes updates a Secret's volume: `..data` is a link to a folder, and is moved over."""
    for version in ("1", "2"):
        (tmp_path / f"..v{version}").mkdir()
        (tmp_path / f"..v{version}" / "number").write_text(version)
    (tmp_path / "..data").symlink_to("..v1")
    (tmp_path / "number").symlink_to("..data/number")
    followed = number_in(tmp_path / "number")
    (tmp_path / "..data_tmp").symlink_to("..v2")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    await followed.look()
    assert followed.value == 2


async def test_what_changes_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "number"
    file.write_text("1")

    def read(note: Note) -> str:
        note(file)
        content = file.read_text()
        if content == "1":
            file.write_text("33")
        return content

    followed = FollowedFiles("some.key", read)
    assert followed.value == "1"
    await followed.look()
    assert followed.value == "33"


async def test_a_failure_that_no_stat_shows_is_tried_again(tmp_path: Path) -> None:
    """A file that is given to the daemon's user, or relabelled, only after it was written; or want of descriptors."""
    file = tmp_path / "number"
    file.write_text("1")
    is_allowed = True

    def read(note: Note) -> str:
        note(file)
        if not is_allowed:
            raise ConfigError(f"some.key: {file} cannot be read")
        return file.read_text()

    followed = FollowedFiles("some.key", read)
    file.write_text("22")
    is_allowed = False
    await followed.look()
    assert (followed.value, followed.is_current) == ("1", False)
    is_allowed = True
    await followed.look()
    assert (followed.value, followed.is_current) == ("22", True)


async def test_a_fault_in_reading_changes_nothing_and_ends_nothing(tmp_path: Path) -> None:
    file = tmp_path / "number"
    file.write_text("1")

    def read(note: Note) -> int:
        note(file)
        return 100 // int(file.read_text())

    followed = FollowedFiles("some.key", read)
    with capture_logs() as logs:
        file.write_text("00")
        await followed.look()
        assert (followed.value, followed.is_current) == (100, False)
        file.write_text("5")
        await followed.look()
    assert (followed.value, followed.is_current) == (20, True)
    assert "please report this" in logs[0]["problem"]
    assert logs[0]["exc_info"]


async def test_it_runs_until_cancelled(tmp_path: Path) -> None:
    file = tmp_path / "number"
    file.write_text("1")
    changed = asyncio.Event()
    followed = FollowedFiles(
        "some.key",
        lambda note: (note(file), file.read_text())[1],
        on_change=lambda _: changed.set(),
        poll_seconds=0.01,
    )
    running = asyncio.create_task(followed.run())
    file.write_text("22")
    await asyncio.wait_for(changed.wait(), 5)
    running.cancel()
    await asyncio.wait({running})
    assert followed.value == "22"


def test_a_wrong_file_at_the_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"some\.key"):
        number_in(tmp_path / "none")


async def test_a_key_is_current_when_all_its_files_are(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_text("1")
    followed = [number_in(file) for file in files]
    assert reloads(followed) == {"some.key": True}
    files[0].write_text("")
    await followed[0].look()
    assert reloads(followed) == reloads(followed[::-1]) == {"some.key": False}
