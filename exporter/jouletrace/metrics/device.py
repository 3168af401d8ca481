"""The collectors of what each GPU does."""

from collections.abc import Iterable

from prometheus_client.core import Metric

from jouletrace.metrics import names
from jouletrace.metrics.collector import (
    OTHER,
    Collector,
    Scrape,
    family,
    first_and_other,
    per_device,
    per_device_and_kind,
)

MAX_XIDS = 32
"""Xid numbers per GPU with a series of their own. The catalogue has about 170; a GPU with more than a handful
needs a look at its log, not at a graph."""


class IdentityCollector:
    """Which GPUs there are."""

    name = "identity"
    metrics = (names.GPU_INFO,)

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        """Return the info family."""
        result = family(names.GPU_INFO)
        readable = {device.info.uuid for device in scrape.readable}
        for device in scrape.devices:
            info = device.info
            source = device.energy_source if info.uuid in readable else None
            result.add_metric(
                (
                    str(info.gpu),
                    info.uuid,
                    info.name,
                    info.architecture,
                    info.driver_version,
                    info.pci_bus_id,
                    source or "",
                    "true" if info.mig_enabled else "false",
                ),
                1,
            )
        yield result


class EnergyCollector:
    """Joules and watts."""

    name = "energy"
    metrics = (
        names.GPU_ENERGY_JOULES,
        names.GPU_HARDWARE_ENERGY_JOULES,
        names.GPU_POWER_WATTS,
        names.GPU_POWER_MAX_WATTS,
        names.GPU_MEMORY_POWER_WATTS,
        names.GPU_POWER_LIMIT_WATTS,
        names.GPU_IDLE_POWER_WATTS,
    )

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        """Return the energy and power families."""
        readable = scrape.readable
        # A device that has never been read has no energy: 0 J would be a claim.
        watched = [device for device in scrape.devices if device.timeline_end_ns is not None]
        yield per_device(names.GPU_ENERGY_JOULES, watched, lambda d: d.energy_joules)
        yield per_device(names.GPU_HARDWARE_ENERGY_JOULES, readable, lambda d: d.counter_joules)
        yield per_device(names.GPU_POWER_WATTS, readable, lambda d: d.power_watts)
        yield per_device(names.GPU_POWER_MAX_WATTS, readable, lambda d: d.power_max_watts)
        yield per_device(names.GPU_MEMORY_POWER_WATTS, readable, lambda d: d.memory_power_watts)
        yield per_device(names.GPU_POWER_LIMIT_WATTS, readable, lambda d: d.power_limit_watts)
        yield per_device_and_kind(names.GPU_IDLE_POWER_WATTS, readable, lambda d: d.idle_watts)


class ActivityCollector:
    """What the GPU's parts and links do."""

    name = "activity"
    metrics = (
        names.GPU_DRAM_BANDWIDTH_RATIO,
        names.GPU_DRAM_BYTES,
        names.GPU_BUSY_SECONDS,
        names.GPU_PCIE_BYTES,
        names.GPU_NVLINK_BYTES,
        names.GPU_UTILIZATION_RATIO,
    )

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        """Return the activity families."""
        readable, devices = scrape.readable, scrape.devices
        yield per_device(names.GPU_DRAM_BANDWIDTH_RATIO, readable, lambda d: d.dram_bandwidth_ratio)
        yield per_device(names.GPU_DRAM_BYTES, devices, lambda d: d.dram_bytes)
        yield per_device_and_kind(names.GPU_BUSY_SECONDS, devices, lambda d: d.busy_seconds)
        yield per_device_and_kind(names.GPU_PCIE_BYTES, devices, lambda d: d.pcie_bytes)
        yield per_device_and_kind(names.GPU_NVLINK_BYTES, devices, lambda d: d.nvlink_bytes)
        yield per_device_and_kind(names.GPU_UTILIZATION_RATIO, readable, lambda d: d.utilization_ratio)


class StateCollector:
    """Clocks, throttling, temperatures and memory."""

    name = "state"
    metrics = (
        names.GPU_CLOCK_HERTZ,
        names.GPU_THROTTLED_SECONDS,
        names.GPU_TEMPERATURE_CELSIUS,
        names.GPU_MEMORY_USED_BYTES,
        names.GPU_MEMORY_TOTAL_BYTES,
    )

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        """Return the state families."""
        readable = scrape.readable
        yield per_device_and_kind(names.GPU_CLOCK_HERTZ, readable, lambda d: d.clock_hertz)
        yield per_device_and_kind(names.GPU_THROTTLED_SECONDS, readable, lambda d: d.throttled_seconds)
        yield per_device_and_kind(names.GPU_TEMPERATURE_CELSIUS, readable, lambda d: d.temperature_celsius)
        yield per_device(names.GPU_MEMORY_USED_BYTES, readable, lambda d: d.memory_used_bytes)
        yield per_device(names.GPU_MEMORY_TOTAL_BYTES, readable, lambda d: d.info.memory_total_bytes)


class ErrorCollector:
    """Xid events and memory errors."""

    name = "errors"
    metrics = (names.GPU_XID_ERRORS, names.GPU_ECC_ERRORS)

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        """Return the error families."""
        xids = family(names.GPU_XID_ERRORS)
        for device in scrape.devices:
            gpu, uuid = str(device.info.gpu), device.info.uuid
            first, other = first_and_other(device.xid_errors, MAX_XIDS)
            for xid, count in first.items():
                xids.add_metric((gpu, uuid, str(xid)), count)
            if other:
                xids.add_metric((gpu, uuid, OTHER), other)
        yield xids
        yield per_device_and_kind(names.GPU_ECC_ERRORS, scrape.readable, lambda d: d.ecc_errors)


def device_collectors() -> tuple[Collector, ...]:
    """Return the collectors of the device rows."""
    return (
        IdentityCollector(),
        EnergyCollector(),
        ActivityCollector(),
        StateCollector(),
        ErrorCollector(),
    )
