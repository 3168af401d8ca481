"""GPU: one GPU or a few; where the power goes, what limits it, and whether the energy can be trusted."""

from dashboards import panels as p
from dashboards.board import PAGES, Board, Row
from dashboards.panels import Column, Query
from dashboards.queries import RATE, SMOOTH, Scope, per, state, total
from dashboards.words import DRIVER_COLORS, FLAG_COLORS, THROTTLE_COLORS, VERDICT_COLORS
from jouletrace.diagnosis.verdicts import Verdict
from jouletrace.gpu.readings import Pipe
from jouletrace.metrics import names

NAME = "gpu"
SCOPE = Scope(("gpu",))
GPU = "{{instance}} GPU {{gpu}}"
BY_GPU = ("instance", "gpu")
HOLDER = {
    "instance": "Node",
    "gpu": "GPU",
    "process_name": "Program",
    "namespace": "Namespace",
    "pod": "Pod",
    "container": "Container",
    "unit": "Unit",
    "slurm_job": "SLURM job",
}
"""What a workload is known by, to headings."""
SHORTEST_SHARE = 0.02
"""Part of the time from which a flag counts as up: less is one evaluation in a minute."""


def board() -> Board:
    """Return the board."""
    return Board(
        name=NAME,
        title="GPU",
        description="Single GPUs: power against its limit, where the joules go, what limits the work, and faults.",
        scope=SCOPE,
        rows=(
            Row("Power", 8, _power()),
            Row("What limits it", 9, _limits()),
            Row("Load", 8, _load()),
            Row("Clocks, heat and throttling", 8, _clocks()),
            Row("Can the energy be trusted?", 7, _trust()),
            Row("Memory, links and faults", 7, _rest()),
            Row("Who holds it", 8, _holders()),
        ),
    )


def _power() -> tuple[p.Panel, ...]:
    return (
        p.timeline(
            "Power and its limit",
            "Mean power of each GPU, as the rate of its joules, and dashed the limit that the driver enforces.",
            p.WATTS,
            Query(total(SCOPE.rate(names.GPU_ENERGY_JOULES), *BY_GPU), GPU),
            Query(f"max({SCOPE.series(names.GPU_POWER_LIMIT_WATTS)})", "limit"),
            dashed=["^limit$"],
            colors={"limit": p.RED},
        ),
        p.timeline(
            "Drivers: what the power goes to",
            "Power of the selected GPUs by physical sink, from a model fitted to measurements. unexplained is what the"
            " model does not account for.",
            p.WATTS,
            Query(total(SCOPE.rate(names.DRIVER_ENERGY_JOULES), "driver"), "{{driver}}"),
            stacked=True,
            colors=DRIVER_COLORS,
        ),
        p.timeline(
            "Peaks",
            "Highest power sample of the last minute of each GPU: what a mean hides.",
            p.WATTS,
            Query(f"max by (instance, gpu) ({SCOPE.series(names.GPU_POWER_MAX_WATTS)})", GPU),
            width=8,
        ),
        p.timeline(
            "Power of the memory",
            "Part of the GPU's power that its memory draws, as the driver averages it over a second.",
            p.WATTS,
            Query(f"max by (instance, gpu) ({SCOPE.series(names.GPU_MEMORY_POWER_WATTS)})", GPU),
            width=8,
            empty="These GPUs do not say",
        ),
        p.rows(
            "Idle levels",
            "Power that each GPU was learnt to draw without work: bare while nobody holds it, parked while it is held.",
            {"instance": "Node", "gpu": "GPU"},
            Column("Bare", _idle_level("bare"), p.WATTS),
            Column("Parked", _idle_level("parked"), p.WATTS),
            width=8,
        ),
    )


def _idle_level(kind: str) -> str:
    series = SCOPE.series(names.GPU_IDLE_POWER_WATTS, f'kind="{kind}"')
    return f"max by (instance, gpu) ({series})"


def _limits() -> tuple[p.Panel, ...]:
    verdicts = [SCOPE.series(names.DIAGNOSIS_VERDICT, f'verdict="{verdict}"') for verdict in Verdict]
    # A query for each flag: joined in one, they would take six times as long.
    flags = [
        Query(f"({_flagged(flag)} > {SHORTEST_SHARE}) * 0 + {number}", f"{GPU} {flag}")
        for number, flag in enumerate(FLAG_COLORS, 1)
    ]
    return (
        p.states(
            "Verdict",
            f"What limits each GPU, second by second. [What the verdicts mean]({PAGES}/docs/diagnosis.md#verdicts).",
            VERDICT_COLORS,
            Query(state(verdicts, *BY_GPU), GPU),
        ),
        p.states(
            "Flags",
            "What is worth knowing beside the verdict; a row for each flag that was up, on any of the GPUs, in the time"
            " shown.",
            FLAG_COLORS,
            *flags,
            empty="No flag was up",
        ),
        p.timeline(
            "Energy by verdict",
            "Power while each verdict held, of the selected GPUs.",
            p.WATTS,
            Query(total(SCOPE.rate(names.DIAGNOSIS_ENERGY_JOULES), "verdict"), "{{verdict}}"),
            stacked=True,
            colors=VERDICT_COLORS,
        ),
        p.timeline(
            "Confidence of the verdict",
            "How far to trust the verdict: its distance from the thresholds, and which readings it had.",
            p.RATIO,
            Query(f"min by (instance, gpu) ({SCOPE.series(names.DIAGNOSIS_CONFIDENCE_RATIO)})", GPU),
            most=1,
        ),
    )


