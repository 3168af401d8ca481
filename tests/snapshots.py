"""Snapshots that several tests look at."""

from dataclasses import replace

from jouletrace.diagnosis.causes import Cause, EngineDiagnosis
from jouletrace.diagnosis.drivers import Driver
from jouletrace.diagnosis.node import DeviceFinding, DiagnosisSnapshot, DriverSpan, EngineFinding
from jouletrace.diagnosis.reference import Measurement
from jouletrace.diagnosis.step_energy import Known, StepLaw
from jouletrace.diagnosis.verdicts import Flag, Judgement, Verdict
from jouletrace.diagnosis.waste import WasteCause
from jouletrace.gpu.readings import DeviceInfo, Pipe, Sensor, ThrottleReason
from jouletrace.requests.account import Buckets, EngineState, LedgerSnapshot, Phase
from jouletrace.requests.inbox import Events
from jouletrace.requests.records import Status, Unit
from jouletrace.snapshot import DeviceSnapshot, DeviceStatus, NodeSnapshot, SamplerSnapshot
from jouletrace.workloads.cgroups import Membership
from jouletrace.workloads.service import DeviceWorkloads, Workload, WorkloadSnapshot

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
        engine_states={"vllm-0": EngineState(NOW_NS, running=12.0, waiting=5.0)},
    )


def diagnosis_snapshot() -> DiagnosisSnapshot:
    """Return the diagnosis of the full device, of a lost one and of an engine whose model was measured elsewhere."""
    found = DeviceFinding(
        uuid=full_device(0).info.uuid,
        gpu=0,
        start_ns=NOW_NS - 2 * SECOND_NS,
        end_ns=NOW_NS - SECOND_NS,
        since_ns=NOW_NS - 60 * SECOND_NS,
        judgement=Judgement(
            Verdict.MEMORY_BOUND,
            (Flag.POWER_CAPPED,),
            0.95,
            {"dram_intensity_ratio": 0.61, "source": "gpm"},
            "memory_bound: while active, memory is at 61 % of its peak and the tensor pipe at 5 %.",
        ),
        watts=431.25,
        driver_watts=dict.fromkeys(Driver, 71.875),
        driver_confidence=1.0,
        driver_joules={driver: 1000.5 * (place + 1) for place, driver in enumerate(Driver)},
        recent=tuple(
            DriverSpan(
                NOW_NS - (ago + 1) * SECOND_NS, NOW_NS - ago * SECOND_NS, dict.fromkeys(Driver, 71.875 - ago / 8)
            )
            for ago in range(80, 0, -1)
        ),
        booked_ns=NOW_NS - SECOND_NS,
        verdict_seconds={verdict: 10.25 * (place + 1) for place, verdict in enumerate(Verdict)},
        verdict_joules={verdict: 4000.5 * (place + 1) for place, verdict in enumerate(Verdict)},
        flag_seconds={flag: 2.5 * (place + 1) for place, flag in enumerate(Flag)},
    )
    engine = EngineFinding(
        diagnosis=EngineDiagnosis(
            engine_id="vllm-0",
            cause=Cause.SMALL_BATCH,
            confidence=0.9,
            advice="Batch 8 is under B* = 48: send it more of the traffic.",
            joules_per_unit=0.5125,
            units_per_joule=1 / 0.5125,
            decomposition={
                part: 0.0625 * (place + 1)
                for place, part in enumerate(("idle", "fixed", "kv", "decode", "prefill", "between_steps", "busy"))
            },
            batch=8.0,
            half_fixed_batch=47.5,
        ),
        law=StepLaw(Known.FITTED, 3.16, 0.0665, batch_low=4.0, batch_high=64.0, residual=0.01, samples=40),
        models=("llama-3.1-8b",),
        devices=(found.uuid,),
        start_ns=NOW_NS - 33 * SECOND_NS,
        end_ns=NOW_NS - 3 * SECOND_NS,
        reference=Measurement(
            model_id="meta-llama/Llama-3.1-8B-Instruct",
            task="lm-arena-chat",
            gpu_model="H100",
            num_gpus=1,
            weight_precision="bfloat16",
            batch=8.0,
            nearest_batch=8.0,
            joules_per_token=0.455,
            batch_low=8.0,
            batch_high=512.0,
            half_fixed_batch=48.0,
        ),
    )
    lost = replace(found, uuid=lost_device(1).info.uuid, gpu=1)
    return DiagnosisSnapshot(
        devices=(found, lost),
        engines={"vllm-0": engine},
        wasted_joules={(found.uuid, WasteCause.PARKED): 12_345.5},
    )


def events() -> Events:
    """Return counts of records, some of them dropped."""
    return Events(
        {"http": 1000, "datagram": 50},
        {("http", "invalid"): 3, ("http", "duplicate"): 2, ("datagram", "queue_full"): 5},
    )


def workload_snapshot() -> WorkloadSnapshot:
    """Return who is on the full device: a pod, one without a name, a SLURM job; a lost device had the pod as well."""
    uid, unnamed = "6513270e-269e-4d37-b2a7-4de452e6b438", "736506ec-ae7c-4f09-bddf-cbc9f3308ce5"
    row = ("team-a", "llm-0", "vllm")
    on = (
        Workload("VLLM::EngineCor", *row, Membership("123b1612dd27" + "0" * 52, uid)),
        Workload("python3", container="main", home=Membership("c94dbca3a0aa" + "0" * 52, unnamed)),
        Workload("torchrun", home=Membership(slurm_job="48213")),
    )
    full, lost = full_device(0).info.uuid, lost_device(1).info.uuid
    return WorkloadSnapshot(
        devices={full: DeviceWorkloads(4, on), lost: DeviceWorkloads(1, on[:1])},
        pod_joules={full: {("", "", ""): 23_456.5, row: 100_000.25}, lost: {row: 5000.5}},
        kubelet_answer_ns=NOW_NS - 12 * SECOND_NS,
        kubelet_errors={"UNAVAILABLE": 3, "DEADLINE_EXCEEDED": 1},
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
