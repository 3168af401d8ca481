"""Readings from the NVIDIA driver, through the `pynvml` module of nvidia-ml-py.

The hot calls go to the library's functions directly, bound once, with buffers that are made once: pynvml's own
wrappers cost 2-12 us and an allocation each (measured, docs/performance.md). Everything that is not hot uses the
wrappers. Field, metric and event numbers are literals from nvml.h, so older bindings work too.
"""

import contextlib
import ctypes
import math
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pynvml
import structlog

from jouletrace.clock import WALL_NOISE_NS, Clock, SystemClock
from jouletrace.gpu.readings import (
    ActivityReading,
    CallStatistics,
    CounterReading,
    Device,
    DeviceInfo,
    DeviceLostError,
    DriverGoneError,
    DriverMismatchError,
    GpuError,
    HealthReading,
    Int64s,
    Link,
    NoDriverError,
    Pipe,
    PowerReading,
    PowerSamples,
    ProcessReading,
    StateReading,
    ThrottleReason,
    UnsupportedError,
    XidEvent,
)

SUCCESS, NO_PERMISSION, NOT_FOUND, INSUFFICIENT_SIZE, TIMEOUT = 0, 4, 6, 7, 10
_UNSUPPORTED = frozenset({3, 4, 13, 25, 26})
_LOST = frozenset({15, 16, 28})
_GONE = frozenset({1, 9, 17})
_MISMATCH = 18

CODE_NAMES = {
    1: "UNINITIALIZED", 2: "INVALID_ARGUMENT", 3: "NOT_SUPPORTED", 4: "NO_PERMISSION", 6: "NOT_FOUND",
    7: "INSUFFICIENT_SIZE", 9: "DRIVER_NOT_LOADED", 10: "TIMEOUT", 11: "IRQ_ISSUE", 12: "LIBRARY_NOT_FOUND",
    13: "FUNCTION_NOT_FOUND", 15: "GPU_IS_LOST", 16: "RESET_REQUIRED", 17: "OPERATING_SYSTEM",
    18: "LIB_RM_VERSION_MISMATCH", 19: "IN_USE", 20: "MEMORY", 21: "NO_DATA", 25: "ARGUMENT_VERSION_MISMATCH",
    26: "DEPRECATED", 27: "NOT_READY", 28: "GPU_NOT_FOUND", 999: "UNKNOWN",
}  # fmt: skip
"""nvmlReturn_t of nvml.h; kept here because pynvml asks the library, which may be the thing that is broken."""

FI_ECC_SBE_VOLATILE, FI_ECC_DBE_VOLATILE = 3, 4
FI_THROTTLE = {
    74: ThrottleReason.SW_POWER_CAP,
    76: ThrottleReason.SYNC_BOOST,
    77: ThrottleReason.BOARD_LIMIT,
    79: ThrottleReason.RELIABILITY,
    75: ThrottleReason.THERMAL,
    269: ThrottleReason.SW_THERMAL,
    270: ThrottleReason.HW_THERMAL,
    271: ThrottleReason.HW_POWER_BRAKE,
}
"""Fields of cumulative nanoseconds. 75 is the older sum of 269 and 270 and is dropped where those exist."""
FI_THROTTLE_SLOW = (75, 270, 271)
"""Each of these takes 1.2 ms on an H200, the others 0.04 ms; being cumulative, they lose nothing in a slow tier."""
SLOW_REASON_BITS = 0x8 | 0x20 | 0x40 | 0x80
"""Clock event reasons (nvml.h) in which these fields grow: hardware slowdown, heat by software and by hardware, power
brake."""
SLOW_THROTTLE_NS = 25_000_000_000
"""They are read in each `health` after such a reason was seen, and else in the first one after this time: each 30 s at
the usual 10 s. Reasons are those of a moment, so a shorter slowdown than their interval may show in none."""
FI_THROTTLE_FAST = tuple(field for field in FI_THROTTLE if field not in FI_THROTTLE_SLOW)
FI_MEMORY_TEMPERATURE = 82
FI_POWER_AVERAGE, FI_POWER_INSTANT = 185, 186
SCOPE_GPU, SCOPE_MEMORY = 0, 2
SAMPLES_TOTAL_POWER = 0
CLOCKS = {"sm": 1, "memory": 2}
EVENT_XID_CRITICAL = 0x8
GPM_VERSION = 1
GPM_BUSY = {
    1: Pipe.GRAPHICS,
    2: Pipe.SM,
    3: Pipe.SM_OCCUPANCY,
    4: Pipe.INTEGER,
    5: Pipe.TENSOR,
    11: Pipe.FP64,
    12: Pipe.FP32,
    13: Pipe.FP16,
}
GPM_DRAM = 10
GPM_LINK = {
    20: Link.PCIE_TRANSMIT,
    21: Link.PCIE_RECEIVE,
    60: Link.NVLINK_RECEIVE,
    61: Link.NVLINK_TRANSMIT,
}
GPM_GRAPHICS = 1
GPM_IDS = (*(metric for metric in GPM_BUSY if metric != GPM_GRAPHICS), GPM_DRAM, *GPM_LINK)
GPM_MINIMUM_NS = 100_000_000
"""Below 100 ms between samples the percentages are wrong (nvml.h; a steady 100 % read 54 % at 50 ms on an H200)."""
GPM_PATIENCE_NS = 2_000_000_000
"""A value that came back as NaN is waited for this long by keeping the older sample of the pair."""
GPM_MOST_PERCENT = 105.0
GPM_MOST_MIB_PER_SECOND = 1e7
"""10 TB/s; no link comes near (NVLink 5: 1.8 TB/s both ways), and blank values of 1.4e14 were reported."""
MIB = 1 << 20
GIVE_UP_AFTER = 5
"""NOT_SUPPORTED this often in a row: the device will not have it before the next start."""
SMALLEST_STEP_NS = 100_000_000
FUTURE_NS = 50_000_000
"""Ring stamps this far in the future were made before the wall clock was set back."""
RING_OLDEST_NS = 600_000_000_000
"""Ring stamps older than this were made before the wall clock was set forward: rings are 2 s deep, some 2 min."""
# The driver's garbage is all ones or 255 degrees with a success code; nothing real comes near these.
MOST_MILLIWATTS = 10_000_000
MOST_MEGAHERTZ = 10_000
MOST_CELSIUS = 150
ALL_ONES = 0xFFFFFFFFFFFFFFFF
MOST_COUNT = 10**18
"""Of cumulative nanoseconds (32 years) and of memory errors."""
CLOSE_PATIENCE_SECONDS = 2.0
"""How long `close` waits for the thread that waits for events to come out of the driver."""
INSTANT_BY_POWER_USAGE = frozenset({"kepler", "maxwell", "pascal", "volta", "turing", "ga100"})
"""Where nvmlDeviceGetPowerUsage is not the 1 s average (nvml.h)."""
ARCHITECTURES = {
    2: "kepler", 3: "maxwell", 4: "pascal", 5: "volta", 6: "turing", 7: "ampere", 8: "ada", 9: "hopper",
    10: "blackwell", 11: "t23x",
}  # fmt: skip
GA100_NAMES = ("A100", "A30", "A800", "PG506")

