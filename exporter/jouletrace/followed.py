"""Files that are read again when they change; while they are wrong, what they said before stays in force.

Rotation writes a new file, or points a link elsewhere, as Kubernetes does with a Secret's volume. Either shows in what
`stat` says of the name.
"""

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import structlog

from jouletrace.config import ConfigError

POLL_SECONDS: Final = 2.0
"""How often the files are looked at; a `stat` of four files takes 10 us."""

_log = structlog.get_logger(__name__)

T = TypeVar("T")
Note = Callable[[Path], None]
"""Is told of each file right before it is read: what changes meanwhile is seen the next time."""


class FollowedFiles(Generic[T]):
    """What files say, kept current while the daemon runs. For the event loop; files are read in a thread."""

    def __init__(
        self,
        key: str,
        read: Callable[[Note], T],
        *,
        on_change: Callable[[T], None] = lambda _: None,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """Read them; raises ConfigError. `key` is the configuration's, for people.

        `read` returns what the files say or raises ConfigError; `on_change` hears of what they say later.
        """
        self.key = key
        self._read = read
        self._on_change = on_change
        self._poll_seconds = poll_seconds
        self._noted: dict[Path, tuple[int, ...]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._told = ""
        """What is wrong with them, as the log has it."""
        self.is_current = True
        """Whether `value` is what the files say now; False while they are wrong."""
        self.value = self._read_and_note()

    async def run(self) -> None:
        """Apply changes until cancelled."""
        while True:
            await asyncio.sleep(self._poll_seconds)
            await self.look()

    async def look(self) -> None:
        """Read the files again if they have changed, or cannot be used.

        What is in the way does not always show in what `stat` says: a file's owner, its label, want of descriptors.
        """
        if not self.is_current or await asyncio.to_thread(self._have_changed):
            await self._read_again()

    async def reload(self) -> None:
        """Read the files again, and tell once more what is wrong with them."""
        self._told = ""
        await self._read_again()

    async def _read_again(self) -> None:
        """Take over what the files say; while they are wrong, what they said stays, with a line in the log."""
        async with self._one_at_a_time:
            try:
                value = await asyncio.to_thread(self._read_and_note)
            except ConfigError as failure:
                self._refuse(str(failure))
                return
            except Exception as fault:
                # A file that is written while the daemon runs must not end it.
                self._refuse(f"{fault!r}; please report this", exc_info=True)
                return
            self.is_current, self._told = True, ""
            self.value = value
            self._on_change(value)
            _log.info(f"{self.key} was reloaded")

    def _refuse(self, problem: str, **fields: bool) -> None:
        self.is_current = False
        if problem != self._told:
            self._told = problem
            _log.warning(f"{self.key} was not reloaded, the old one stays", problem=problem, **fields)

    def _read_and_note(self) -> T:
        noted: dict[Path, tuple[int, ...]] = {}
        try:
            return self._read(lambda file: noted.update({file: _state(file)}))
        finally:
            self._noted = noted

    def _have_changed(self) -> bool:
        return any(_state(file) != state for file, state in self._noted.items())


def reloads(followed: Iterable[FollowedFiles[Any]]) -> dict[str, bool]:
    """Return by key whether all its files say what is in force; may be called from any thread."""
    current: dict[str, bool] = {}
    for files in followed:
        current[files.key] = files.is_current and current.get(files.key, True)
    return current


def _state(file: Path) -> tuple[int, ...]:
    try:
        stat = file.stat()
    except OSError as error:
        return (error.errno or 0,)
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_mode)
