"""The part of the demo's recording in which its GPU is never idle, as a GPU for another engine's test."""

from pathlib import Path

from jouletrace.daemon import demo_recording
from jouletrace.trace import recording

BUSY_SECONDS = (234.0, 269.0)
"""350 W at least all the time."""


def busy_recording(folder: Path) -> Path:
    """Write the recording into a folder and return the file."""
    whole = recording.read(demo_recording())
    origin_ns = whole.streams[recording.POWER_RING].t_ns[0]
    begin_ns, end_ns = (origin_ns + round(second * 1e9) for second in BUSY_SECONDS)
    streams = {}
    for name, stream in whole.streams.items():
        kept = (stream.t_ns >= begin_ns) & (stream.t_ns < end_ns)
        values = {column: numbers[kept] for column, numbers in stream.values.items()}
        streams[name] = recording.Stream(stream.t_ns[kept], values)
    file = folder / "busy.json.gz"
    recording.write(file, recording.Recording(whole.meta, streams, (), whole.name))
    return file