_log = structlog.get_logger(__name__)
_FIELD = struct.Struct("<IIqqIi8s")
_VALUE = {0: "<d", 1: "<I", 2: "<Q", 3: "<Q", 4: "<q", 5: "<i", 6: "<H"}
_RING_ROW = np.dtype([("stamp_us", "<u8"), ("value", "<u8")])


def error(call: str, code: int) -> GpuError:
    """Return the exception for a call's return code."""
    name = CODE_NAMES.get(code, str(code))
    kind: type[GpuError] = GpuError
    if code in _UNSUPPORTED:
        kind = UnsupportedError
    elif code in _LOST:
        kind = DeviceLostError
    elif code in _GONE:
        kind = DriverGoneError
    elif code == _MISMATCH:
        kind = DriverMismatchError
    return kind(call, code, name)


class _Fields:
    """A fixed batch of field values: one driver call, one buffer."""

    def __init__(self, ids: Sequence[tuple[int, int]]) -> None:
        self.ids = ids
        self._values = (pynvml.c_nvmlFieldValue_t * len(ids))()
        for value, (field_id, scope_id) in zip(self._values, ids, strict=True):
            value.fieldId, value.scopeId = field_id, scope_id
        self.argument = ctypes.byref(self._values)
        self.count = len(ids)
        self._bytes = memoryview(self._values).cast("B")
        self.unsupported = 0
        """How many fields of the last call the device does not have at all."""

    def values(self) -> list[float | None]:
        """Return the values of the last call in the order of `ids`; None where the driver gave none."""
        found: list[float | None] = []
        self.unsupported = 0
        for _, _, _, _, kind, code, raw in _FIELD.iter_unpack(self._bytes):
            layout = _VALUE.get(kind)
            if code != SUCCESS or layout is None:
                found.append(None)
                self.unsupported += code in _UNSUPPORTED
            else:
                found.append(struct.unpack_from(layout, raw)[0])
        return found


@contextlib.contextmanager
def _timed(calls: CallStatistics, call: str, gpu: int | None = None) -> Iterator[None]:
    """Count and time a call that goes through pynvml, and name it as pending while it is under way."""
    started = time.perf_counter()
    calls.pending = (call, gpu)
    try:
        yield
    finally:
        calls.pending = None
        calls.add(call, time.perf_counter() - started)


class _Gpm:
    """A pair of GPM samples and the metrics to compute between them. Raises pynvml's errors when made."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.samples = [pynvml.nvmlGpmSampleAlloc(), pynvml.nvmlGpmSampleAlloc()]
        """The older one, which intervals begin with, and the one to be filled next."""
        self.before_ns: int | None = None
        self.valid: set[int] = set()
        """Metrics that the device has been seen to give."""
        self._request = pynvml.c_nvmlGpmMetricsGet_t()
        self._request.version, self._request.numMetrics = GPM_VERSION, len(ids)
        for place, metric in enumerate(ids):
            self._request.metrics[place].metricId = metric
        self._argument = ctypes.byref(self._request)
        offset = pynvml.c_nvmlGpmMetricsGet_t.metrics.offset
        size = ctypes.sizeof(pynvml.c_nvmlGpmMetric_t) * len(ids)
        self._bytes = memoryview(self._request).cast("B")[offset : offset + size]
        self._function = pynvml._nvmlGetFunctionPointer("nvmlGpmMetricsGet")

    def compute(self) -> int:
        """Compute the metrics between the two samples; return the driver's code."""
        self._request.sample1, self._request.sample2 = self.samples
        code: int = self._function(self._argument)
        return code

    def values(self) -> dict[int, float]:
        """Return the computed metrics that are valid, by id."""
        return {
            metric: value
            for metric, result, value in _GPM_METRIC.iter_unpack(self._bytes)
            if result == SUCCESS
            and math.isfinite(value)
            and 0 <= value <= (GPM_MOST_MIB_PER_SECOND if metric in GPM_LINK else GPM_MOST_PERCENT)
        }

    def advance(self, now_ns: int) -> None:
        """Let the next interval begin with the newest sample."""
        self.samples.reverse()
        self.before_ns = now_ns


