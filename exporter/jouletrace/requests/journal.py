"""The account on disk: what survives a kill -9 at any byte, bounded in size.

One file, `ledger.journal`: a magic word, then frames of `length, CRC32, payload` (two little-endian unsigned 32 bit
numbers, then MessagePack). The first frame is the header, which says how many hold the whole state; each later one is
what has changed since the one before. A frame counts when it is complete and its checksum fits; reading ends at the
first that is not.
A write() that has returned survives the end of the process without fsync; the fsync now and then is for the power cut.
Past its bound the file is written anew beside the old one and renamed over it.
"""

import fcntl
import os
import time
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from struct import Struct
from typing import Any, Final, Generic, TypeVar, get_args, get_origin

import msgspec
import structlog

FILE: Final = "ledger.journal"
MAGIC: Final = b"jouletrace ledger 1\n"
FSYNC_SECONDS: Final = 5.0
"""A power cut loses at most about this much; a killed process loses nothing."""
LIMIT_BYTES: Final = 16 << 20
PIECE_ENTRIES: Final = 1024
"""Entries of a dict in one frame of a whole state."""
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_FRAME: Final = Struct("<II")
_NEW: Final = ".new"
_LOCK: Final = ".lock"

_log = structlog.get_logger(__name__)

State = TypeVar("State", bound=msgspec.Struct)


class _Header(msgspec.Struct, frozen=True):
    boot_id: str
    frames: int = 1
    """In how many frames the whole state follows."""
    made_by: str = "jouletrace"


