"""Trace format 1: a gzip JSON file of one GPU's readings and of what ran on it.

`{"meta": {...}, "streams": {name: {"cols": ["t_ns", ...], "rows": [[...], ...]}}, "events": [...]}`.
Every time is epoch nanoseconds; `null` stands for a value that the driver refused. `docs/recordings.md` lists
the streams.
"""

import contextlib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from jouletrace.gpu.readings import DeviceInfo, Float64s, Int64s, Link, Pipe, ThrottleReason

FORMAT = 1
"""The format version that this module reads and writes (`meta.format`; files without one are version 1)."""

MAX_BYTES = 512 * 2**20
"""Largest accepted size of a file, packed and unpacked: over a day (270 s of an H200 unpack to 2 MB).
It keeps a broken or hostile file from taking the machine's memory."""

POWER_RING = "power_ring_20ms"
POWER_INSTANT = "power_instant"
POWER_AVERAGE = "power_average"
MEMORY_POWER_AVERAGE = "memory_power_average"
ENERGY_COUNTER = "energy_counter"
GPM = "gpm_100ms"
STATE = "state_100ms"
VIOLATION = "violation_1s"
PROCESSES = "processes"

REQUIRED_COLUMNS: Mapping[str, tuple[str, ...]] = {
    POWER_RING: ("mw",),
    POWER_INSTANT: ("mw",),
    POWER_AVERAGE: ("mw",),
    MEMORY_POWER_AVERAGE: ("mw",),
    ENERGY_COUNTER: ("mj",),
    PROCESSES: ("pid",),
}
"""Columns without which a stream means nothing; all other columns may be missing."""

DRAM_COLUMN = "dram_bw_util"
"""Percent of the theoretical DRAM peak, in `gpm_100ms`."""
PIPE_COLUMNS: Mapping[Pipe, str] = {
    Pipe.GRAPHICS: "graphics_util",
    Pipe.SM: "sm_util",
    Pipe.SM_OCCUPANCY: "sm_occupancy",
    Pipe.INTEGER: "integer_util",
    Pipe.TENSOR: "any_tensor_util",
    Pipe.FP64: "fp64_util",
    Pipe.FP32: "fp32_util",
    Pipe.FP16: "fp16_util",
}
"""Percent, in `gpm_100ms`."""
LINK_COLUMNS: Mapping[Link, str] = {
    Link.PCIE_TRANSMIT: "pcie_tx_mib_s",
    Link.PCIE_RECEIVE: "pcie_rx_mib_s",
    Link.NVLINK_RECEIVE: "nvlink_rx_mib_s",
    Link.NVLINK_TRANSMIT: "nvlink_tx_mib_s",
}
"""MiB/s, in `gpm_100ms`."""
CLOCK_COLUMNS: Mapping[str, str] = {"sm": "sm_mhz", "memory": "mem_mhz"}
TEMPERATURE_COLUMNS: Mapping[str, str] = {"gpu": "temp_c", "memory": "mem_temp_c"}
UTILIZATION_COLUMNS: Mapping[str, str] = {"gpu": "util_gpu_pct", "memory": "util_mem_pct"}
"""These three by the keys of `StateReading`, in `state_100ms`."""
THROTTLE_COLUMNS: Mapping[ThrottleReason, str] = {
    ThrottleReason.SW_POWER_CAP: "power_ns",
    ThrottleReason.THERMAL: "thermal_ns",
    ThrottleReason.SYNC_BOOST: "sync_boost_ns",
    ThrottleReason.BOARD_LIMIT: "board_limit_ns",
    ThrottleReason.RELIABILITY: "reliability_ns",
    ThrottleReason.SW_THERMAL: "sw_thermal_ns",
    ThrottleReason.HW_THERMAL: "hw_thermal_ns",
    ThrottleReason.HW_POWER_BRAKE: "hw_power_brake_ns",
}
"""Cumulative nanoseconds, in `violation_1s`."""

