"""What the diagnosis costs: 8 devices and 16 engines, evaluated once a second of recorded time.

`python -m tests.benchmarks.diagnosis_cost` prints the CPU time per evaluation and its parts of a core. The devices'
readings are the demo recording's through the daemon's own sampler, so verdicts change and coefficients are refined;
the engines' batches vary, so that their laws are fitted again and again.
"""

import math
import time
from dataclasses import replace

import structlog

from jouletrace.requests.account import EngineState, EngineTotals, LedgerSnapshot
from tests.unit.test_diagnosis_node import START_NS, Replayed

DEVICES, ENGINES = 8, 16
S = 1_000_000_000


class Engines:
    """The account of engines that run 100 steps a second at batches that swing."""

    def __init__(self) -> None:
        self._totals = {f"engine-{number}": EngineTotals() for number in range(ENGINES)}

    def account(self, second: int) -> LedgerSnapshot:
        """Return the account one second later."""
        for number, (name, old) in enumerate(self._totals.items()):
            batch = 8.0 + 60.0 * (1.0 + math.sin(second / 20.0 + number))
            joules = 100.0 * (2.5 + 0.041 * batch)
            self._totals[name] = replace(
                old,
                settled_ns=START_NS + second * S,
                busy_joules=old.busy_joules + joules,
                decode_joules=old.decode_joules + joules,
                step_joules=old.step_joules + joules,
                step_seconds=old.step_seconds + 1.0,
                active_seconds=old.active_seconds + 1.0,
                sequence_seconds=old.sequence_seconds + batch,
                steps=old.steps + 100.0,
                step_decode_sequences=old.step_decode_sequences + 100.0 * batch,
            )
        names = list(self._totals)
        return LedgerSnapshot(
            engine_totals=dict(self._totals),
            engine_states={name: EngineState(START_NS + second * S, 60.0, 1.0, 0.4, 256, 0.0) for name in names},
            engine_devices={name: (f"GPU-{number % DEVICES}",) for number, name in enumerate(names)},
            engine_models=dict.fromkeys(names, ("Qwen/Qwen3-8B",)),
            in_flight=dict.fromkeys(names, 60),
        )


def main() -> None:
    """Run the recording once and print the table."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    node, fleet = Replayed(), Engines()
    seconds = node.length_ns // S - 2
    spent = []
    for second in range(1, seconds + 1):
        until_ns = START_NS + second * S
        while node.clock.t_ns < until_ns:
            node.clock.t_ns = min(node.sampler.run_due(), until_ns)
        [live] = node.sampler.live_devices()
        devices = [
            replace(live, uuid=f"GPU-{number}", info=replace(live.info, gpu=number)) for number in range(DEVICES)
        ]
        engines = fleet.account(second)
        before = time.thread_time()
        node.diagnosis.observe(devices, engines)
        node.diagnosis.snapshot()
        spent.append(time.thread_time() - before)
    ordered = sorted(spent)
    mean = sum(spent) / len(spent)
    print(f"{DEVICES} devices, {ENGINES} engines, {len(spent)} evaluations")
    print(f"CPU per evaluation: mean {1e3 * mean:.2f} ms, p50 {1e3 * ordered[len(ordered) // 2]:.2f} ms, ", end="")
    print(f"p99 {1e3 * ordered[len(ordered) * 99 // 100]:.2f} ms")
    print(f"at one evaluation a second: {100 * mean:.3f} % of a core (goal 0.2 %)")


if __name__ == "__main__":
    main()
