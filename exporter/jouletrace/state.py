"""The state directory: small files that outlive the process, replaced as a whole and safe against a kill."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import structlog

from jouletrace.energy import baseline
from jouletrace.energy.baseline import IdleKind, IdleLevel

IDLE_FILE = "idle-levels.json"
_log = structlog.get_logger(__name__)


class StateDirectory:
    """Keeps what was learnt. Without a writable directory the daemon works on and forgets at its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._warned = False

    def load_idle_levels(self) -> dict[str, dict[IdleKind, IdleLevel]]:
        """Return the learnt idle levels by device UUID; empty, with a line in the log, when they cannot be read.

        A file that makes no sense is put aside, so that saving does not destroy what could still be mended.
        """
        file = self._path / IDLE_FILE
        try:
            return baseline.decode(file.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as failure:
            _log.warning("idle levels cannot be read, they are learnt anew", file=str(file), error=failure.strerror)
        except ValueError as failure:
            aside = file.with_suffix(".unreadable")
            _log.warning(
                "idle levels make no sense, they are learnt anew",
                file=str(file),
                error=str(failure),
                kept_as=str(aside),
            )
            try:
                file.replace(aside)
            except OSError:
                _log.warning("the unreadable file could not be put aside", file=str(file))
        return {}

    def save_idle_levels(self, levels: Mapping[str, Mapping[IdleKind, IdleLevel]]) -> None:
        """Write the learnt idle levels; a failure is logged once."""
        if not levels:
            return
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            replace(self._path / IDLE_FILE, baseline.encode(levels))
        except OSError as failure:
            if not self._warned:
                _log.warning(
                    "idle levels cannot be saved, a restart will learn them anew: set state_dir to a writable place",
                    directory=str(self._path),
                    error=failure.strerror,
                )
            self._warned = True
        else:
            self._warned = False


def replace(file: Path, content: bytes) -> None:
    """Replace a file so that at any moment either the old or the new content is there; raises OSError."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