class NvmlSource:
    """The driver's devices. Opened, read and closed by one thread; `events` by another."""

    name = "nvml"

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.calls = CallStatistics()
        self._open = False
        self._event_set: Any = None
        self._retired_event_sets: list[Any] = []
        self._events_busy = threading.Lock()
        self._uuid_of_handle: dict[int, str] = {}

    def open(self) -> Sequence[Device]:
        """Initialize NVML and return the devices.

        Raises NoDriverError with a sentence that says what to do, or DriverMismatchError.
        """
        if not hasattr(pynvml, "_nvmlGetFunctionPointer"):
            raise NoDriverError(
                "the installed `pynvml` module is not NVIDIA's: run `pip uninstall pynvml`, then `pip install"
                " --force-reinstall nvidia-ml-py`"
            )
        try:
            with _timed(self.calls, "nvmlInitWithFlags"):
                pynvml.nvmlInit()
        except pynvml.NVMLError as failure:
            raise self._init_problem(failure.value) from None
        self._open = True
        try:
            with _timed(self.calls, "nvmlDeviceGetCount_v2"):
                count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as failure:
            raise self._no_answer(error("nvmlDeviceGetCount_v2", failure.value)) from None
        if count == 0:
            raise NoDriverError(
                "the NVIDIA driver is there but shows no GPU: check `nvidia-smi -L`, and in a container that devices"
                " are passed in (NVIDIA_VISIBLE_DEVICES=all, NVIDIA_DRIVER_CAPABILITIES=utility)"
            )
        devices: list[Device] = []
        problem: GpuError | None = None
        for index in range(count):
            try:
                with _timed(self.calls, "nvmlDeviceGetHandleByIndex_v2", index):
                    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                devices.append(self._device(handle, index))
            except pynvml.NVMLError as failure:
                problem = error("nvmlDeviceGetHandleByIndex_v2", failure.value)
            except GpuError as failure:
                problem = failure
            else:
                continue
            self.calls.add_error(problem.call, problem.name)
            _log.warning(
                "GPU does not answer and is left out: look at `nvidia-smi` and `dmesg | grep -i xid`, then restart"
                " jouletrace",
                gpu=index,
                error=str(problem),
            )
        if problem is not None and not devices:
            raise self._no_answer(problem)
        return devices

    def reopen_device(self, uuid: str) -> Device:
        """Return a fresh handle of a lost device; raises GpuError while it is away."""
        try:
            with _timed(self.calls, "nvmlDeviceGetHandleByUUID"):
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                index = pynvml.nvmlDeviceGetIndex(handle)
        except pynvml.NVMLError as failure:
            raise error("nvmlDeviceGetHandleByUUID", failure.value) from None
        return self._device(handle, index)

    def events(self, timeout_seconds: float) -> Sequence[XidEvent]:
        """Wait for critical errors, at most `timeout_seconds`."""
        # `_open` first: a thread that comes back at once would keep `close` from ever getting the lock.
        if self._open:
            with self._events_busy:
                self._free_retired()
                if self._event_set is not None:
                    return self._wait_for_event(timeout_seconds)
        time.sleep(timeout_seconds)
        return ()

    def _wait_for_event(self, timeout_seconds: float) -> Sequence[XidEvent]:
        try:
            data = pynvml.nvmlEventSetWait_v2(self._event_set, int(timeout_seconds * 1e3))
        except pynvml.NVMLError as failure:
            if failure.value == TIMEOUT:
                return ()
            raise error("nvmlEventSetWait_v2", failure.value) from None
        uuid = self._uuid_of_handle.get(_address(data.device))
        return (XidEvent(self.clock.now_ns(), uuid, int(data.eventData)),) if uuid else ()

    def watch_events(self, devices: Sequence[Device]) -> None:
        """Ask the driver to report critical errors of these devices and no others, where it can.

        One lost GPU in a set makes every wait for it fail.
        """
        try:
            event_set = pynvml.nvmlEventSetCreate()
        except pynvml.NVMLError as failure:
            self._note("nvmlEventSetCreate", failure)
            return
        for device in devices:
            assert isinstance(device, NvmlDevice)
            self._uuid_of_handle[_address(device.handle)] = device.info.uuid
            try:
                if pynvml.nvmlDeviceGetSupportedEventTypes(device.handle) & EVENT_XID_CRITICAL:
                    pynvml.nvmlDeviceRegisterEvents(device.handle, EVENT_XID_CRITICAL, event_set)
            except pynvml.NVMLError as failure:
                self._note("nvmlDeviceRegisterEvents", failure)
        if self._event_set is not None:
            # The other thread may be waiting for it; it frees it when it comes back.
            self._retired_event_sets.append(self._event_set)
        self._event_set = event_set

    def _free_retired(self) -> None:
        while self._retired_event_sets:
            # A driver that is gone refuses to be let go of.
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlEventSetFree(self._retired_event_sets.pop())

    def close(self) -> None:
        """Shut NVML down, unless the thread in `events` hangs there: a shutdown below a call would crash."""
        if not self._open:
            return
        self._open = False
        if not self._events_busy.acquire(timeout=CLOSE_PATIENCE_SECONDS):
            return
        try:
            self._shut_down()
        finally:
            self._events_busy.release()

    def _shut_down(self) -> None:
        if self._event_set is not None:
            self._retired_event_sets.append(self._event_set)
            self._event_set = None
        self._free_retired()
        self._uuid_of_handle.clear()
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()

    def _note(self, call: str, failure: Any) -> None:
        self.calls.add_error(call, CODE_NAMES.get(failure.value, str(failure.value)))

    def _device(self, handle: Any, index: int) -> "NvmlDevice":
        return NvmlDevice(handle, device_info(handle, index, self.calls), self.clock, self.calls)

    @staticmethod
    def _no_answer(problem: GpuError) -> Exception:
        """Return the exception for a driver that starts and then shows no device."""
        if isinstance(problem, DriverMismatchError):
            return problem
        if problem.code == NO_PERMISSION:
            return NoDriverError(
                f"no permission to read the GPUs ({problem}): give this user access to /dev/nvidia*, and in a"
                " container pass the devices in"
            )
        return NoDriverError(
            f"the NVIDIA driver started and then no GPU answered ({problem}): look at `nvidia-smi` and"
            " `dmesg | grep -i xid`"
        )

    @staticmethod
    def _init_problem(code: int) -> Exception:
        match code:
            case 12:
                return NoDriverError(
                    "libnvidia-ml.so.1 was not found: this machine has no NVIDIA driver, or the container was started"
                    " without NVIDIA_DRIVER_CAPABILITIES=utility (try `jouletrace run --demo` without a GPU)"
                )
            case 9:
                return NoDriverError(
                    "the NVIDIA kernel driver is not loaded: run `modprobe nvidia` or see `dmesg | grep -i nvrm`"
                )
            case 4:
                return NoDriverError(
                    "no permission to open the NVIDIA devices: give this user access to /dev/nvidiactl and /dev/nvidia*"
                )
            case 18:
                return error("nvmlInit", code)
            case _:
                return NoDriverError(
                    f"NVML did not start: {CODE_NAMES.get(code, code)} (code {code}); see `nvidia-smi`"
                )


