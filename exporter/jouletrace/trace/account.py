"""The ledger run offline over a recording: its requests and where every joule went."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jouletrace.diagnosis.signals import HIGHEST_RATIO
from jouletrace.energy.baseline import QUIET_ACTIVITY, IdleKind, holds_context, work_watts
from jouletrace.energy.timeline import Timeline
from jouletrace.gpu.readings import DeviceInfo, Float64s, Int64s, Pipe
from jouletrace.requests.devices import Bools, BusyTrack, DeviceView
from jouletrace.requests.law import GENERIC, Law, LawBook
from jouletrace.requests.ledger import Ledger, Limits
from jouletrace.requests.records import RequestRecord
from jouletrace.trace.events import ENGINE_ID, Fidelity, engine_of, records, schedule_of
from jouletrace.trace.metering import NS, whole_timeline
from jouletrace.trace.recording import DRAM_COLUMN, GPM, PIPE_COLUMNS, STATE, UTILIZATION_COLUMNS, Recording, Stream

_MEMORY_COLUMN = "fb_used_mib"
_ACTIVITY_COLUMNS = (PIPE_COLUMNS[Pipe.GRAPHICS], PIPE_COLUMNS[Pipe.SM], DRAM_COLUMN)


class Account:
    """Feeds a recording's records to a ledger as the recording's time goes on."""

    def __init__(
        self, recording: Recording, info: DeviceInfo, *, fidelity: Fidelity, law: Law | None, start_ns: int, end_ns: int
    ) -> None:
        schedule = schedule_of(recording)
        self._info = info
        self._end_ns = end_ns
        self._records = list(records(recording, fidelity))
        self._next = 0
        self._ids = list(
            dict.fromkeys(
                record.request_id
                for _, record in self._records
                if isinstance(record, RequestRecord) and record.arrival_ns is not None
            )
        )
        self._ledger = Ledger(
            Limits(
                in_flight=max(len(self._ids), 1),
                settled=max(len(self._ids), 1),
                # Everything is asked for at the end, however long the recording.
                settled_ns=2**62,
                steps=max(len(self._records), 1),
            ),
            LawBook(
                engines={} if law is None else {ENGINE_ID: law},
                schedules={} if schedule is None else {ENGINE_ID: schedule},
                default=GENERIC,
            ),
            start_ns=start_ns,
        )
        engine = engine_of(recording)
        if engine is not None:
            self._ledger.add_engine(engine, start_ns)
        busy = _busy(recording)
        self._warnings: list[str] = []
        if busy is None:
            busy = _busy_by_power(recording, info.power_limit_watts)
            said = "Neither GPM nor NVML's utilization was recorded, so "
            said += (
                "that work of unknown requests and parked time are told apart by nothing: both count as idle."
                if busy is None
                else "what draws clearly more than a parked device counts as work; lighter work counts as idle."
            )
            self._warnings.append(said)
        self._busy = busy
        state = recording.streams.get(STATE)
        self._memory = None if state is None or _MEMORY_COLUMN not in state.values else state

    @property
    def warnings(self) -> Sequence[str]:
        """What the account cannot know, in sentences."""
        return self._warnings

    def advance(self, timeline: Timeline) -> None:
        """Settle what the timeline has by now; what reaches beyond the account's end is left to `close`."""
        now_ns = timeline.end_ns
        if now_ns > self._end_ns:
            return
        self._tell(now_ns)
        self._ledger.settle({self._info.uuid: self._view(timeline, now_ns)}, now_ns)

    def close(self, timeline: Timeline) -> None:
        """Settle everything up to the account's end."""
        self._tell(self._end_ns)
        now_ns = max(timeline.end_ns, self._end_ns)
        self._ledger.settle({self._info.uuid: self._view(timeline, now_ns)}, now_ns, close_ns=self._end_ns)

    def results(self) -> dict[str, Any]:
        """Return `requests` and `ledger` as `jouletrace analyze` prints them."""
        snapshot = self._ledger.snapshot()
        attributed = sum(snapshot.attributed_joules.values(), 0.0)
        idle = {kind.value: 0.0 for kind in IdleKind}
        for (_, kind), joules in snapshot.idle_joules.items():
            idle[kind] += joules
        # Requests that nobody described are nobody's when the recording is over.
        unattributed = sum((*snapshot.unattributed_joules.values(), *snapshot.pending_joules.values()), 0.0)
        device = sum(snapshot.device_joules.values(), 0.0)
        return {
            "requests": [found for found in map(self._request, self._ids) if found is not None],
            "ledger": {
                "attributed_joules": attributed,
                "idle_joules": idle,
                "unattributed_joules": unattributed,
                "device_joules": device,
                "residual_joules": device - attributed - sum(idle.values()) - unattributed,
            },
        }

    def _tell(self, until_ns: int) -> None:
        while self._next < len(self._records) and self._records[self._next][0] <= until_ns:
            t_ns, record = self._records[self._next]
            self._next += 1
            if isinstance(record, RequestRecord):
                self._ledger.add_request(record, t_ns)
            else:
                self._ledger.add_step(record, t_ns)

    def _view(self, timeline: Timeline, now_ns: int) -> DeviceView:
        return DeviceView(timeline, self._held(now_ns), self._busy)

    def _held(self, now_ns: int) -> bool | None:
        if self._memory is None:
            return None
        row = max(int(np.searchsorted(self._memory.t_ns, now_ns, side="right")) - 1, 0)
        used_mib = self._memory.values[_MEMORY_COLUMN][row]
        used = None if np.isnan(used_mib) else int(used_mib * 2**20)
        return holds_context(None, used, self._info.memory_total_bytes)

    def _request(self, request_id: str) -> Mapping[str, Any] | None:
        energy = self._ledger.price(request_id)
        if energy is None:
            return None
        return {
            "id": energy.request_id,
            "tenant": energy.tenant,
            "energy_joules": energy.energy_joules,
            "low": energy.low,
            "high": energy.high,
            "prefill_joules": energy.prefill_joules,
            "decode_joules": energy.decode_joules,
            "method": energy.method.value,
        }


