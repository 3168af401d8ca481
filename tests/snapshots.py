"""Snapshots that several tests look at."""

from jouletrace.gpu.readings import DeviceInfo, Pipe, Sensor, ThrottleReason
from jouletrace.requests.account import Buckets, LedgerSnapshot, Phase
from jouletrace.requests.inbox import Events
from jouletrace.requests.records import Status, Unit
from jouletrace.snapshot import DeviceSnapshot, DeviceStatus, NodeSnapshot, SamplerSnapshot

NOW_NS = 1_795_373_000_000_000_000
SECOND_NS = 1_000_000_000


def full_device(gpu: int = 0) -> DeviceSnapshot:
    """Return a device that has everything an H200 has."""
    return DeviceSnapshot(
        info=DeviceInfo(
            uuid=f"GPU-3b7c1f0e-5d1a-4c52-9d2b-00000000000{gpu}",
            gpu=gpu,
            name="NVIDIA H200",
            driver_version="580.159.04",
            architecture="hopper",
            pci_bus_id=f"00000000:1{gpu}:00.0",
            memory_total_bytes=150_754_820_096,
            power_limit_watts=700.0,
        ),
        status=DeviceStatus.OK,
        energy_source="power_ring",
        energy_joules=123456.789,
        timeline_end_ns=NOW_NS - 3 * SECOND_NS // 4,
        counter_joules=2232936.125,
        agreement_ratio=1.0002,
        power_watts=431.25,
        power_max_watts=699.5,
        memory_power_watts=60.5,
        power_limit_watts=700.0,
        idle_watts={"bare": 79.25, "parked": 121.5},
        gap_seconds=0.5,
        rejected_samples=2,
        counter_resets=1,
        sensor_intervals={
            Sensor.POWER_RING: 0.02,
            Sensor.ENERGY_COUNTER: 0.1,
            Sensor.POWER_INSTANT: 0.1,
            Sensor.POWER_AVERAGE: 0.02,
        },
        dram_bandwidth_ratio=0.625,
        dram_bytes=1.5e15,
        busy_seconds={pipe: 10.0 + place for place, pipe in enumerate(Pipe)},
        pcie_bytes={"transmit": 1e9, "receive": 2e9},
        nvlink_bytes={"transmit": 3e9, "receive": 4e9},
        clock_hertz={"sm": 1.98e9, "memory": 3.201e9, "graphics": 1.98e9, "video": 1.545e9},
        event_reasons=4,
        throttled_seconds={reason: 1.5 + place for place, reason in enumerate(ThrottleReason)},
        memory_used_bytes=140_000_000_000,
        temperature_celsius={"gpu": 51.0, "memory": 60.0},
        utilization_ratio={"gpu": 1.0, "memory": 0.25},
        xid_errors={31: 1, 79: 2},
        ecc_errors={"corrected": 3, "uncorrected": 0},
    )


def lost_device(gpu: int = 1) -> DeviceSnapshot:
    """Return an older card with a quarrelsome name, few sensors, and gone for 42 s."""
    return DeviceSnapshot(
        info=DeviceInfo(
            uuid=f"GPU-3b7c1f0e-5d1a-4c52-9d2b-00000000000{gpu}",
            gpu=gpu,
            name='Board "A\\B"\n<b>&',
            driver_version="535.104.05",
            memory_total_bytes=16_106_127_360,
            mig_enabled=True,
        ),
        status=DeviceStatus.LOST,
        problem="The GPU has fallen off the bus\n(Xid 79).",
        energy_source="power_average",
        energy_joules=5000.5,
        timeline_end_ns=NOW_NS - 42 * SECOND_NS,
        power_watts=33.0,
        power_limit_watts=70.0,
        clock_hertz={"sm": 1e9},
        temperature_celsius={"gpu": 40.0},
        xid_errors={79: 1},
    )


def ledger_snapshot() -> LedgerSnapshot:
    """Return an account of the full device and of one that has never been seen since the start."""
    uuid, unseen = full_device(0).info.uuid, "GPU-ffffffff-0000-0000-0000-000000000000"
    llm, image = ("llama-3.1-8b", "acme", "vllm-0"), ("flux", 'quote " tenant', "diffusers")
    return LedgerSnapshot(
        settled_ns=NOW_NS - SECOND_NS,
        device_joules={uuid: 100_000.0, unseen: 10.0},
        attributed_joules={
            (*llm, Phase.PREFILL): 20_000.5,
            (*llm, Phase.DECODE): 50_000.25,
            (*image, Phase.DECODE): 9_999.25,
        },
        allocated_joules={llm: 80_000.0, image: 11_000.0},
        idle_joules={(uuid, "bare"): 5_000.0, (uuid, "parked"): 7_500.0, (unseen, "bare"): 10.0},
        unattributed_joules={uuid: 7_000.0, unseen: 0.0},
        pending_joules={"vllm-0": 500.0},
        request_joules={
            "llama-3.1-8b": Buckets(
                (1.0, 10.0, 100.0),
                (2, 2, 5, 6),
                1234.5,
                (("0af7651916cd43dd8448eb211c80319c", 0.5, NOW_NS), None, ("f" * 32, 99.0, NOW_NS), None),
            )
        },
        requests={
            ("llama-3.1-8b", "acme", Status.FINISHED): 6,
            ("llama-3.1-8b", "acme", Status.CANCELLED): 1,
            ("flux", 'quote " tenant', Status.FAILED): 2,
        },
        in_flight={"vllm-0": 17, "diffusers": 0},
        tokens={
            ("llama-3.1-8b", "acme", "input"): 4096,
            ("llama-3.1-8b", "acme", "cached_input"): 1024,
            ("llama-3.1-8b", "acme", "output"): 512,
        },
        units={("flux", 'quote " tenant', unit): 3 + place for place, unit in enumerate(Unit)},
        coverage={"vllm-0": 0.985},
    )


def events() -> Events:
    """Return counts of records, some of them dropped."""
    return Events(
        {"http": 1000, "datagram": 50},
        {("http", "invalid"): 3, ("http", "duplicate"): 2, ("datagram", "queue_full"): 5},
    )


def sampler_snapshot() -> SamplerSnapshot:
    """Return a sampler that has worked for a while, with a failed call."""
    return SamplerSnapshot(
        cpu_seconds=1.25,
        stretch=1.5,
        call_seconds={"nvmlDeviceGetSamples": 0.75, "nvmlDeviceGetTotalEnergyConsumption": 0.5},
        call_count={"nvmlDeviceGetSamples": 300, "nvmlDeviceGetTotalEnergyConsumption": 30},
        call_errors={("nvmlDeviceGetTotalEnergyConsumption", "NVML_ERROR_GPU_IS_LOST"): 3},
    )


def node_snapshot(*devices: DeviceSnapshot) -> NodeSnapshot:
    """Return a node with these devices; without any, a full one and a lost one."""
    return NodeSnapshot(
        t_ns=NOW_NS,
        source="nvml",
        devices=devices or (full_device(0), lost_device(1)),
        sampler=sampler_snapshot(),
    )