def _address(handle: Any) -> int:
    """Return the number behind a device handle; handles of the same device in one driver session are equal."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def device_info(handle: Any, index: int, calls: CallStatistics) -> DeviceInfo:
    """Read what does not change. Raises GpuError when the device has not even a UUID."""

    def ask(call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            with _timed(calls, call.__name__, index):
                return call(*arguments)
        except pynvml.NVMLError:
            return None

    try:
        with _timed(calls, "nvmlDeviceGetUUID", index):
            uuid = pynvml.nvmlDeviceGetUUID(handle)
    except pynvml.NVMLError as failure:
        raise error("nvmlDeviceGetUUID", failure.value) from None
    name = ask(pynvml.nvmlDeviceGetName, handle) or "unknown GPU"
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    bus_bits = ask(pynvml.nvmlDeviceGetMemoryBusWidth, handle)
    memory_mhz = ask(pynvml.nvmlDeviceGetMaxClockInfo, handle, CLOCKS["memory"])
    sm_mhz = ask(pynvml.nvmlDeviceGetMaxClockInfo, handle, CLOCKS["sm"])
    limit_mw = ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    default_mw = ask(pynvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
    pci = ask(pynvml.nvmlDeviceGetPciInfo, handle)
    mig = ask(pynvml.nvmlDeviceGetMigMode, handle)
    architecture = ARCHITECTURES.get(ask(pynvml.nvmlDeviceGetArchitecture, handle), "")
    if architecture == "ampere" and any(part in name for part in GA100_NAMES):
        architecture = "ga100"
    return DeviceInfo(
        uuid=uuid,
        gpu=index,
        name=name,
        driver_version=ask(pynvml.nvmlSystemGetDriverVersion) or "",
        architecture=architecture,
        pci_bus_id=pci.busId if pci else "",
        memory_total_bytes=memory.total if memory else None,
        # Two transfers a clock: 2 x 3201 MHz x 6016 bit is the 4.81 TB/s of an H200's data sheet.
        peak_dram_bytes_per_second=2e6 * memory_mhz * bus_bits / 8 if bus_bits and memory_mhz else None,
        max_sm_clock_hertz=sm_mhz * 1e6 if sm_mhz else None,
        power_limit_watts=limit_mw / 1e3 if limit_mw and limit_mw < MOST_MILLIWATTS else None,
        default_power_limit_watts=default_mw / 1e3 if default_mw and default_mw < MOST_MILLIWATTS else None,
        mig_enabled=bool(mig and mig[0]),
    )


class NvmlDevice:
    """One GPU of the driver. Not thread-safe."""

    def __init__(self, handle: Any, info: DeviceInfo, clock: Clock, calls: CallStatistics) -> None:
        self.handle = handle
        self.info = info
        self._clock = clock
        self._calls = calls
        self._refusals: dict[str, int] = {}
        self._functions: dict[str, Any] = {}
        # The ring.
        self._ring_buffer: Any = None
        self._ring_rows: Any = None
        self._ring_newest_ns = 0
        self._ring_step_ns = 0
        """The wall clock's step that the newest sample was stamped after."""
        self._ring_kind, self._ring_count = ctypes.c_int(), ctypes.c_uint()
        # Power, counter, state.
        self._power_fields = _Fields(
            [(FI_POWER_INSTANT, SCOPE_GPU), (FI_POWER_AVERAGE, SCOPE_GPU), (FI_POWER_AVERAGE, SCOPE_MEMORY)]
        )
        self._state_fields = _Fields([*((field, 0) for field in FI_THROTTLE_FAST), (FI_MEMORY_TEMPERATURE, 0)])
        self._slow_fields = _Fields([(field, 0) for field in FI_THROTTLE_SLOW])
        self._slow_throttled: dict[ThrottleReason, int] = {}
        self._slow_read_ns: int | None = None
        self._is_slowed = self._was_slowed = False
        """Whether the newest state shows a slow field's reason or does not tell, and whether any has since these were
        read."""
        self._ecc_fields = _Fields([(FI_ECC_SBE_VOLATILE, 0), (FI_ECC_DBE_VOLATILE, 0)])
        self._counter = ctypes.c_ulonglong()
        self._uint, self._ulonglong = ctypes.c_uint(), ctypes.c_ulonglong()
        self._utilization = pynvml.c_nvmlUtilization_t()
        # GPM.
        self._gpm: _Gpm | None = None
        self._graphics: _Gpm | None = None
        self._process_since_us = 0
        self._was_shared = False

    # ---------------------------------------------------------------- calling

    def _call(self, name: str, *arguments: Any) -> int:
        """Call a library function on this device and return its code; times it."""
        function = self._functions.get(name)
        if function is None:
            try:
                function = pynvml._nvmlGetFunctionPointer(name)
            except pynvml.NVMLError as failure:
                raise error(name, failure.value) from None
            self._functions[name] = function
        return self._run(name, function, self.handle, *arguments)

    def _run(self, name: str, function: Callable[..., int], *arguments: Any) -> int:
        calls = self._calls
        started = time.perf_counter()
        calls.pending = (name, self.info.gpu)
        code = function(*arguments)
        calls.pending = None
        calls.add(name, time.perf_counter() - started)
        return code

    def _checked(self, name: str, *arguments: Any) -> None:
        code = self._call(name, *arguments)
        if code != SUCCESS:
            raise error(name, code)

    def _optional(self, name: str, *arguments: Any, part: str = "") -> bool:
        """Call and say whether it worked; refused calls are dropped after a while, lost devices raise.

        Refusals are counted for one `part` of a call's range where the device may have some of it.
        """
        key = f"{name} {part}" if part else name
        if self._refusals.get(key, 0) >= GIVE_UP_AFTER:
            return False
        try:
            self._checked(name, *arguments)
        except (DeviceLostError, DriverGoneError, DriverMismatchError):
            raise
        except UnsupportedError:
            self._refusals[key] = self._refusals.get(key, 0) + 1
            return False
        except GpuError as failure:
            self._calls.add_error(failure.call, failure.name)
            return False
        self._refusals.pop(key, None)
        return True

    def _either(self, new: str, old: str, *arguments: Any) -> bool:
        """Call the newer function, or the older one where the library or driver lacks it."""
        return self._optional(new, *arguments) or self._optional(old, *arguments)

    def _read_fields(self, fields: _Fields) -> list[float | None]:
        self._checked("nvmlDeviceGetFieldValues", fields.count, fields.argument)
        return fields.values()

    # ---------------------------------------------------------------- readings

    def power_ring(self) -> PowerSamples:
        """Return the power ring's new samples; an empty reading when there are none."""
        stepped_ns = self._clock.wall_step_ns()
        is_stepped = abs(stepped_ns - self._ring_step_ns) > WALL_NOISE_NS
        since_us = 0 if is_stepped else (self._ring_newest_ns + self._ring_step_ns) // 1_000
        code = self._read_ring(since_us)
        if code == INSUFFICIENT_SIZE:
            self._ring_buffer = None
            code = self._read_ring(since_us)
        count = self._ring_count.value if code == SUCCESS else 0
        if code not in (SUCCESS, NOT_FOUND):
            raise error("nvmlDeviceGetSamples", code)
        rows, now_ns = self._ring_rows[:count], self._clock.now_ns()
        wall_ns = rows["stamp_us"].astype(np.int64) * 1_000
        ends_ns = wall_ns - self._ring_step_ns
        if is_stepped:
            # What lies before the newest sample known may hold an earlier step.
            known = np.flatnonzero(ends_ns == self._ring_newest_ns)
            from_known = slice(int(known[-1]) if len(known) else 0, None)
            rows, wall_ns, ends_ns = rows[from_known], wall_ns[from_known], ends_ns[from_known]
            first = _first_after_step(wall_ns, stepped_ns - self._ring_step_ns, now_ns + stepped_ns)
            ends_ns[first:] = wall_ns[first:] - stepped_ns
            if first < len(rows):
                self._ring_step_ns = stepped_ns
        milliwatts = self._ring_values(rows["value"])
        oldest_ns = max(self._ring_newest_ns, now_ns - RING_OLDEST_NS)
        keep = (ends_ns > oldest_ns) & (ends_ns < now_ns + FUTURE_NS)
        # Counting takes an eighth of what `all` does on so few.
        if np.count_nonzero(keep) < len(keep):
            ends_ns, milliwatts = ends_ns[keep], milliwatts[keep]
        if np.count_nonzero(ends_ns[1:] > ends_ns[:-1]) < len(ends_ns) - 1:
            highest_ns = np.maximum.accumulate(ends_ns)
            rising = np.concatenate(([True], highest_ns[1:] > highest_ns[:-1]))
            ends_ns, milliwatts = ends_ns[rising], milliwatts[rising]
        if len(ends_ns):
            self._ring_newest_ns = int(ends_ns[-1])
        return PowerSamples(ends_ns, milliwatts)

    def _read_ring(self, since_us: int) -> int:
        """Ask for the samples stamped after `since_us` and return the code; they lie in `_ring_rows`."""
        if self._ring_buffer is None:
            self._make_ring_buffer()
        self._ring_count.value = len(self._ring_buffer)
        return self._call(
            "nvmlDeviceGetSamples",
            SAMPLES_TOTAL_POWER,
            ctypes.c_ulonglong(since_us),
            ctypes.byref(self._ring_kind),
            ctypes.byref(self._ring_count),
            self._ring_buffer,
        )

    def _make_ring_buffer(self) -> None:
        count = ctypes.c_uint(0)
        code = self._call(
            "nvmlDeviceGetSamples",
            SAMPLES_TOTAL_POWER,
            ctypes.c_ulonglong(0),
            ctypes.byref(self._ring_kind),
            ctypes.byref(count),
            None,
        )
        if code not in (SUCCESS, NOT_FOUND, INSUFFICIENT_SIZE):
            raise error("nvmlDeviceGetSamples", code)
        # The second call may bring more than the first announced.
        self._ring_buffer = (pynvml.c_nvmlSample_t * (count.value + 128))()
        self._ring_rows = np.frombuffer(self._ring_buffer, _RING_ROW)

    def _ring_values(self, raw: Any) -> Any:
        match self._ring_kind.value:
            case 0:
                return raw.view(np.float64).astype(np.float64)
            case 1 | 5:
                return (raw & 0xFFFFFFFF).astype(np.float64)
            case 6:
                return (raw & 0xFFFF).astype(np.float64)
            case _:
                return raw.astype(np.float64)

    def energy_counter(self) -> CounterReading:
        """Return the hardware energy counter (2-25 ms on an H200)."""
        started = time.monotonic_ns()
        self._checked("nvmlDeviceGetTotalEnergyConsumption", ctypes.byref(self._counter))
        return CounterReading(self._clock.now_ns(), self._counter.value, time.monotonic_ns() - started)

    def power(self) -> PowerReading:
        """Return instant, average and memory power; 0 counts as not given, as some boards answer so."""
        instant, average, memory = self._power_values()
        if not instant and not average and self._optional("nvmlDeviceGetPowerUsage", ctypes.byref(self._uint)):
            if self.info.architecture in INSTANT_BY_POWER_USAGE:
                instant = self._uint.value
            else:
                average = self._uint.value
        if not instant and not average:
            raise UnsupportedError("nvmlDeviceGetPowerUsage", 3, "NOT_SUPPORTED")
        return PowerReading(
            self._clock.now_ns(),
            int(instant) if instant else None,
            int(average) if average else None,
            int(memory) if memory and memory < MOST_MILLIWATTS else None,
        )

    def _power_values(self) -> Sequence[float | None]:
        """Return the power fields, where the driver has them: instant, average and memory."""
        if self._refusals.get("power fields", 0) >= GIVE_UP_AFTER:
            return (None, None, None)
        try:
            values = self._read_fields(self._power_fields)
        except UnsupportedError:
            refused = True
            values = [None, None, None]
        else:
            refused = self._power_fields.unsupported == self._power_fields.count
        self._refusals["power fields"] = self._refusals.get("power fields", 0) + 1 if refused else 0
        return values

    def activity(self) -> ActivityReading | None:
        """Return GPM means since the reading before; None when under 100 ms have passed or at the first call.

        Raises UnsupportedError where the device has no GPM (before Hopper, in MIG mode, on some vGPUs).
        """
        if self._gpm is None:
            self._gpm = self._make_gpm(GPM_IDS)
        return self._activity_of(self._gpm)

    def graphics_activity(self) -> ActivityReading | None:
        """Return the part of the time in which any kernel ran, as `activity` does.

        On its own because computing this one metric costs 1.9 ms on an H200, and all others together 0.04 ms.
        """
        if self._graphics is None:
            self._graphics = self._make_gpm((GPM_GRAPHICS,))
        return self._activity_of(self._graphics)

    def _activity_of(self, gpm: "_Gpm") -> ActivityReading | None:
        now_ns = self._clock.now_ns()
        before_ns = gpm.before_ns
        if before_ns is not None and now_ns - before_ns < GPM_MINIMUM_NS:
            return None
        self._checked("nvmlGpmSampleGet", gpm.samples[1])
        now_ns = self._clock.now_ns()
        if before_ns is None:
            gpm.advance(now_ns)
            return None
        code = self._run("nvmlGpmMetricsGet", gpm.compute)
        if code != SUCCESS:
            raise error("nvmlGpmMetricsGet", code)
        values = gpm.values()
        missing = gpm.valid - values.keys()
        if missing and now_ns - before_ns < GPM_PATIENCE_NS:
            # Now and then the driver answers NaN: the next reading then covers this time as well.
            return None
        gpm.valid |= values.keys()
        gpm.valid -= missing
        gpm.advance(now_ns)
        dram = values.get(GPM_DRAM)
        return ActivityReading(
            before_ns,
            now_ns,
            None if dram is None else min(dram / 100, 1.0),
            {pipe: min(values[i] / 100, 1.0) for i, pipe in GPM_BUSY.items() if i in values},
            {link: values[i] * MIB for i, link in GPM_LINK.items() if i in values},
        )

    def _make_gpm(self, ids: Sequence[int]) -> "_Gpm":
        try:
            support = pynvml.nvmlGpmQueryDeviceSupport(self.handle)
            if not support.isSupportedDevice:
                raise UnsupportedError("nvmlGpmQueryDeviceSupport", 3, "NOT_SUPPORTED")
            return _Gpm(ids)
        except pynvml.NVMLError as failure:
            raise error("nvmlGpmQueryDeviceSupport", failure.value) from None

    def state(self) -> StateReading:
        """Return clocks, event reasons, throttle times, temperatures, memory and NVML utilization."""
        number, reference = self._uint, ctypes.byref(self._uint)
        clocks = {
            domain: number.value * 1e6
            for domain, kind in CLOCKS.items()
            if self._optional("nvmlDeviceGetClockInfo", kind, reference, part=domain) and number.value < MOST_MEGAHERTZ
        }
        reasons = None
        if self._either(
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetCurrentClocksThrottleReasons",
            ctypes.byref(self._ulonglong),
        ):
            reasons = self._ulonglong.value if self._ulonglong.value != ALL_ONES else None
        self._is_slowed = reasons is None or bool(reasons & SLOW_REASON_BITS)
        self._was_slowed |= self._is_slowed
        temperatures = {}
        gpu_temperature = self._gpu_temperature()
        if gpu_temperature is not None:
            temperatures["gpu"] = gpu_temperature
        try:
            *times, memory_temperature = self._read_fields(self._state_fields)
        except UnsupportedError:
            times, memory_temperature = [], None
        throttled = _throttled(FI_THROTTLE_FAST, times)
        if memory_temperature and 0 < memory_temperature < MOST_CELSIUS:
            temperatures["memory"] = float(memory_temperature)
        utilization = {}
        if self._optional("nvmlDeviceGetUtilizationRates", ctypes.byref(self._utilization)):
            # Garbage above 100 (up to 0xFFFFFFFF) was reported in the field.
            for kind, percent in (("gpu", self._utilization.gpu), ("memory", self._utilization.memory)):
                if percent <= 100:
                    utilization[kind] = percent / 100
        return StateReading(
            self._clock.now_ns(), clocks, reasons, throttled, temperatures, self._memory_used(), utilization
        )

    def _gpu_temperature(self) -> float | None:
        structure = getattr(pynvml, "c_nvmlTemperature_v1_t", None)
        if structure is not None and self._refusals.get("nvmlDeviceGetTemperatureV", 0) < GIVE_UP_AFTER:
            if not hasattr(self, "_temperature"):
                self._temperature = structure()
                self._temperature.version = pynvml.nvmlTemperature_v1
                self._temperature.sensorType = 0
            if self._optional("nvmlDeviceGetTemperatureV", ctypes.byref(self._temperature)):
                return _celsius(self._temperature.temperature)
        if self._optional("nvmlDeviceGetTemperature", 0, ctypes.byref(self._uint)):
            return _celsius(self._uint.value)
        return None

    def _memory_used(self) -> int | None:
        if not hasattr(self, "_memory"):
            self._memory = pynvml.c_nvmlMemory_v2_t()
            self._memory_old = pynvml.c_nvmlMemory_t()
            self._memory.version = pynvml.nvmlMemory_v2
        if self._optional("nvmlDeviceGetMemoryInfo_v2", ctypes.byref(self._memory)):
            memory = self._memory
        elif self._optional("nvmlDeviceGetMemoryInfo", ctypes.byref(self._memory_old)):
            memory = self._memory_old
        else:
            return None
        return int(memory.used) if memory.used <= (self.info.memory_total_bytes or memory.total) else None

    def health(self) -> HealthReading:
        """Return the processes with a context, the power limit, slow throttle times and volatile ECC totals."""
        processes = self.processes()
        shares: dict[int, float] = {}
        is_shared = processes is not None and len(processes) > 1
        if is_shared or self._was_shared:
            shares = self._sm_shares()
        self._was_shared = is_shared
        if processes is not None and is_shared:
            processes = tuple(replace(process, sm_ratio=shares.get(process.pid)) for process in processes)
        limit = None
        if (
            self._optional("nvmlDeviceGetEnforcedPowerLimit", ctypes.byref(self._uint))
            and self._uint.value < MOST_MILLIWATTS
        ):
            limit = self._uint.value / 1e3
        ecc = {}
        try:
            corrected, uncorrected = self._read_fields(self._ecc_fields)
        except UnsupportedError:
            corrected, uncorrected = None, None
        for kind, errors in (("corrected", corrected), ("uncorrected", uncorrected)):
            if errors is not None and 0 <= errors < MOST_COUNT:
                ecc[kind] = int(errors)
        now_ns = self._clock.now_ns()
        if self._was_slowed or self._slow_read_ns is None or now_ns - self._slow_read_ns >= SLOW_THROTTLE_NS:
            self._slow_throttled = self._slow_times()
            self._slow_read_ns = now_ns
            # What is still on goes on to count: its end is read as well.
            self._was_slowed = self._is_slowed
        return HealthReading(now_ns, processes, shares, limit, ecc, self._slow_throttled)

    def _slow_times(self) -> dict[ThrottleReason, int]:
        """Read the slow throttle times, ns."""
        try:
            times = self._read_fields(self._slow_fields)
        except UnsupportedError:
            return {}
        throttled = _throttled([field for field, _ in self._slow_fields.ids], times)
        if ThrottleReason.HW_THERMAL in throttled and throttled.pop(ThrottleReason.THERMAL, None) is not None:
            # The older sum is not needed beside its parts: 0.6 ms a read less from now on.
            kept = [one for one in self._slow_fields.ids if FI_THROTTLE[one[0]] is not ThrottleReason.THERMAL]
            self._slow_fields = _Fields(kept)
        return throttled

    def processes(self) -> Sequence[ProcessReading] | None:
        """Return the processes with a context, without SM shares; `None` when the driver does not list them."""
        found: dict[int, int | None] = {}
        try:
            with _timed(self._calls, "nvmlDeviceGetComputeRunningProcesses_v3", self.info.gpu):
                for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self.handle):
                    found[process.pid] = process.usedGpuMemory
        except pynvml.NVMLError as failure:
            problem = error("nvmlDeviceGetComputeRunningProcesses_v3", failure.value)
            if isinstance(problem, UnsupportedError):
                return None
            raise problem from None
        return tuple(ProcessReading(pid, memory) for pid, memory in sorted(found.items()))

    def _sm_shares(self) -> dict[int, float]:
        """Return the SM share by process since the last call, weighted by time (a 3 ms call)."""
        try:
            with _timed(self._calls, "nvmlDeviceGetProcessUtilization", self.info.gpu):
                samples = pynvml.nvmlDeviceGetProcessUtilization(self.handle, self._process_since_us)
        except pynvml.NVMLError:
            # NOT_FOUND means that nothing ran; MIG and some drivers do not have the call at all.
            return {}
        sums: dict[int, float] = {}
        counts: dict[int, int] = {}
        for sample in samples:
            if sample.timeStamp > self._process_since_us and sample.smUtil <= 100:
                sums[sample.pid] = sums.get(sample.pid, 0.0) + sample.smUtil / 100
                counts[sample.pid] = counts.get(sample.pid, 0) + 1
        self._process_since_us = max((sample.timeStamp for sample in samples), default=self._process_since_us)
        slots = max(counts.values(), default=1)
        return {pid: total / slots for pid, total in sums.items()}