class _Change(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one field: a new whole, or entries of a dict, each key and value encoded by itself."""

    whole: list[msgspec.Raw] = []  # One at most: an optional Raw could not hold a null.
    put: list[tuple[msgspec.Raw, msgspec.Raw]] = []
    removed: list[msgspec.Raw] = []


class JournalError(Exception):
    """The journal cannot be kept; the message says why and what to do."""


def boot_id() -> str:
    """Return what the kernel calls this boot of the machine; empty where it does not say."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


class Journal(Generic[State]):
    """Keeps the newest state of one type.

    `State` is a struct; its fields that are dicts are written entry by entry as they change, all others as a whole.
    """

    def __init__(
        self, directory: Path, state: type[State], *, boot: str | None = None, limit_bytes: int = LIMIT_BYTES
    ) -> None:
        self._directory = directory
        self._path = directory / FILE
        self._type = state
        self._fields = {field.name: field.type for field in msgspec.structs.fields(state)}
        self._boot = boot_id() if boot is None else boot
        self._limit_bytes = limit_bytes
        self._lock: int | None = None
        self._file: int | None = None
        self._size = self._full_size = 0
        self._synced = time.monotonic()
        # What is on the disk: by field each entry itself where it is a struct, which cannot change and belongs to the
        # state's owner as well; else the hash of the entry's (or the whole field's) encoding.
        self._marks: dict[str, dict[Any, Any]] = {}
        self._warned = False

    def open(self) -> State | None:
        """Return the state to go on from, None when there is none of this boot; raises JournalError."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._path.with_suffix(_LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise JournalError(
                f"{self._path}: another jouletrace keeps its account there; give each its own state_dir"
            ) from None
        except OSError as failure:
            self.close()
            raise JournalError(
                f"{self._path}: cannot be written ({failure.strerror}); totals will start anew after a restart: "
                "set state_dir to a writable place"
            ) from None
        self._path.with_suffix(_NEW).unlink(missing_ok=True)
        return self._read()

    def write(self, state: State) -> None:
        """Append what changed since the last call; a failure is logged once, and mended by the next success."""
        try:
            changes = self._changes(state)
            payload = msgspec.msgpack.encode(changes)
            limit_bytes = max(self._limit_bytes, 2 * self._full_size)
            if self._file is None or self._size + _FRAME.size + len(payload) > limit_bytes:
                self._rotate(state)
            elif changes:
                self._append(payload)
        except OSError as failure:
            # Half a frame may be on the disk, and what follows it would never be read.
            self._forget_file()
            if not self._warned:
                _log.warning(
                    "the account cannot be saved; totals will go back to the last saved ones after a restart",
                    file=str(self._path),
                    error=failure.strerror,
                )
            self._warned = True
        else:
            if self._warned:
                _log.info("the account is saved again", file=str(self._path))
            self._warned = False

    def close(self) -> None:
        """Flush to the disk and let go of the file."""
        if self._file is not None:
            try:
                os.fsync(self._file)
            except OSError as failure:
                _log.warning("the account may not be on the disk", file=str(self._path), error=failure.strerror)
        self._forget_file()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _changes(self, state: State) -> dict[str, _Change]:
        """Return what is not on the disk yet, and take it for written."""
        encode = msgspec.msgpack.Encoder().encode
        found: dict[str, _Change] = {}
        for name, kind in self._fields.items():
            value = getattr(state, name)
            is_dict = get_origin(kind) is dict
            before, now = self._marks.get(name, {}), {}
            put: list[tuple[msgspec.Raw, msgspec.Raw]] = []
            whole: list[msgspec.Raw] = []
            for key, entry in value.items() if is_dict else ((None, value),):
                known = before.get(key)
                if known is entry:
                    now[key] = entry
                    continue
                encoded = encode(entry)
                now[key] = entry if isinstance(entry, msgspec.Struct) else hash(encoded)
                if known == now[key]:
                    continue
                if is_dict:
                    put.append((msgspec.Raw(encode(key)), msgspec.Raw(encoded)))
                else:
                    whole.append(msgspec.Raw(encoded))
            removed = [msgspec.Raw(encode(key)) for key in before if key not in now]
            if whole or put or removed:
                found[name] = _Change(whole, put, removed)
            self._marks[name] = now
        return found

    def _forget_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, payload: bytes) -> None:
        assert self._file is not None
        self._size += _write_frame(self._file, payload)
        now = time.monotonic()
        if now - self._synced >= FSYNC_SECONDS:
            os.fsync(self._file)
            self._synced = now

    def _rotate(self, state: State) -> None:
        """Replace the file by one that holds this state alone."""
        new = self._path.with_suffix(_NEW)
        file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            size = _write_all(file, MAGIC)
            pieces = self._pieces(state)
            size += _write_frame(file, msgspec.msgpack.encode(_Header(self._boot, len(pieces))))
            size += sum(_write_frame(file, msgspec.msgpack.encode(piece)) for piece in pieces)
            os.fsync(file)
            new.replace(self._path)
        except OSError:
            os.close(file)
            raise
        self._forget_file()
        self._file, self._size, self._full_size = file, size, size
        self._synced = time.monotonic()
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _pieces(self, state: State) -> list[State | dict[str, _Change]]:
        """Return a state in parts that are each encoded in a millisecond or two: nothing else runs meanwhile."""
        dicts = {name: getattr(state, name) for name, kind in self._fields.items() if get_origin(kind) is dict}
        pieces: list[State | dict[str, _Change]] = [msgspec.structs.replace(state, **{name: {} for name in dicts})]
        encode = msgspec.msgpack.Encoder().encode
        for name, entries in dicts.items():
            rest = iter(entries.items())
            while chunk := list(islice(rest, PIECE_ENTRIES)):
                put = [(msgspec.Raw(encode(key)), msgspec.Raw(encode(entry))) for key, entry in chunk]
                pieces.append({name: _Change(put=put)})
        return pieces

    def _read(self) -> State | None:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as failure:
            _log.warning("the account cannot be read, totals start anew", file=str(self._path), error=failure.strerror)
            return None
        frames = _Frames(content)
        try:
            header = msgspec.msgpack.decode(next(frames), type=_Header)
            if header.boot_id != self._boot or not self._boot:
                _log.info("the machine was booted since the account was saved; totals start anew")
                return None
            state = msgspec.msgpack.decode(next(frames), type=self._type)
            values = {name: getattr(state, name) for name in self._fields}
            for _ in range(header.frames - 1):
                self._apply(values, next(frames))
        except (StopIteration, msgspec.MsgspecError, UnicodeDecodeError):
            _log.warning("the account makes no sense, totals start anew", file=str(self._path), bytes=len(content))
            return None
        for payload in frames:
            try:
                self._apply(values, payload)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                frames.broken = True
                break
        if frames.broken:
            _log.warning("the account's last entry is incomplete and was left out", file=str(self._path))
        return self._type(**values)

    def _apply(self, values: dict[str, Any], payload: bytes) -> None:
        changes = msgspec.msgpack.decode(payload, type=dict[str, _Change])
        # All of a frame or nothing: what does not fit is found before anything is changed.
        ready: dict[str, Any] = {}
        for name, change in changes.items():
            kind = self._fields.get(name)
            if kind is None:
                continue
            if change.whole:
                ready[name] = msgspec.msgpack.decode(change.whole[0], type=kind)
                continue
            key_type, value_type = get_args(kind)
            entries = dict(values[name])
            for key in change.removed:
                entries.pop(msgspec.msgpack.decode(key, type=key_type), None)
            for key, value in change.put:
                entries[msgspec.msgpack.decode(key, type=key_type)] = msgspec.msgpack.decode(value, type=value_type)
            ready[name] = entries
        values.update(ready)


def _write_frame(file: int, payload: bytes) -> int:
    """Write a frame; return its size."""
    return _write_all(file, _FRAME.pack(len(payload), zlib.crc32(payload))) + _write_all(file, payload)


def _write_all(file: int, content: bytes) -> int:
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]
    return len(content)


class _Frames(Iterator[bytes]):
    """The frames of a file up to the first that is cut short or damaged; `broken` says that there was one."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = len(MAGIC) if content.startswith(MAGIC) else len(content)
        self.broken = False

    def __next__(self) -> bytes:
        if self._at == len(self._content):
            raise StopIteration
        start = self._at + _FRAME.size
        if start <= len(self._content):
            length, checksum = _FRAME.unpack_from(self._content, self._at)
            payload = self._content[start : start + length]
            if len(payload) == length and zlib.crc32(payload) == checksum:
                self._at = start + length
                return payload
        self.broken = True
        raise StopIteration
