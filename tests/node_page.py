"""A node as full as it gets, through the real collectors: so many GPUs, models (an engine each) and tenants."""

from dataclasses import replace

from prometheus_client.core import Metric

from jouletrace.diagnosis.node import DiagnosisSnapshot
from jouletrace.diagnosis.waste import WasteCause
from jouletrace.engines.otlp.tee import Drop, TeeCounts
from jouletrace.metrics import names
from jouletrace.metrics.exporter import Exporter, node_collectors
from jouletrace.requests.account import Buckets, EngineState, LedgerSnapshot, Phase
from jouletrace.requests.histogram import BOUNDS
from jouletrace.requests.inbox import Events
from jouletrace.requests.records import Status
from tests.snapshots import NOW_NS, diagnosis_snapshot, full_device, node_snapshot

DIRECTIONS = ("input", "cached_input", "output")
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


def full_page(gpus: int, models: int, tenants: int) -> list[Metric]:
    """Return the families of a node on which every tenant uses every model and everything has happened once."""
    devices = [
        replace(full_device(), info=replace(full_device().info, gpu=n, uuid=f"GPU-{n:032x}")) for n in range(gpus)
    ]
    account, found = _account(devices_of(gpus), models, tenants), _diagnosis(devices_of(gpus), models)
    events = Events({"http": 1000, "datagram": 50}, {("http", "invalid"): 3, ("http", "duplicate"): 2})
    tee = TeeCounts(forwarded=10, dropped=dict.fromkeys(Drop, 1), held_bytes=100)
    exporter = Exporter(
        lambda: node_snapshot(*devices),
        node_collectors(
            lambda: account,
            lambda: events,
            lambda: found,
            lambda: tee,
            reloads=lambda: dict.fromkeys(names.FILE_RELOAD_SUCCESS.values, True),
        ),
        now_ns=lambda: NOW_NS,
        heartbeat_age_seconds=lambda: 0.1,
        stale_after_seconds=5.0,
    )
    return list(exporter.collect())


def devices_of(gpus: int) -> list[str]:
    """Return the uuids."""
    return [f"GPU-{number:032x}" for number in range(gpus)]


def _account(uuids: list[str], models: int, tenants: int) -> LedgerSnapshot:
    accounts = [(f"org/model-{m}", f"tenant-{t}", f"vllm-{m}") for m in range(models) for t in range(tenants)]
    pairs = [(model, tenant) for model, tenant, _ in accounts]
    engines = [f"vllm-{number}" for number in range(models)]
    full = Buckets(BOUNDS, tuple(range(1, len(BOUNDS) + 2)), 1e4, ((TRACE_ID, 1.0, NOW_NS),) * (len(BOUNDS) + 1))
    # Idle time of an engine before its first request is nobody's.
    nobody = [(f"org/model-{m}", "", f"vllm-{m}") for m in range(models)]
    return LedgerSnapshot(
        settled_ns=NOW_NS,
        device_joules=dict.fromkeys(uuids, 1e6),
        attributed_joules={(*one, phase): 1e4 for one in accounts for phase in (Phase.PREFILL, Phase.DECODE)},
        allocated_joules=dict.fromkeys([*accounts, *nobody], 2e4),
        idle_joules={(uuid, kind): 1e4 for uuid in uuids for kind in ("bare", "parked")},
        unattributed_joules=dict.fromkeys(uuids, 1e3),
        request_joules={f"org/model-{m}": full for m in range(models)},
        requests={(*pair, how): 9 for pair in pairs for how in (Status.FINISHED, Status.CANCELLED, Status.FAILED)},
        in_flight=dict.fromkeys(engines, 17),
        tokens={(*pair, direction): 1000 for pair in pairs for direction in DIRECTIONS},
        coverage=dict.fromkeys(engines, 0.98),
        engine_states={engine: EngineState(NOW_NS, running=12.0, waiting=5.0) for engine in engines},
    )


def _diagnosis(uuids: list[str], models: int) -> DiagnosisSnapshot:
    one = diagnosis_snapshot()
    [engine] = one.engines.values()
    device = one.devices[0]
    return DiagnosisSnapshot(
        devices=tuple(replace(device, uuid=uuid, gpu=gpu) for gpu, uuid in enumerate(uuids)),
        engines={f"vllm-{m}": replace(engine, models=(f"org/model-{m}",)) for m in range(models)},
        wasted_joules={(uuid, cause): 10.0 for uuid in uuids for cause in WasteCause},
    )
