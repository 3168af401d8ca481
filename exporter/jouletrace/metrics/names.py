"""The one list of metrics: names, types, labels and meaning.

Collectors, dashboards, alert rules and the reference page are made from these constants, so that a name is
written once. Names are frozen once released.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from jouletrace.diagnosis.causes import Cause
from jouletrace.diagnosis.drivers import Driver
from jouletrace.diagnosis.verdicts import Flag, Verdict
from jouletrace.diagnosis.waste import WasteCause
from jouletrace.engines.otlp.tee import Drop
from jouletrace.gpu.readings import Pipe, Sensor, ThrottleReason
from jouletrace.requests.account import Phase
from jouletrace.requests.records import Status, Unit

UNITS = ("joules", "watts", "seconds", "bytes", "hertz", "celsius", "ratio")
"""Base units, as OpenMetrics and the Prometheus naming guide have them."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family."""

    name: str
    """As it is queried: counters end in `_total`; a summary is queried with `_count` and `_sum`, a histogram also
    with `_bucket`."""
    type: Literal["counter", "gauge", "summary", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    """The values that the last label can have, where they are a closed set. Nothing else is ever exported."""

    @property
    def unit(self) -> str:
        """Return the base unit that the name ends in, or an empty string."""
        word = self.name.removesuffix("_total").rpartition("_")[2]
        return word if word in UNITS else ""


_DEVICE = ("gpu", "uuid")

GPU_INFO = Metric(
    "jouletrace_gpu_info",
    "gauge",
    "What is fixed about a GPU, as labels; the value is always 1. energy_source is the sensor that its "
    "energy comes from (power_ring, energy_counter, power_polling, power_average) and empty while there "
    "is none. Join it to other metrics on (gpu, uuid).",
    (
        "gpu",
        "uuid",
        "name",
        "architecture",
        "driver_version",
        "pci_bus_id",
        "energy_source",
        "mig",
    ),
)
GPU_ENERGY_JOULES = Metric(
    "jouletrace_gpu_energy_joules_total",
    "counter",
    "Energy that the GPU has used since jouletrace began to watch it, in joules, from its best sensor. "
    "rate() of this is the true mean power in watts over the range, whatever happened between two "
    "scrapes. Sampled in the background; jouletrace_sample_age_seconds says how old it is.",
    _DEVICE,
)
GPU_HARDWARE_ENERGY_JOULES = Metric(
    "jouletrace_gpu_hardware_energy_joules_total",
    "counter",
    "The energy counter of the hardware itself, in joules since the driver was loaded. It is read about "
    "every 10 seconds to check jouletrace_gpu_energy_joules_total against; use that one for rates.",
    _DEVICE,
)
GPU_POWER_WATTS = Metric(
    "jouletrace_gpu_power_watts",
    "gauge",
    "Newest power value of the sensor in use, in watts. It is one sample of a fast signal: for the mean "
    "power of a range take rate() of jouletrace_gpu_energy_joules_total.",
    _DEVICE,
)
GPU_POWER_MAX_WATTS = Metric(
    "jouletrace_gpu_power_max_watts",
    "gauge",
    "Highest power value of the sensor in use in the last minute, in watts. A peak shorter than the "
    "sensor's interval is averaged within it.",
    _DEVICE,
)
GPU_MEMORY_POWER_WATTS = Metric(
    "jouletrace_gpu_memory_power_watts",
    "gauge",
    "Power of the GPU's memory as the driver averages it over one second, in watts. It is a part of the "
    "GPU's power, not an addition to it.",
    _DEVICE,
)
GPU_POWER_LIMIT_WATTS = Metric(
    "jouletrace_gpu_power_limit_watts",
    "gauge",
    "Power limit that the driver enforces, in watts.",
    _DEVICE,
)
GPU_IDLE_POWER_WATTS = Metric(
    "jouletrace_gpu_idle_power_watts",
    "gauge",
    "Power that this GPU was learnt to draw without work, in watts: bare while no process holds a context "
    "on it, parked while one does. Absent until a quiet time has been seen.",
    (*_DEVICE, "kind"),
    ("bare", "parked"),
)
GPU_DRAM_BANDWIDTH_RATIO = Metric(
    "jouletrace_gpu_dram_bandwidth_ratio",
    "gauge",
    "Part of the theoretical memory bandwidth in use, 0 to 1, as the mean of the newest hardware counter "
    "interval (GPM, Hopper and later). About 0.9 is the practical ceiling.",
    _DEVICE,
)
GPU_DRAM_BYTES = Metric(
    "jouletrace_gpu_dram_bytes_total",
    "counter",
    "Bytes read from and written to the GPU's memory since jouletrace began to watch it: bandwidth ratio "
    "times theoretical peak, integrated over time (GPM, Hopper and later).",
    _DEVICE,
)
GPU_BUSY_SECONDS = Metric(
    "jouletrace_gpu_busy_seconds_total",
    "counter",
    "Busy share of each part of the GPU, integrated over time, in seconds; rate() is the mean share of "
    "cycles in which the part was busy, 0 to 1 (GPM, Hopper and later). For pipe sm_occupancy the share "
    "is of warps that were resident. A tensor share of 0.5 is a high load.",
    (*_DEVICE, "pipe"),
    tuple(Pipe),
)
GPU_PCIE_BYTES = Metric(
    "jouletrace_gpu_pcie_bytes_total",
    "counter",
    "Bytes over PCIe as the GPU sees it, integrated from the mean rates of the hardware counters (GPM, "
    "Hopper and later). transmit leaves the GPU.",
    (*_DEVICE, "direction"),
    ("transmit", "receive"),
)
GPU_NVLINK_BYTES = Metric(
    "jouletrace_gpu_nvlink_bytes_total",
    "counter",
    "Bytes over all NVLinks as the GPU sees it, integrated from the mean rates of the hardware counters "
    "(GPM, Hopper and later). transmit leaves the GPU.",
    (*_DEVICE, "direction"),
    ("transmit", "receive"),
)
GPU_CLOCK_HERTZ = Metric(
    "jouletrace_gpu_clock_hertz",
    "gauge",
    "Clock of a domain at the last look, in hertz.",
    (*_DEVICE, "domain"),
    ("sm", "memory", "graphics", "video"),
)
GPU_THROTTLED_SECONDS = Metric(
    "jouletrace_gpu_throttled_seconds_total",
    "counter",
    "Time for which the clocks were held down, in seconds since the driver was loaded, by the driver's "
    "own count. Several reasons can hold at once, so do not add them up. thermal stands for both thermal "
    "reasons on drivers that do not tell them apart. The hardware's reasons are up to 30 s late.",
    (*_DEVICE, "reason"),
    tuple(ThrottleReason),
)
GPU_MEMORY_USED_BYTES = Metric(
    "jouletrace_gpu_memory_used_bytes",
    "gauge",
    "GPU memory that is allocated, in bytes. An inference engine reserves its cache at start, so this "
    "does not say how much of it holds data.",
    _DEVICE,
)
GPU_MEMORY_TOTAL_BYTES = Metric(
    "jouletrace_gpu_memory_total_bytes",
    "gauge",
    "GPU memory that there is, in bytes.",
    _DEVICE,
)
GPU_TEMPERATURE_CELSIUS = Metric(
    "jouletrace_gpu_temperature_celsius",
    "gauge",
    "Temperature of a sensor at the last look, in degrees Celsius.",
    (*_DEVICE, "sensor"),
    ("gpu", "memory"),
)
GPU_UTILIZATION_RATIO = Metric(
    "jouletrace_gpu_utilization_ratio",
    "gauge",
    "Misleading as a measure of load: NVML's duty cycle, the part of the time in which any kernel ran "
    "(kind gpu) or any memory access was under way (kind memory), 0 to 1. It reads 1 during pure copies "
    "and with a single busy SM. Use jouletrace_gpu_busy_seconds_total and "
    "jouletrace_gpu_dram_bandwidth_ratio instead.",
    (*_DEVICE, "kind"),
    ("gpu", "memory"),
)
GPU_XID_ERRORS = Metric(
    "jouletrace_gpu_xid_errors_total",
    "counter",
    "Critical errors that the driver reported since jouletrace began to watch the GPU, by Xid number of "
    "NVIDIA's catalogue. The first 32 numbers seen have a series of their own, the rest count as other.",
    (*_DEVICE, "xid"),
)
GPU_ECC_ERRORS = Metric(
    "jouletrace_gpu_ecc_errors_total",
    "counter",
    "Memory errors that ECC found since the driver was loaded. An uncorrected one killed the work that met it.",
    (*_DEVICE, "kind"),
    ("corrected", "uncorrected"),
)

DEVICE = (
    GPU_INFO,
    GPU_ENERGY_JOULES,
    GPU_HARDWARE_ENERGY_JOULES,
    GPU_POWER_WATTS,
    GPU_POWER_MAX_WATTS,
    GPU_MEMORY_POWER_WATTS,
    GPU_POWER_LIMIT_WATTS,
    GPU_IDLE_POWER_WATTS,
    GPU_DRAM_BANDWIDTH_RATIO,
    GPU_DRAM_BYTES,
    GPU_BUSY_SECONDS,
    GPU_PCIE_BYTES,
    GPU_NVLINK_BYTES,
    GPU_UTILIZATION_RATIO,
    GPU_CLOCK_HERTZ,
    GPU_THROTTLED_SECONDS,
    GPU_TEMPERATURE_CELSIUS,
    GPU_MEMORY_USED_BYTES,
    GPU_MEMORY_TOTAL_BYTES,
    GPU_XID_ERRORS,
    GPU_ECC_ERRORS,
)

ATTRIBUTED_ENERGY_JOULES = Metric(
    "jouletrace_attributed_energy_joules_total",
    "counter",
    "Energy that requests have used, in joules, without any idle energy (usage basis). Summed over everything, "
    "with jouletrace_idle_energy_joules_total and jouletrace_unattributed_energy_joules_total, it is the energy of "
    "the GPUs, up to what running requests have not been given yet. Do not add it to "
    "jouletrace_allocated_energy_joules_total, which contains it.",
    ("model", "tenant", "engine", "phase"),
    tuple(Phase),
)
ALLOCATED_ENERGY_JOULES = Metric(
    "jouletrace_allocated_energy_joules_total",
    "counter",
    "Energy of requests in joules with the idle energy of the GPUs that their engine holds spread over them "
    "(allocated basis): what a bill should show.",
    ("model", "tenant", "engine"),
)
IDLE_ENERGY_JOULES = Metric(
    "jouletrace_idle_energy_joules_total",
    "counter",
    "Energy used while no request ran, in joules: bare while no process held a context on the GPU, parked while an "
    "engine held one and waited for work.",
    (*_DEVICE, "kind"),
    ("bare", "parked"),
)
UNATTRIBUTED_ENERGY_JOULES = Metric(
    "jouletrace_unattributed_energy_joules_total",
    "counter",
    "Energy of work that no request accounts for, in joules: other programs, engines that send no records, records "
    "that were lost. It is never spread over those who do send theirs.",
    _DEVICE,
)
REQUEST_ENERGY_JOULES = Metric(
    "jouletrace_request_energy_joules",
    "histogram",
    "Energy of a settled request in joules (usage basis). In OpenMetrics each bucket carries the trace_id of a "
    "request that fell into it.",
    ("model",),
)
REQUESTS = Metric(
    "jouletrace_requests_total",
    "counter",
    "Requests that have ended, by how.",
    ("model", "tenant", "status"),
    (Status.FINISHED, Status.CANCELLED, Status.FAILED),
)
REQUESTS_IN_FLIGHT = Metric(
    "jouletrace_requests_in_flight",
    "gauge",
    "Requests that have begun and not ended, as far as their records say.",
    ("engine",),
)
TOKENS = Metric(
    "jouletrace_tokens_total",
    "counter",
    "Tokens of ended requests. input contains cached_input, the part that a prefix cache saved from being computed. "
    "Joules per token: rate of energy over rate of this.",
    ("model", "tenant", "direction"),
    ("input", "cached_input", "output"),
)
UNITS_MADE = Metric(
    "jouletrace_units_total",
    "counter",
    "What ended requests made that is not tokens.",
    ("model", "tenant", "unit"),
    tuple(Unit),
)
ATTRIBUTION_COVERAGE_RATIO = Metric(
    "jouletrace_attribution_coverage_ratio",
    "gauge",
    "Part of the engine's busy energy over the last minutes that requests account for, 0 to 1. Well under 1 means "
    "that records are missing; jouletrace_events_dropped_total says whether they came in.",
    ("engine",),
)
ACCOUNT_AGE_SECONDS = Metric(
    "jouletrace_account_age_seconds",
    "gauge",
    "Time since the moment up to which the energy of every GPU is in the account of requests; absent before the first "
    "settling. 1 to 6 s is normal, up to a minute where a feed tells of requests only once they are over. It grows "
    "while settling fails (joules, requests and tokens then stand still) or a GPU gives no readings.",
)
EVENTS = Metric(
    "jouletrace_events_total",
    "counter",
    "Records of engines, steps and requests that came in, by the way they came, since the start of the process.",
    ("source",),
)
EVENTS_DROPPED = Metric(
    "jouletrace_events_dropped_total",
    "counter",
    "Those of jouletrace_events_total that were not taken, by reason. duplicate is harmless; each other reason "
    "lowers the coverage.",
    ("source", "reason"),
)
OTLP_EXPORTS_FORWARDED = Metric(
    "jouletrace_otlp_exports_forwarded_total",
    "counter",
    "Exports of spans that the collector at otlp.forward_url has taken. Absent without one, as the next two.",
)
OTLP_EXPORTS_DROPPED = Metric(
    "jouletrace_otlp_exports_dropped_total",
    "counter",
    "Exports of spans that were not passed on. buffer_full: the collector was away for too long; refused: it does not "
    "want them; loop: otlp.forward_url leads back here; stopped: it was away when jouletrace stopped.",
    ("reason",),
    tuple(Drop),
)
OTLP_FORWARD_BUFFER_BYTES = Metric(
    "jouletrace_otlp_forward_buffer_bytes",
    "gauge",
    "Spans that wait for the collector, in bytes; further ones are dropped at otlp.forward_buffer_mebibytes.",
)

LEDGER = (
    ATTRIBUTED_ENERGY_JOULES,
    ALLOCATED_ENERGY_JOULES,
    IDLE_ENERGY_JOULES,
    UNATTRIBUTED_ENERGY_JOULES,
    REQUEST_ENERGY_JOULES,
    REQUESTS,
    REQUESTS_IN_FLIGHT,
    TOKENS,
    UNITS_MADE,
    ATTRIBUTION_COVERAGE_RATIO,
    ACCOUNT_AGE_SECONDS,
    EVENTS,
    EVENTS_DROPPED,
    OTLP_EXPORTS_FORWARDED,
    OTLP_EXPORTS_DROPPED,
    OTLP_FORWARD_BUFFER_BYTES,
)

DRIVER_ENERGY_JOULES = Metric(
    "jouletrace_driver_energy_joules_total",
    "counter",
    "Energy of the GPU in joules by what it went to: static (paid whatever runs), memory traffic, tensor pipes, other "
    "compute, links, and unexplained, the part that the model of the GPU does not account for. Sums to the energy of "
    "the GPU. A model fitted to measurements, not a measurement of each part.",
    (*_DEVICE, "driver"),
    tuple(Driver),
)
DIAGNOSIS_VERDICT = Metric(
    "jouletrace_diagnosis_verdict",
    "gauge",
    "1 for what limits the GPU now, 0 for the rest. underutilized: active under half of the time. transfer_bound: the "
    "links are busy and the SMs are not. balanced: nothing stands out, or nobody can tell.",
    (*_DEVICE, "verdict"),
    tuple(Verdict),
)
DIAGNOSIS_CONFIDENCE_RATIO = Metric(
    "jouletrace_diagnosis_confidence_ratio",
    "gauge",
    "How far to trust the verdict, 0 to 1: distance from its thresholds, and which readings it had. Without GPM "
    "(before Hopper) bandwidth is inferred and this is low.",
    _DEVICE,
)
DIAGNOSIS_SECONDS = Metric(
    "jouletrace_diagnosis_seconds_total",
    "counter",
    "Time for which each verdict held, in seconds. Counted once the verdict is confirmed, up to six seconds later.",
    (*_DEVICE, "verdict"),
    tuple(Verdict),
)
DIAGNOSIS_ENERGY_JOULES = Metric(
    "jouletrace_diagnosis_energy_joules_total",
    "counter",
    "Energy of the GPU in joules while each verdict held. Sums to the energy of the GPU up to a few seconds ago: it is "
    "counted once the verdict is confirmed.",
    (*_DEVICE, "verdict"),
    tuple(Verdict),
)
DIAGNOSIS_FLAG_SECONDS = Metric(
    "jouletrace_diagnosis_flag_seconds_total",
    "counter",
    "Time for which each flag was up, in seconds; several can be at once. utilization_misleading: NVML's utilization "
    "says busy while the SMs are not. fp32_pipe: heavy FP32 work while the tensor cores idle.",
    (*_DEVICE, "flag"),
    tuple(Flag),
)
_ENGINE = ("engine", "model")
ENGINE_CAUSE = Metric(
    "jouletrace_engine_cause",
    "gauge",
    "1 for why the engine's joules per token are above their best, 0 for the rest. /v1/diagnosis has the numbers and "
    "the advice.",
    (*_ENGINE, "cause"),
    tuple(Cause),
)
ENGINE_UNIT_ENERGY_JOULES = Metric(
    "jouletrace_engine_unit_energy_joules",
    "gauge",
    "Joules per unit that the engine made over the last half minute (up to ten minutes without step records), by part: "
    "idle of the GPUs that it holds, the fixed part of a step, contexts read (kv), decode, prefill, between_steps "
    "(requests active, no step running), or busy where no step-energy law is known. Sums to joules per unit; unit is "
    "token (output tokens), image, frame, ... Work that no request or step tells of is not in it.",
    (*_ENGINE, "unit", "part"),
    ("idle", "fixed", "kv", "decode", "prefill", "between_steps", "busy"),
)
ENGINE_REFERENCE_UNIT_ENERGY_JOULES = Metric(
    "jouletrace_engine_reference_unit_energy_joules",
    "gauge",
    "Joules per output token of the same model at the same batch as the ML.ENERGY benchmark measured them, on the GPU "
    "of the label gpu_model: another GPU than this one, most likely. Absent where the model or the batch was not "
    "measured.",
    (*_ENGINE, "gpu_model", "gpu_count"),
)
ENGINE_STEP_FIXED_JOULES = Metric(
    "jouletrace_engine_step_fixed_joules",
    "gauge",
    "Fixed part a of the step-energy law a + b * batch: joules of a decode step however many sequences take part. "
    "Absent while the batch has not varied enough to tell and no calibrated law was given.",
    _ENGINE,
)
ENGINE_STEP_MARGINAL_JOULES = Metric(
    "jouletrace_engine_step_marginal_joules",
    "gauge",
    "Marginal part b of the step-energy law a + b * batch: joules of one more sequence in a step. a / b is the "
    "batch at which half of a step's energy is fixed.",
    _ENGINE,
)
ENGINE_BATCH_SEQUENCES = Metric(
    "jouletrace_engine_batch_sequences",
    "gauge",
    "Mean number of sequences in a decode step over the last half minute, or of active requests over up to ten minutes "
    "where the engine reports no steps.",
    _ENGINE,
)
ENGINE_QUEUE_REQUESTS = Metric(
    "jouletrace_engine_queue_requests",
    "gauge",
    "Requests in the engine as it last said itself: running and waiting.",
    ("engine", "state"),
    ("running", "waiting"),
)
WASTED_ENERGY_JOULES = Metric(
    "jouletrace_wasted_energy_joules_total",
    "counter",
    "Energy in joules that a named cause burned and somebody could have saved. parked: held without any request for "
    "longer than diagnosis.parked_after, less what the GPU draws when nobody holds it, as seen once or as known of its "
    "model; not counted where neither is. throttling is an upper bound, the other causes are lower ones. What cannot "
    "be shown to be avoidable is not in it.",
    (*_DEVICE, "cause"),
    tuple(WasteCause),
)

DIAGNOSIS = (
    DRIVER_ENERGY_JOULES,
    DIAGNOSIS_VERDICT,
    DIAGNOSIS_CONFIDENCE_RATIO,
    DIAGNOSIS_SECONDS,
    DIAGNOSIS_ENERGY_JOULES,
    DIAGNOSIS_FLAG_SECONDS,
    ENGINE_CAUSE,
    ENGINE_UNIT_ENERGY_JOULES,
    ENGINE_REFERENCE_UNIT_ENERGY_JOULES,
    ENGINE_STEP_FIXED_JOULES,
    ENGINE_STEP_MARGINAL_JOULES,
    ENGINE_BATCH_SEQUENCES,
    ENGINE_QUEUE_REQUESTS,
    WASTED_ENERGY_JOULES,
)

GPU_PROCESS_INFO = Metric(
    "jouletrace_gpu_process_info",
    "gauge",
    "A workload with processes on the GPU, as labels; the value is always 1. What does not apply or is not known is "
    "empty: pod and namespace stay empty beside a pod_uid until the name is certain. container is the name in a pod, "
    "container_id the first 12 digits. The first 64 workloads of a GPU have a series of their own, the rest is one "
    "with process_name other. Absent unless workloads.processes is on.",
    (
        *_DEVICE,
        "process_name",
        "namespace",
        "pod",
        "container",
        "pod_uid",
        "container_id",
        "unit",
        "slurm_job",
    ),
)
GPU_PROCESSES = Metric(
    "jouletrace_gpu_processes",
    "gauge",
    "Processes that hold a context on the GPU. Absent unless workloads.processes is on.",
    _DEVICE,
)
POD_ENERGY_JOULES = Metric(
    "jouletrace_pod_energy_joules_total",
    "counter",
    "Energy of the GPU in joules by the pod whose processes held it, idle energy included; where several do, by the SM "
    "time of their processes, which is a model. The row with empty names has what runs outside of pods, pods whose "
    "names are not known, and the time without any process. Summed over all rows it grows as "
    "jouletrace_gpu_energy_joules_total, up to 12 s later. A row goes a minute after its pod and begins at 0 if it "
    "returns. Beyond 64 pods at a time on a GPU the rest is other. Absent unless workloads.pods is on.",
    (*_DEVICE, "namespace", "pod", "container"),
)
KUBELET_ANSWER_AGE_SECONDS = Metric(
    "jouletrace_kubelet_answer_age_seconds",
    "gauge",
    "Time since the kubelet last said which pods hold which devices; it is asked when a pod comes that is not known, "
    "and every 30 s. Absent before its first answer and unless workloads.pods is on.",
)
KUBELET_ERRORS = Metric(
    "jouletrace_kubelet_errors_total",
    "counter",
    "Questions to the kubelet that it did not answer, by gRPC's name of the reason (UNAVAILABLE: nobody listens at "
    "workloads.pod_resources_socket).",
    ("code",),
)

WORKLOADS = (
    GPU_PROCESS_INFO,
    GPU_PROCESSES,
    POD_ENERGY_JOULES,
    KUBELET_ANSWER_AGE_SECONDS,
    KUBELET_ERRORS,
)

BUILD_INFO = Metric(
    "jouletrace_build_info",
    "gauge",
    "Versions of this jouletrace and of the Python that runs it, as labels; the value is always 1.",
    ("version", "python_version"),
)
UP = Metric(
    "jouletrace_up",
    "gauge",
    "1 while the source has devices, none of them is lost and the sampler comes back from its calls in "
    "time, else 0. It says whether reading works; jouletrace_sample_age_seconds says how fresh each "
    "device is.",
    ("source",),
)
SAMPLE_AGE_SECONDS = Metric(
    "jouletrace_sample_age_seconds",
    "gauge",
    "Time since the end of the newest energy sample, in seconds. Samples are taken in the background and "
    "never by a scrape; about one second is normal. It grows while a device cannot be read.",
    _DEVICE,
)
SENSOR_UPDATE_INTERVAL_SECONDS = Metric(
    "jouletrace_sensor_update_interval_seconds",
    "gauge",
    "Interval at which a sensor of the GPU gives a new value, in seconds, as measured here and not as documented.",
    ("gpu", "sensor"),
    tuple(Sensor),
)
ENERGY_AGREEMENT_RATIO = Metric(
    "jouletrace_energy_agreement_ratio",
    "gauge",
    "Energy measured by jouletrace over energy by the hardware counter for the same span; healthy within "
    "3 % of 1. Absent while a GPU has no counter to compare with.",
    _DEVICE,
)
ENERGY_GAP_SECONDS = Metric(
    "jouletrace_energy_gap_seconds_total",
    "counter",
    "Time for which the power sensor gave nothing, in seconds: its energy was taken from the hardware "
    "counter, or is missing where there is none.",
    _DEVICE,
)
REJECTED_SAMPLES = Metric(
    "jouletrace_rejected_samples_total",
    "counter",
    "Sensor values that were thrown away because they cannot be true: under 0 or over twice the power limit.",
    _DEVICE,
)
HARDWARE_ENERGY_RESETS = Metric(
    "jouletrace_hardware_energy_resets_total",
    "counter",
    "Times that the hardware energy counter went backwards. jouletrace_gpu_energy_joules_total goes on regardless.",
    _DEVICE,
)
DRIVER_CALL_SECONDS = Metric(
    "jouletrace_driver_call_seconds",
    "summary",
    "Wall time spent in calls of the GPU driver, in seconds, and their number, by function.",
    ("call",),
)
DRIVER_ERRORS = Metric(
    "jouletrace_driver_errors_total",
    "counter",
    "Calls of the GPU driver that failed, by function and by name of the return code. The first 256 pairs "
    "seen have a series of their own, the rest count as other.",
    ("call", "code"),
)
SAMPLER_CPU_SECONDS = Metric(
    "jouletrace_sampler_cpu_seconds_total",
    "counter",
    "CPU time of the sampler thread in seconds, driver calls included; rate() is the part of one core.",
)
SAMPLER_STRETCH_RATIO = Metric(
    "jouletrace_sampler_stretch_ratio",
    "gauge",
    "Factor by which the sampler has lengthened its intervals to stay within its CPU budget; 1 means as configured.",
)
FILE_RELOAD_SUCCESS = Metric(
    "jouletrace_file_reload_success",
    "gauge",
    "1 when the files of this configuration key, which are re-read when they change, are in force as they are now; 0 "
    "when they are wrong and what they said before stays in force; the log has the cause.",
    ("key",),
    ("web.config.file", "ingest.token_file", "engines.targets"),
)
COLLECTOR_SUCCESS = Metric(
    "jouletrace_collector_success",
    "gauge",
    "1 when this part of the page could be made, 0 when it failed and its metrics are missing; the log has the cause.",
    ("collector",),
)

SELF = (
    BUILD_INFO,
    UP,
    SAMPLE_AGE_SECONDS,
    SENSOR_UPDATE_INTERVAL_SECONDS,
    ENERGY_AGREEMENT_RATIO,
    ENERGY_GAP_SECONDS,
    REJECTED_SAMPLES,
    HARDWARE_ENERGY_RESETS,
    DRIVER_CALL_SECONDS,
    DRIVER_ERRORS,
    SAMPLER_CPU_SECONDS,
    SAMPLER_STRETCH_RATIO,
    FILE_RELOAD_SUCCESS,
    COLLECTOR_SUCCESS,
)

ALL = (*DEVICE, *LEDGER, *DIAGNOSIS, *WORKLOADS, *SELF)

_PREAMBLE = """\
# Metrics

<!-- Generated from exporter/jouletrace/metrics/names.py. Change it there. -->

Served at `/metrics` as Prometheus text 0.0.4 or, when the scraper accepts it, OpenMetrics 1.0.0.
`?name[]=NAME` (repeatable) restricts the answer to the named series.

## How to read them

- **Joules are counters, and `rate()` of joules is watts.** `rate(jouletrace_gpu_energy_joules_total[5m])`
  is the true mean power of those five minutes at any scrape interval, because every power sample in between
  has been integrated. The same holds for bytes, busy seconds and throttled seconds. Gauges are a
  convenience beside them.
- **Sampling is done in the background.** A scrape formats the newest snapshot and never waits for the
  driver. Samples carry no timestamps; `jouletrace_sample_age_seconds` says how old the energy is.
- **A failed read is absent**: never 0, and never the value before. A sensor that a GPU lacks has no series.
- **While a GPU is lost, or the sampler hangs in a driver call**, every gauge of the GPU and every counter
  that the driver keeps (the hardware energy counter, throttled time, ECC errors) disappears. The counters
  that jouletrace keeps itself (energy, bytes, busy seconds, Xid errors, gaps) stay where they are, so that
  `increase()` over the outage is right; `jouletrace_gpu_info` stays with an empty `energy_source`,
  `jouletrace_sample_age_seconds` grows and `jouletrace_up` is 0.
- **A counter never goes down** while the process lives. After a restart it begins at 0 again, which
  `rate()` and `increase()` understand. Counters that the driver keeps begin again when the driver is
  loaded. The energy, requests, tokens and units under "Requests" go on where they were, until the machine is
  booted.
- `gpu` is the driver's index and can change with a reboot; `uuid` is the GPU itself. There is no host
  label: Prometheus adds `instance`.
- Label values are closed sets where the table lists them. No request, process or user id is ever a label.
"""

_PROCESS = """\
## The process

`process_cpu_seconds_total`, `process_resident_memory_bytes`, `process_virtual_memory_bytes`,
`process_start_time_seconds`, `process_open_fds` and `process_max_fds` have their usual meaning.
"""


def reference_markdown() -> str:
    """Return docs/metrics.md."""
    parts = [
        _PREAMBLE,
        _table("GPUs", DEVICE),
        _table("Requests", LEDGER),
        _table("Diagnosis", DIAGNOSIS),
        _table("Workloads", WORKLOADS),
        _table("The exporter itself", SELF),
        _PROCESS,
    ]
    return "\n".join(parts)


def _table(title: str, metrics: Iterable[Metric]) -> str:
    rows = [f"## {title}", "", "| metric | type | labels | meaning |", "|---|---|---|---|"]
    rows += [f"| `{m.name}` | {m.type} | {_labels(m)} | {m.help} |" for m in metrics]
    return "\n".join(rows) + "\n"


def _labels(metric: Metric) -> str:
    labels = [f"`{label}`" for label in metric.labels]
    if metric.values:
        labels[-1] += f" ({', '.join(metric.values)})"
    return ", ".join(labels)
