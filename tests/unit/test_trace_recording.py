import errno
import gzip
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from jouletrace.trace import recording as trace
from jouletrace.trace.recording import Recording, RecordingError, Stream, device_info, read, write

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "exporter/jouletrace/demo/recording.json.gz"
CHUNKED = REPOSITORY / "tests/data/h200-c-chunked.json.gz"

SOUND = {
    "meta": {"format": 1, "gpu": "NVIDIA H200", "enforced_limit_mw": 700000},
    "streams": {
        "power_ring_20ms": {"cols": ["t_ns", "mw"], "rows": [[20, 100000], [40, 101000]]},
        "gpm_100ms": {"cols": ["t_ns", "sm_util", "dram_bw_util"], "rows": [[30, 1.5, None], [130, 2, 0.25]]},
    },
    "events": [{"t_ns": 35, "kind": "phase_end", "phase": "a"}, {"t_ns": 25, "kind": "phase_start", "phase": "a"}],
}


def pack(folder: Path, document: object) -> Path:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    path = folder / "x.json.gz"
    path.write_bytes(gzip.compress(text))
    return path


def altered(**changes: object) -> dict:
    return {**SOUND, **changes}


def with_rows(rows: object, cols: object = ("t_ns", "mw")) -> dict:
    cols = list(cols) if isinstance(cols, tuple) else cols
    return altered(streams={"power_ring_20ms": {"cols": cols, "rows": rows}})


def test_reads_the_demo_recording() -> None:
    started = time.perf_counter()
    demo = read(DEMO)
    assert time.perf_counter() - started < 1.0
    ring = demo.streams["power_ring_20ms"]
    assert len(ring) == 13_542
    assert ring.t_ns.dtype == np.int64
    assert int(ring.t_ns[0]) == 1_795_372_950_039_044_000
    assert ring.values["mw"][0] == 158_465
    assert len(demo.events) == 5_226
    assert np.isnan(demo.streams["gpm_100ms"].values["dram_bw_util"]).sum() == 12
    assert demo.streams["gpm_100ms"].values["sm_util"].sum() > 0


def test_keeps_only_the_wanted_streams() -> None:
    part = read(DEMO, {"energy_counter", "no_such_stream"})
    assert list(part.streams) == ["energy_counter"]
    assert part.events == ()


def test_events_come_sorted(tmp_path: Path) -> None:
    assert [event["t_ns"] for event in read(pack(tmp_path, SOUND)).events] == [25, 35]


def test_null_and_nan_are_missing_values(tmp_path: Path) -> None:
    text = json.dumps(SOUND).replace("0.25", "NaN").encode()
    values = read(pack(tmp_path, text)).streams["gpm_100ms"].values
    assert np.isnan(values["dram_bw_util"]).all()
    assert values["sm_util"].tolist() == [1.5, 2.0]


@pytest.mark.parametrize("path", [DEMO, CHUNKED])
def test_what_is_written_is_read_again(path: Path, tmp_path: Path) -> None:
    first = read(path)
    write(tmp_path / "a.json.gz", first)
    write(tmp_path / "b.json.gz", first)
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    second = read(tmp_path / "a.json.gz")
    assert second.meta == {"format": 1, **first.meta}
    assert second.events == first.events
    for name, stream in first.streams.items():
        assert second.streams[name].t_ns.tolist() == stream.t_ns.tolist()
        for column, values in stream.values.items():
            np.testing.assert_array_equal(second.streams[name].values[column], values)


def test_written_json_is_strict(tmp_path: Path) -> None:
    stream = Stream(np.array([1, 2]), {"mw": np.array([np.nan, 3.0]), "mj": np.array([0.5, np.inf])})
    write(tmp_path / "x.json.gz", Recording({}, {"power_instant": stream}))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(gzip.decompress((tmp_path / "x.json.gz").read_bytes()), parse_constant=refuse)
    assert document["streams"]["power_instant"]["rows"] == [[1, None, 0.5], [2, 3, None]]


def test_device_info_is_in_base_units() -> None:
    info = device_info(read(DEMO, ()))
    assert info.name == "NVIDIA H200"
    assert info.driver_version == "580.159.04"
    assert info.power_limit_watts == 700
    assert info.memory_total_bytes == 143_771 * 2**20
    assert info.max_sm_clock_hertz == 1.98e9
    assert info.peak_dram_bytes_per_second == pytest.approx(4.814e12, rel=1e-3)
    assert info.uuid.startswith("REPLAY-")
    assert info.uuid == device_info(read(DEMO)).uuid
    assert info.uuid != device_info(read(CHUNKED, ())).uuid