def _busy(recording: Recording) -> BusyTrack | None:
    """Return when the device did work: from GPM, or else from NVML's duty cycles; None when neither tells anything."""
    for name, columns in ((GPM, _ACTIVITY_COLUMNS), (STATE, tuple(UTILIZATION_COLUMNS.values()))):
        stream = recording.streams.get(name)
        found = None if stream is None else _busy_rows(stream, columns)
        if found is not None:
            return found
    return None


def _busy_rows(stream: Stream, columns: Sequence[str]) -> BusyTrack | None:
    """Return the rows in which any of some percentages says work; rows that say nothing sensible are none."""
    values = [stream.values[name] for name in columns if name in stream.values]
    if not values:
        return None
    table: Float64s = np.stack(values)
    sound = (table >= 0) & (table <= 100 * HIGHEST_RATIO)
    known: Bools = np.any(sound, axis=0)
    worked: Bools = np.any(sound & (table > 100 * QUIET_ACTIVITY), axis=0)
    return BusyTrack(stream.t_ns[known], worked[known]) if known.any() else None


def _busy_by_power(recording: Recording, limit_watts: float | None) -> BusyTrack | None:
    """Return the seconds that drew the power of work; None when power has no limit to measure it by."""
    least, timeline = work_watts(None, limit_watts), whole_timeline(recording)
    if least is None or timeline is None:
        return None
    edges: Int64s = np.arange(timeline.start_ns, timeline.end_ns + 1, NS)
    watts: Float64s = np.diff(timeline.energies_at(edges))
    worked: Bools = np.greater(watts, least)
    return BusyTrack(edges[1:], worked) if len(watts) else None