_TEXT_META = ("gpu", "uuid", "driver", "architecture")
_NUMBER_META = (
    "enforced_limit_mw",
    "default_limit_mw",
    "max_mem_mhz",
    "max_sm_mhz",
    "mem_bus_bits",
    "fb_total_mib",
    "peak_dram_bytes_per_second",
)
_ROWS_PER_WRITE = 4096
"""Rows turned into text at a time: a few hundred kB, and other threads get the interpreter in between."""
_EXACT_FLOAT = 2.0**53
"""Whole numbers below this are exact as float64."""


class RecordingError(Exception):
    """A recording cannot be read or written; the message names the file, the place and what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """One stream of readings."""

    t_ns: Int64s
    """Times of the rows, epoch nanoseconds, shape (n,); increasing (`processes`: not decreasing)."""
    values: Mapping[str, Float64s]
    """The other columns by name, shape (n,); NaN where there was no value."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.t_ns)


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A recording in memory."""

    meta: Mapping[str, Any]
    """What is known of the GPU; see `device_info`."""
    streams: Mapping[str, Stream]
    events: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """What ran, sorted by `t_ns`; every event has a `kind`."""
    name: str = ""
    """The file's name, for messages."""


def device_info(recording: Recording) -> DeviceInfo:
    """Return the recorded GPU as a device; files without a UUID get a stable one that begins with REPLAY-."""
    meta = recording.meta

    def number(key: str, factor: float = 1.0) -> float | None:
        value = meta.get(key)
        return None if value is None else float(value) * factor

    peak = number("peak_dram_bytes_per_second")
    clock_hertz, bus_bits = number("max_mem_mhz", 1e6), number("mem_bus_bits")
    if peak is None and clock_hertz is not None and bus_bits is not None:
        peak = 2 * clock_hertz * bus_bits / 8
    memory_bytes = number("fb_total_mib", 2.0**20)
    digest = hashlib.sha256(json.dumps([meta, recording.name], sort_keys=True).encode()).hexdigest()
    return DeviceInfo(
        uuid=meta.get("uuid") or f"REPLAY-{digest[:16]}",
        gpu=0,
        name=meta.get("gpu") or "unnamed GPU",
        driver_version=meta.get("driver") or "",
        architecture=meta.get("architecture") or "",
        memory_total_bytes=None if memory_bytes is None else int(memory_bytes),
        peak_dram_bytes_per_second=peak,
        max_sm_clock_hertz=number("max_sm_mhz", 1e6),
        power_limit_watts=number("enforced_limit_mw", 1e-3),
        default_power_limit_watts=number("default_limit_mw", 1e-3),
    )