BAD_DOCUMENTS = {
    "not_json": (b"{", "not JSON inside"),
    "not_utf8": (b"\xff\xfe\x00", "not JSON inside"),
    "deep": (b"[" * 200_000, "not JSON inside"),
    "a_list": ([], "no JSON object"),
    "no_meta": ({"streams": {}, "events": []}, "no `meta`"),
    "later_format": (altered(meta={"format": 2}), "trace format 2"),
    "odd_format": (altered(meta={"format": True}), "trace format True"),
    "text_limit": (altered(meta={"enforced_limit_mw": "700"}), "meta.enforced_limit_mw"),
    "zero_limit": (altered(meta={"enforced_limit_mw": 0}), "meta.enforced_limit_mw"),
    "number_name": (altered(meta={"gpu": 200}), "meta.gpu"),
    "no_streams": ({"meta": {}, "events": []}, "no `streams`"),
    "stream_list": (altered(streams={"power_ring_20ms": []}), "stream power_ring_20ms"),
    "no_readings": (with_rows([]), "no readings"),
    "no_cols": (with_rows([[1, 2]], None), "`cols`"),
    "time_not_first": (with_rows([[1, 2]], ("mw", "t_ns")), "`cols` must begin"),
    "no_power_column": (with_rows([[1, 2]], ("t_ns", "watts")), "no column mw"),
    "rows_no_list": (with_rows({"a": 1}), "`rows`"),
    "narrow_row": (with_rows([[1, 2], [2]]), "row 1 does not hold 2 cells"),
    "row_no_list": (with_rows([[1, 2], 7]), "row 1 does not hold 2 cells"),
    "text_cell": (with_rows([[1, 2], [2, "x"]]), "row 1, column mw is not a number"),
    "bool_cell": (with_rows([[1, True]]), "row 0, column mw is not a number"),
    "huge_cell": (with_rows([[1, 10**400]]), "out of range"),
    "text_time": (with_rows([["1", 2]]), "row 0 has a time"),
    "float_time": (with_rows([[1.0, 2]]), "row 0 has a time"),
    "null_time": (with_rows([[None, 2]]), "row 0 has a time"),
    "negative_time": (with_rows([[-1, 2]]), "row 0 has a negative time"),
    "huge_time": (with_rows([[2**63, 2]]), "a time is out of range"),
    "time_back": (with_rows([[5, 2], [9, 2], [8, 2]]), "time of row 2"),
    "time_stands": (with_rows([[5, 2], [5, 2]]), "time of row 1"),
    "no_events": ({"meta": {}, "streams": SOUND["streams"]}, "no `events`"),
    "event_no_kind": (altered(events=[{"t_ns": 1}]), "event 0"),
    "event_no_time": (altered(events=[{"kind": "on"}]), "event 0 (on)"),
    "phase_no_name": (altered(events=[{"kind": "phase_start", "t_ns": 1}]), "event 0 (phase_start) has no `phase`"),
}


@pytest.mark.parametrize(("document", "place"), BAD_DOCUMENTS.values(), ids=BAD_DOCUMENTS.keys())
def test_bad_content_is_one_sentence_with_file_and_place(tmp_path: Path, document: object, place: str) -> None:
    path = pack(tmp_path, document)
    with pytest.raises(RecordingError) as caught:
        read(path)
    message = str(caught.value)
    assert place in message
    assert message.startswith(str(path))
    assert "; " in message
    assert "\n" not in message


def test_processes_share_a_time(tmp_path: Path) -> None:
    rows = [[1, 10, 5], [1, 11, 5], [2, None, None]]
    table = {"cols": ["t_ns", "pid", "memory_bytes"], "rows": rows}
    assert len(read(pack(tmp_path, altered(streams={"processes": table}))).streams["processes"]) == 3
    table["rows"] = rows[::-1]
    with pytest.raises(RecordingError, match="time of row 1"):
        read(pack(tmp_path, altered(streams={"processes": table})))


def test_bad_files(tmp_path: Path) -> None:
    whole = DEMO.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content, problem in (
        (b"", "is empty"),
        (b'{"meta": {}}', "is not gzip"),
        (whole[: len(whole) // 2], "is cut off"),
        (whole[:-3], "is cut off"),
        (whole + b"tail", "4 bytes after its end"),
        (bytes(flipped), "is damaged"),
    ):
        path = tmp_path / "bad.json.gz"
        path.write_bytes(content)
        with pytest.raises(RecordingError, match=problem):
            read(path)


def test_no_such_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="there is no such file"):
        read(tmp_path / "away.json.gz")
    with pytest.raises(RecordingError, match="is a directory"):
        read(tmp_path)
    with pytest.raises(RecordingError, match="not a regular file"):
        read("/dev/null")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MAX_BYTES", 2**20)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(bytes(2**21)))
    assert path.stat().st_size < 2**13
    with pytest.raises(RecordingError, match="unpacks to more than 1 MiB"):
        read(path)
    path.write_bytes(bytes(2**21))
    with pytest.raises(RecordingError, match="larger than 1 MiB"):
        read(path)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path, SOUND)
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordingError, match="No space left on device"):
        write(path, read(DEMO, {"energy_counter"}))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_writing_into_no_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="a folder that exists"):
        write(tmp_path / "away" / "x.json.gz", read(pack(tmp_path, SOUND)))


def test_the_boards_own_limit_is_kept_beside_the_enforced_one(tmp_path: Path) -> None:
    path = tmp_path / "x.json.gz"
    streams = {"power_instant": Stream(np.array([1, 2]), {"mw": np.array([1.0, 2.0])})}
    write(path, Recording({"enforced_limit_mw": 400_000, "default_limit_mw": 700_000}, streams))
    info = device_info(read(path))
    assert (info.power_limit_watts, info.board_limit_watts) == (400, 700)
    # Recordings made before it was written down.
    assert device_info(Recording({"enforced_limit_mw": 400_000}, {})).board_limit_watts == 400