def _flagged(flag: str) -> str:
    """Return the part of the time that a flag was up."""
    series = SCOPE.rate(names.DIAGNOSIS_FLAG_SECONDS, f'flag="{flag}"')
    return f"max by (instance, gpu) ({series})"


def _load() -> tuple[p.Panel, ...]:
    def busy(pipe: Pipe) -> str:
        return f"avg by (instance, gpu) ({SCOPE.rate(names.GPU_BUSY_SECONDS, _pipe(pipe))})"

    bandwidth = f"avg_over_time({SCOPE.series(names.GPU_DRAM_BANDWIDTH_RATIO)}[{RATE}])"
    return (
        p.timeline(
            "Memory bandwidth",
            "Part of the theoretical bandwidth in use; about 0.9 is the practical ceiling.",
            p.RATIO,
            Query(f"avg by (instance, gpu) ({bandwidth})", GPU),
            width=8,
            most=1,
            steps=((None, "transparent"), (0.9, p.RED)),
            empty="No hardware counters (GPM: Hopper and later)",
        ),
        p.timeline(
            "Tensor pipes",
            "Part of the cycles in which the tensor pipes were busy; 0.5 is a high load.",
            p.RATIO,
            Query(busy(Pipe.TENSOR), GPU),
            width=8,
            most=1,
            empty="No hardware counters (GPM: Hopper and later)",
        ),
        p.scatter(
            "Bandwidth against compute",
            "Each point is a moment of the selected GPUs together: far to the right they compute, high up they wait for"
            " memory, near the corner they do little.",
            (("tensor pipes busy", p.RATIO), ("memory bandwidth in use", p.RATIO)),
            [
                Query(f"avg({SCOPE.rate(names.GPU_BUSY_SECONDS, _pipe(Pipe.TENSOR))})", "tensor"),
                Query(f"avg({bandwidth})", "bandwidth"),
            ],
            {"selected GPUs": ("tensor", "bandwidth", p.BLUE)},
            width=8,
            empty="No hardware counters (GPM: Hopper and later)",
        ),
        p.timeline(
            "Busy share of each part",
            "Mean over the selected GPUs of the time in which each part was busy; for sm_occupancy, of the warps"
            " that were resident.",
            p.RATIO,
            Query(f"avg by (pipe) ({SCOPE.rate(names.GPU_BUSY_SECONDS)})", "{{pipe}}"),
            most=1,
            empty="No hardware counters (GPM: Hopper and later)",
        ),
        p.timeline(
            "NVML's utilization against busy SMs",
            "NVML's utilization says that any kernel ran, SMs that work was done: a wide gap misleads.",
            p.RATIO,
            Query(f"avg({SCOPE.series(names.GPU_UTILIZATION_RATIO, _GPU_KIND)})", "NVML utilization"),
            Query(f"avg({SCOPE.rate(names.GPU_BUSY_SECONDS, _pipe(Pipe.SM))})", "SMs busy"),
            most=1,
            colors={"NVML utilization": p.GREY, "SMs busy": p.GREEN},
        ),
    )


_GPU_KIND = 'kind="gpu"'


def _pipe(pipe: Pipe) -> str:
    return f'pipe="{pipe}"'


def _clocks() -> tuple[p.Panel, ...]:
    return (
        p.timeline(
            "SM clock",
            "Clock of the SMs at the last look.",
            p.HERTZ,
            Query(f"max by (instance, gpu) ({SCOPE.series(names.GPU_CLOCK_HERTZ, _SM_DOMAIN)})", GPU),
        ),
        p.timeline(
            "Throttling",
            "Part of the time in which the clocks were held down, by reason, of the most affected GPU. Reasons overlap."
            " sw_power_cap is normal under full load.",
            p.RATIO,
            Query(f"max by (reason) ({SCOPE.rate(names.GPU_THROTTLED_SECONDS)})", "{{reason}}"),
            most=1,
            colors=THROTTLE_COLORS,
        ),
        p.timeline(
            "Temperature of the GPU",
            "Temperature of the chip at the last look.",
            p.CELSIUS,
            Query(_temperature("gpu"), GPU),
        ),
        p.timeline(
            "Temperature of the memory",
            "Temperature of the memory at the last look.",
            p.CELSIUS,
            Query(_temperature("memory"), GPU),
            empty="These GPUs do not say",
        ),
    )