def read(path: str | os.PathLike[str], streams: Collection[str] | None = None) -> Recording:
    """Read a recording; with `streams`, keep only the streams of these names and no events.

    Raises RecordingError with one sentence for every file that is not a whole, sound recording.
    """
    file = Path(path)
    text = _unpack(file, _read_bytes(file))
    try:
        # parse_constant: Python's own writers put NaN where a number is missing, which JSON does not know.
        document = json.loads(text, parse_constant=lambda _: None, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        _refuse(file, f"is not JSON inside ({error})", "it is no recording, or a damaged one: take another copy")
    del text
    if not isinstance(document, dict):
        _refuse(file, "holds no JSON object", "give a file that `jouletrace record` wrote")
    meta = _checked_meta(file, document.get("meta"))
    tables = document.get("streams")
    if not isinstance(tables, dict):
        _refuse(file, "has no `streams` object", "give a file that `jouletrace record` wrote")
    found = {name: _checked_stream(file, name, table) for name, table in tables.items()}
    if not any(len(stream) for stream in found.values()):
        _refuse(file, "holds no readings", "record it again")
    events = _checked_events(file, document.get("events"))
    if streams is not None:
        return Recording(meta, {name: found[name] for name in found if name in streams}, name=file.name)
    return Recording(meta, found, events, name=file.name)


def write(path: str | os.PathLike[str], recording: Recording) -> None:
    """Write a recording whole or not at all; equal recordings give equal bytes.

    Raises RecordingError, and leaves a file that was there before as it was, when the disk refuses.
    """
    file = Path(path)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as raw:
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6) as packed:
                for piece in _pieces(recording):
                    packed.write(piece.encode())
            raw.flush()
            os.fsync(raw.fileno())
        unfinished.replace(file)
        _sync_directory(file.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise RecordingError(
            f"{file}: the recording could not be written ({error.strerror or error}); "
            "give a file in a folder that exists, may be written to and has space left"
        ) from error


def _refuse(file: Path, problem: str, mend: str) -> NoReturn:
    raise RecordingError(f"{file}: {problem}; {mend}")


def _read_bytes(file: Path) -> bytes:
    try:
        if file.is_dir():
            _refuse(file, "is a directory", "give the file of a recording")
        if not file.exists():
            _refuse(file, "there is no such file", "check the path")
        if not file.is_file():
            _refuse(file, "is not a regular file", "give the file of a recording")
        if file.stat().st_size > MAX_BYTES:
            _refuse(file, f"is larger than {MAX_BYTES >> 20} MiB", "record a shorter time")
        return file.read_bytes()
    except OSError as error:
        _refuse(file, f"cannot be read ({error.strerror or error})", "check the file's owner and permissions")


def _unpack(file: Path, packed: bytes) -> bytes:
    if not packed:
        _refuse(file, "is empty", "record it again or take another copy")
    if packed[:2] != b"\x1f\x8b":
        _refuse(file, "is not gzip", "give a recording as `jouletrace record` writes it (.json.gz)")
    unpacker = zlib.decompressobj(wbits=31)  # 31: gzip header and checksum, 32 kB window (zlib.h)
    try:
        text = unpacker.decompress(packed, MAX_BYTES + 1)
    except zlib.error as error:
        _refuse(file, f"is damaged ({error})", "take another copy")
    if len(text) > MAX_BYTES:
        _refuse(file, f"unpacks to more than {MAX_BYTES >> 20} MiB", "record a shorter time")
    if not unpacker.eof:
        _refuse(file, "is cut off: the gzip data ends too early", "take another copy or record it again")
    if unpacker.unused_data:
        _refuse(file, f"has {len(unpacker.unused_data)} bytes after its end", "take another copy")
    return text


@dataclass(frozen=True, slots=True)
class _Unusable:
    """A stream that could not be taken in, and why."""

    problem: str


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """Turn each stream into arrays as soon as it is parsed, so that only one is in memory as Python lists."""
    if len(pairs) == 2 and {pairs[0][0], pairs[1][0]} == {"cols", "rows"}:
        table = dict(pairs)
        return _stream(table["cols"], table["rows"])
    return dict(pairs)


def _stream(cols: Any, rows: Any) -> Stream | _Unusable:
    if not isinstance(cols, list) or not all(isinstance(name, str) for name in cols):
        return _Unusable("`cols` is not a list of names")
    if cols[:1] != ["t_ns"] or len(set(cols)) != len(cols):
        return _Unusable("`cols` must begin with `t_ns` and name each column once")
    if not isinstance(rows, list):
        return _Unusable("`rows` is not a list")
    for number, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(cols):
            return _Unusable(f"row {number} does not hold {len(cols)} cells")
    columns = list(zip(*rows, strict=True)) or [()] * len(cols)
    times, *cells = columns
    if not set(map(type, times)) <= {int}:
        number = next(i for i, t in enumerate(times) if type(t) is not int)
        return _Unusable(f"row {number} has a time that is not a whole number of nanoseconds")
    try:
        t_ns = np.array(times, np.int64)
    except OverflowError:
        return _Unusable("a time is out of range")
    if len(t_ns) and int(t_ns.min()) < 0:
        return _Unusable(f"row {int(np.argmax(t_ns < 0))} has a negative time")
    values = {}
    for name, column in zip(cols[1:], cells, strict=True):
        if not set(map(type, column)) <= {int, float, type(None)}:
            number = next(i for i, v in enumerate(column) if type(v) not in (int, float, type(None)))
            return _Unusable(f"row {number}, column {name} is not a number")
        try:
            array = np.array(column, np.float64)
        except OverflowError:
            return _Unusable(f"column {name} holds a number that is out of range")
        array[~np.isfinite(array)] = np.nan
        array.flags.writeable = False
        values[name] = array
    t_ns.flags.writeable = False
    return Stream(t_ns, values)


def _checked_stream(file: Path, name: str, table: Any) -> Stream:
    mend = "record it again or take another copy"
    if isinstance(table, _Unusable):
        _refuse(file, f"stream {name}: {table.problem}", mend)
    if not isinstance(table, Stream):
        _refuse(file, f"stream {name} is not an object of `cols` and `rows`", mend)
    for column in REQUIRED_COLUMNS.get(name, ()):
        if column not in table.values:
            _refuse(file, f"stream {name} has no column {column}", mend)
    steps = np.diff(table.t_ns)
    # One row per process: all rows of a look at the process list share its time.
    backward = steps < 0 if name == PROCESSES else steps <= 0
    if backward.any():
        number = int(np.argmax(backward)) + 1
        _refuse(file, f"stream {name}: the time of row {number} is not later than the one before", mend)
    return table


def _checked_meta(file: Path, meta: Any) -> dict[str, Any]:
    if not isinstance(meta, dict):
        _refuse(file, "has no `meta` object", "give a file that `jouletrace record` wrote")
    version = meta.get("format", FORMAT)
    if version != FORMAT or isinstance(version, bool):
        _refuse(
            file,
            f"has trace format {version!r} and this jouletrace reads format {FORMAT}",
            "use the jouletrace that wrote it or record it again",
        )
    for key in _TEXT_META:
        if not isinstance(meta.get(key), str | None):
            _refuse(file, f"meta.{key} is not a text", "correct it or record it again")
    for key in _NUMBER_META:
        value = meta.get(key)
        if value is None:
            continue
        if type(value) not in (int, float) or not 0 < value < _EXACT_FLOAT:
            _refuse(file, f"meta.{key} is not a positive number", "correct it or record it again")
    return meta


def _checked_events(file: Path, events: Any) -> tuple[dict[str, Any], ...]:
    mend = "correct it or record it again"
    if not isinstance(events, list):
        _refuse(file, "has no `events` list", "give a file that `jouletrace record` wrote (it may be empty)")
    for number, event in enumerate(events):
        if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
            _refuse(file, f"event {number} is not an object with a `kind`", mend)
        if type(event.get("t_ns")) is not int or not 0 <= event["t_ns"] < 2**63:
            _refuse(file, f"event {number} ({event['kind']}) has no `t_ns` in epoch nanoseconds", mend)
        if event["kind"] in ("phase_start", "phase_end") and not isinstance(event.get("phase"), str):
            _refuse(file, f"event {number} ({event['kind']}) has no `phase` name", mend)
    return tuple(sorted(events, key=lambda event: int(event["t_ns"])))


def _pieces(recording: Recording) -> Iterator[str]:
    """Yield the JSON text in pieces of bounded size."""
    meta = {"format": FORMAT, **recording.meta}
    yield f'{{"meta": {json.dumps(meta, allow_nan=False)},\n"streams": {{'
    for number, (name, stream) in enumerate(recording.streams.items()):
        head = json.dumps({"cols": ["t_ns", *stream.values]})
        yield f'{"," if number else ""}\n{json.dumps(name)}: {head[:-1]}, "rows": ['
        for at in range(0, len(stream), _ROWS_PER_WRITE):
            part = slice(at, at + _ROWS_PER_WRITE)
            cells = [stream.t_ns[part].tolist(), *(_cells(column[part]) for column in stream.values.values())]
            rows = list(zip(*cells, strict=True))
            yield (",\n" if at else "\n") + json.dumps(rows, separators=(",", ":"))[1:-1]
        yield "]}"
    yield '},\n"events": ['
    for number, event in enumerate(recording.events):
        yield (",\n" if number else "\n") + json.dumps(event)
    yield "]}\n"


def _cells(column: NDArray[np.float64]) -> Sequence[int | float | None]:
    """Return a column as JSON values: whole numbers as such, missing ones as null."""
    if np.all(column == np.rint(column)) and np.all(np.abs(column) < _EXACT_FLOAT):
        whole: list[int] = column.astype(np.int64).tolist()
        return whole
    return [
        None if not np.isfinite(value) else int(value) if value.is_integer() else value for value in column.tolist()
    ]


def _sync_directory(directory: Path) -> None:
    """Make the rename last through a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