def _celsius(reading: int) -> float | None:
    return float(reading) if 0 < reading < MOST_CELSIUS else None


_GPM_METRIC = struct.Struct("<Iid24x")
"""nvmlGpmMetric_t: metricId, nvmlReturn, value, then three name pointers."""


def _first_after_step(wall_ns: Int64s, step_ns: int, now_wall_ns: int) -> int:
    """Return the index of the first ring stamp made after the wall clock was set by `step_ns`.

    Stamps lie in order of time, so the step shows as the one spacing that is off by it. Steps too small to tell
    from the ring's own jitter (6 to 48 ms) count as made before all samples.
    """
    if len(wall_ns) == 0 or abs(step_ns) < SMALLEST_STEP_NS:
        return 0
    off_ns = np.abs(np.diff(wall_ns) - step_ns)
    if len(off_ns) and off_ns.min() < SMALLEST_STEP_NS:
        return int(off_ns.argmin()) + 1
    is_after = abs(int(wall_ns[-1]) - now_wall_ns) < abs(int(wall_ns[-1]) + step_ns - now_wall_ns)
    return 0 if is_after else len(wall_ns)


def _throttled(fields: Sequence[int], times: Sequence[float | None]) -> dict[ThrottleReason, int]:
    """Return the plausible throttle times, ns, by reason."""
    return {
        FI_THROTTLE[field]: int(spent)
        for field, spent in zip(fields, times, strict=False)
        if spent is not None and 0 <= spent < MOST_COUNT
    }
