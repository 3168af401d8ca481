"""Colours and sentences that several boards share, for every member of the closed sets of labels."""

from collections.abc import Mapping

from dashboards.panels import BLUE, BROWN, CYAN, GREEN, GREY, LIGHT_GREY, ORANGE, PINK, PURPLE, RED, YELLOW
from jouletrace.diagnosis.causes import Cause
from jouletrace.diagnosis.drivers import Driver
from jouletrace.diagnosis.verdicts import Flag, Verdict
from jouletrace.diagnosis.waste import WasteCause
from jouletrace.gpu.readings import ThrottleReason

DRIVER_COLORS: Mapping[str, str] = {
    Driver.STATIC: GREY,
    Driver.MEMORY: BLUE,
    Driver.TENSOR: ORANGE,
    Driver.OTHER_COMPUTE: YELLOW,
    Driver.LINKS: PURPLE,
    Driver.UNEXPLAINED: PINK,
}
VERDICT_COLORS: Mapping[str, str] = {
    Verdict.IDLE: LIGHT_GREY,
    Verdict.PARKED: GREY,
    Verdict.UNDERUTILIZED: RED,
    Verdict.MEMORY_BOUND: BLUE,
    Verdict.COMPUTE_BOUND: ORANGE,
    Verdict.TRANSFER_BOUND: PURPLE,
    Verdict.BALANCED: GREEN,
}
FLAG_COLORS: Mapping[str, str] = {
    Flag.POWER_CAPPED: ORANGE,
    Flag.THERMALLY_THROTTLED: RED,
    Flag.LOW_CLOCKS: YELLOW,
    Flag.UTILIZATION_MISLEADING: PURPLE,
    Flag.FP32_PIPE: CYAN,
}
THROTTLE_COLORS: Mapping[str, str] = {
    ThrottleReason.SW_POWER_CAP: GREY,
    ThrottleReason.SYNC_BOOST: BLUE,
    ThrottleReason.BOARD_LIMIT: YELLOW,
    ThrottleReason.RELIABILITY: PURPLE,
    ThrottleReason.THERMAL: ORANGE,
    ThrottleReason.SW_THERMAL: PINK,
    ThrottleReason.HW_THERMAL: BROWN,
    ThrottleReason.HW_POWER_BRAKE: RED,
}
"""The cap at the power limit is grey: it is normal under full load."""
CAUSE_COLORS: Mapping[str, str] = {
    Cause.NO_DEMAND: GREY,
    Cause.HOST_BOUND: PURPLE,
    Cause.SMALL_BATCH: ORANGE,
    Cause.KV_CAPACITY: CYAN,
    Cause.LONG_CONTEXT: BLUE,
    Cause.PREFILL_HEAVY: YELLOW,
    Cause.THROTTLED: RED,
    Cause.HEALTHY: GREEN,
    Cause.UNKNOWN: LIGHT_GREY,
}
WASTE_COLORS: Mapping[str, str] = {
    WasteCause.PARKED: GREY,
    WasteCause.UNDERUTILIZED_WITH_DEMAND: RED,
    WasteCause.THROTTLING: YELLOW,
    WasteCause.SMALL_BATCH_WHILE_WAITING: ORANGE,
}
IDLE_COLORS: Mapping[str, str] = {
    "requests": GREEN,
    "no request known": PINK,
    "idle, held": GREY,
    "idle, not held": LIGHT_GREY,
}
PART_COLORS: Mapping[str, str] = {
    "idle": GREY,
    "fixed": ORANGE,
    "kv": BLUE,
    "decode": GREEN,
    "prefill": YELLOW,
    "between_steps": BROWN,
    "busy": CYAN,
}
"""Parts of an engine's joules per unit."""

CAUSE_ADVICE: Mapping[Cause, tuple[str, str]] = {
    Cause.NO_DEMAND: (
        "No request, or mostly idle time and nobody waits.",
        "Scale to zero, or serve it from fewer GPUs.",
    ),
    Cause.HOST_BOUND: (
        "Requests are active and the GPU waits for something else.",
        "Look at the CPU, kernel launches (CUDA graphs) and data loading.",
    ),
    Cause.SMALL_BATCH: (
        "The batch is below B*: most of a step's energy is there however many take part.",
        "Consolidate replicas when nobody waits; raise `max_num_seqs` when requests do.",
    ),
    Cause.KV_CAPACITY: (
        "Memory for the KV cache limits the batch.",
        "Use an 8-bit KV cache, or give the engine more memory.",
    ),
    Cause.LONG_CONTEXT: (
        "Reading contexts costs more than what a step costs anyway.",
        "Use an 8-bit KV cache, or shorter contexts.",
    ),
    Cause.PREFILL_HEAVY: ("Prompts take most of the energy.", "Use a prefix cache, or shorter prompts."),
    Cause.THROTTLED: ("Clocks are held down by heat or a brake.", "Look at cooling and power supply."),
    Cause.HEALTHY: ("The batch is beyond B* and nothing is in its way.", "Nothing to do."),
    Cause.UNKNOWN: ("Inputs are missing or contradict each other.", "`/v1/diagnosis` says what to send."),
}
"""What each cause means, and what to do about it."""