def _temperature(sensor: str) -> str:
    series = SCOPE.series(names.GPU_TEMPERATURE_CELSIUS, f'sensor="{sensor}"')
    return f"max by (instance, gpu) ({series})"


_SM_DOMAIN = 'domain="sm"'


def _trust() -> tuple[p.Panel, ...]:
    return (
        p.timeline(
            "Two sources of one energy",
            "Power of the selected GPUs over five minutes, from jouletrace's own energy and from the counter of the"
            " hardware: the lines should lie on each other.",
            p.WATTS,
            Query(total(SCOPE.rate(names.GPU_ENERGY_JOULES, window=SMOOTH)), "jouletrace"),
            Query(total(SCOPE.rate(names.GPU_HARDWARE_ENERGY_JOULES, window=SMOOTH)), "hardware counter"),
            width=8,
            dashed=["^hardware counter$"],
            colors={"jouletrace": p.GREEN, "hardware counter": p.ORANGE},
            empty="These GPUs have no energy counter",
        ),
        p.agreement(
            "Agreement",
            "Measured energy over that of the hardware counter, for the same span. Healthy within 3 % of 1.",
            Query(f"min by (instance, gpu) ({SCOPE.series(names.ENERGY_AGREEMENT_RATIO)})", GPU),
        ),
        p.sample_age(
            "Age of the newest sample",
            "About one second is normal; it grows while a GPU cannot be read.",
            Query(f"max by (instance, gpu) ({SCOPE.series(names.SAMPLE_AGE_SECONDS)})", GPU),
        ),
    )


def _new_xids() -> str:
    """Return how many critical errors came in five minutes: increase() does not see a series begin."""
    series = SCOPE.series(names.GPU_XID_ERRORS)
    return f"{SCOPE.increase(names.GPU_XID_ERRORS, window='5m')} > 0 or ({series} unless {series} offset 5m)"


def _rest() -> tuple[p.Panel, ...]:
    used, there = SCOPE.series(names.GPU_MEMORY_USED_BYTES), SCOPE.series(names.GPU_MEMORY_TOTAL_BYTES)
    pcie, nvlink = SCOPE.rate(names.GPU_PCIE_BYTES), SCOPE.rate(names.GPU_NVLINK_BYTES)
    return (
        p.timeline(
            "Memory allocated",
            "Part of the GPU's memory that is allocated. An engine reserves its cache at start: this is not what holds"
            " data.",
            p.RATIO,
            Query(per(f"max by (instance, gpu) ({used})", f"max by (instance, gpu) ({there})"), GPU),
            width=8,
            most=1,
        ),
        p.timeline(
            "Link traffic",
            "Bytes over PCIe and NVLink as the GPUs see it; transmit leaves them.",
            p.BYTES_PER_SECOND,
            Query(total(pcie, "direction"), "PCIe {{direction}}"),
            Query(total(nvlink, "direction"), "NVLink {{direction}}"),
            width=8,
            empty="No hardware counters (GPM: Hopper and later)",
        ),
        p.timeline(
            "Faults",
            "Errors that the driver reported (Xid) by number, and memory errors found by ECC, within five minutes.",
            p.COUNT,
            Query(
                f"{total(_new_xids(), *BY_GPU, 'xid')} > 0",
                f"{GPU} Xid {{{{xid}}}}",
            ),
            Query(
                f"{total(SCOPE.increase(names.GPU_ECC_ERRORS, window='5m'), *BY_GPU, 'kind')} > 0",
                f"{GPU} ECC {{{{kind}}}}",
            ),
            width=8,
            empty="No fault was reported",
        ),
    )


def _holders() -> tuple[p.Panel, ...]:
    processes = SCOPE.series(names.GPU_PROCESSES)
    pods = total(SCOPE.rate(names.POD_ENERGY_JOULES), "namespace", "pod")
    return (
        p.rows(
            "Workloads",
            "Whose processes are on each GPU, and how many processes there are on it in all.",
            HOLDER,
            Column(
                "Processes on the GPU",
                f"max by ({', '.join(HOLDER)}) ({SCOPE.series(names.GPU_PROCESS_INFO)}"
                f" * on (job, instance, gpu) group_left () {processes})",
                "none",
            ),
            width=14,
            empty="Not asked for: workloads.processes is off",
        ),
        p.timeline(
            "Power by pod",
            "Power of the selected GPUs by the pod that holds them, idle power included. The name / has what runs"
            " outside of pods.",
            p.WATTS,
            Query(f"topk(20, {pods})", "{{namespace}}/{{pod}}"),
            width=10,
            stacked=True,
            empty="Not asked for: workloads.pods is off",
        ),
    )
