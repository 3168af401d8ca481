"""A small fleet on this machine: the demo, a simulated node that serves two models, and a Prometheus that scrapes both.

The simulated node has four H200s: one whose engine reports steps that obey a law of the tests' choice, one whose
engine reports only when requests begin and end, one that an engine takes and holds without work, and one that nobody
holds.
Everything listens on loopback and is ended by its own pid.
"""

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

from jouletrace.engines.client import Client
from tests.daemon_process import DaemonProcess, simulated
from tests.integration.test_prometheus import fetch, free_port, program, wait_for
from tests.nvml_shim import Constant, Device, Process, Scenario, Square, Steps, Xid, build

S = 1_000_000_000

FIXED_JOULES, SEQUENCE_JOULES = 3.0, 0.07
"""The law of the simulated steps: about what the ML.ENERGY benchmark gives for an 8B model on an H100."""
STEPS_PER_SECOND = 60
STEPS_PER_RECORD = 6
BATCHES = (8, 112, 16, 48, 0)
"""Decoding sequences of the levels, which follow each other; 0 is a pause."""
PARKED_WATTS, BARE_WATTS = 121.0, 79.0
"""An H200 without work, held and not held."""
TAKEN_SECONDS = 30.0
"""When the third GPU is taken: what parking wastes is known once the free GPU's level has been learnt."""
UUIDS = tuple(f"GPU-00000000-0000-4000-8000-00000000000{gpu}" for gpu in range(4))
STEP_MODEL, BOUNDARY_MODEL, PARKED_MODEL = "Qwen/Qwen3-8B", "google/gemma-3-12b-it", "Qwen/Qwen3-14B"
TENANTS = ("search", "support", "batch")

DECODE = {"graphics_util": "97/0", "sm_util": "86/0", "sm_occupancy": "22/0", "any_tensor_util": "17/0"}
DECODE |= {"dram_bw_util": "63/0", "fp32_util": "6/0", "fp16_util": "2/0", "integer_util": "5/0"}
PREFILL = {"graphics_util": "98/0", "sm_util": "91/0", "sm_occupancy": "19/0", "any_tensor_util": "64/0"}
PREFILL |= {"dram_bw_util": "27/0", "fp32_util": "9/0", "integer_util": "8/0"}
PREFILL |= {"pcie_tx_per_sec": "40/0", "pcie_rx_per_sec": "400/0"}
BUSY_STATE = {"util_pct": "100/0", "temperature_c": "61/38", "memory_temperature_c": "70/44"}
QUIET = {"graphics_util": 0, "sm_util": 0, "sm_occupancy": 0, "any_tensor_util": 0, "dram_bw_util": 0}


def scenario(level_seconds: float, epoch_ns: int) -> Scenario:
    """Return the node whose first GPU draws what the law says for `BATCHES`, each for `level_seconds`."""
    held = [Process(4242, 120_000)]
    watts = [
        STEPS_PER_SECOND * (FIXED_JOULES + SEQUENCE_JOULES * batch) if batch else PARKED_WATTS for batch in BATCHES
    ]
    points = [(level_seconds * place, power) for place, power in enumerate(watts)]
    stepping = Steps(points, active_above_watts=PARKED_WATTS + 1, repeat_s=level_seconds * len(BATCHES))
    prefilling = Square(PARKED_WATTS, 695.0, period_s=3 * level_seconds, duty=0.6)
    return Scenario(
        devices=[
            Device("h200", stepping, uuid=UUIDS[0], gpm=DECODE, state=BUSY_STATE, processes=held),
            Device(
                "h200",
                prefilling,
                uuid=UUIDS[1],
                gpm=PREFILL,
                state=BUSY_STATE,
                throttle={"sw_power_cap": "0.7/0"},
                processes=held,
            ),
            Device(
                "h200",
                Steps([(0.0, BARE_WATTS), (TAKEN_SECONDS, PARKED_WATTS)]),
                uuid=UUIDS[2],
                gpm=QUIET,
                processes=[Process(4242, 120_000, from_s=TAKEN_SECONDS)],
            ),
            Device("h200", Constant(BARE_WATTS), uuid=UUIDS[3], gpm=QUIET),
        ],
        xids=[Xid(gpu=1, code=31, at_s=3 * level_seconds)],
        epoch_ns=epoch_ns,
    )


Sent = tuple[int, str, dict[str, object]]
"""When a record is sent, what kind it is, and the record."""


@dataclass
class Engines:
    """Sends the records of the simulated node's engines until it is told to stop."""

    url: str
    epoch_ns: int
    level_seconds: float
    stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Engines":
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        rng, client = random.Random(1), Client(self.url)
        try:
            for gpu, model in enumerate((STEP_MODEL, BOUNDARY_MODEL, PARKED_MODEL)):
                record = {"engine_id": f"vllm-{gpu}", "kind": "vllm", "models": [model], "gpu_uuids": [UUIDS[gpu]]}
                client.send("engine", {**record, "max_num_seqs": 128})
            level = 0
            while not self.stop.is_set():
                begin_ns = self.epoch_ns + round(level * self.level_seconds * S)
                batch = BATCHES[level % len(BATCHES)]
                records = [*self._stepping(rng, begin_ns, batch), *self._prompting(rng, begin_ns, level)]
                for at_ns, kind, record in sorted(records, key=itemgetter(0)):
                    if at_ns > time.time_ns() - S and not self.stop.wait(max(0.0, (at_ns - time.time_ns()) / S)):
                        client.send(kind, record)
                level += 1
        finally:
            client.close()

    def _stepping(self, rng: random.Random, begin_ns: int, batch: int) -> Iterator[Sent]:
        """Return one level of the engine that reports steps."""
        length_ns = STEPS_PER_RECORD * S // STEPS_PER_SECOND
        records = round(self.level_seconds * S) // length_ns
        # Sequences leave one after the other and others take their place, so that requests cost what they last.
        ends = [rng.randint(1, records - 1) for _ in range(batch)]
        ids = [f"{begin_ns:x}-{number}" for number in range(batch)]
        for number in range(records if batch else 0):
            start_ns = begin_ns + number * length_ns
            members = [f"{one}-{int(number >= end)}" for one, end in zip(ids, ends, strict=True)]
            step = {"engine_id": "vllm-0", "start_ns": start_ns, "end_ns": start_ns + length_ns, "decode": members}
            waiting = 12 if batch == max(BATCHES) else 0
            more = {"steps": STEPS_PER_RECORD, "running": batch, "waiting": waiting, "kv_usage": batch / 160}
            yield start_ns + length_ns, "step", {**step, **more}
        for one, end in zip(ids, ends, strict=True):
            tenant = rng.choices(TENANTS, (6, 3, 1))[0]
            for turn, (first, after) in enumerate(((0, end), (end, records))):
                times = {"arrival_ns": begin_ns + first * length_ns, "end_ns": begin_ns + after * length_ns}
                request = self._request(rng, f"{one}-{turn}", "vllm-0", STEP_MODEL, tenant)
                usage = {"input": rng.randint(200, 2000), "output": (after - first) * STEPS_PER_RECORD}
                more = {"first_token_ns": times["arrival_ns"] + length_ns, "usage": usage}
                yield times["end_ns"], "request", {**request, **times, **more}

    def _prompting(self, rng: random.Random, begin_ns: int, level: int) -> Iterator[Sent]:
        """Return one level of the engine that reports requests only; its GPU works for 1.8 of 3 levels."""
        busy_ns = round((1.0, 0.8, 0.0)[level % 3] * self.level_seconds * S)
        for number in range(12 if busy_ns else 0):
            start_ns = begin_ns + busy_ns * number // 24
            first_ns, end_ns = start_ns + busy_ns // 5, start_ns + busy_ns // 2
            tenant = rng.choices(TENANTS, (1, 3, 6))[0]
            request = self._request(rng, f"b{begin_ns:x}-{number}", "vllm-1", BOUNDARY_MODEL, tenant)
            times = {"arrival_ns": start_ns, "first_token_ns": first_ns, "end_ns": end_ns}
            usage = {"input": rng.randint(3000, 9000), "cached_input": 1000, "output": rng.randint(20, 200)}
            status = rng.choices(("finished", "cancelled"), (15, 1))[0]
            yield end_ns, "request", {**request, **times, "status": status, "usage": usage}

    @staticmethod
    def _request(rng: random.Random, request_id: str, engine: str, model: str, tenant: str) -> dict[str, object]:
        trace_id = f"{rng.getrandbits(128):032x}"
        ids = {"request_id": request_id, "engine_id": engine, "trace_id": trace_id}
        return {**ids, "model": model, "tenant": tenant, "status": "finished"}


RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "recording"
PROMETHEUS = """\
global: {{scrape_interval: {interval}s, scrape_timeout: {interval}s}}
rule_files: ["rules/*.yml"]
scrape_configs:
  - job_name: jouletrace
    static_configs:
      - {{targets: ["{demo}"], labels: {{instance: node-1, cluster: example}}}}
      - {{targets: ["{node}"], labels: {{instance: node-2, cluster: example}}}}
"""


def write_rules(folder: Path, seconds: int) -> None:
    """Copy the recording rules, evaluated each so many seconds. No expression is touched."""
    folder.mkdir()
    for file in RULES.glob("*.yml"):
        (folder / file.name).write_text(file.read_text().replace("interval: 1m", f"interval: {seconds}s"))


@contextlib.contextmanager
def small_fleet(
    folder: Path, *, level_seconds: float, replay_speed: float, scrape_seconds: int, rule_seconds: int
) -> Iterator[str]:
    """Run the fleet; yield the URL of its Prometheus."""
    port = free_port()
    (folder / "demo").mkdir()
    (folder / "node").mkdir()
    epoch_ns = time.time_ns()
    variables = simulated(build(), folder / "node", scenario(level_seconds, epoch_ns))
    # Other tests' engines on this machine are not this fleet's.
    alone, patience, listing = "--no-engines.discover", "--diagnosis.parked-after=5s", "--workloads.processes"
    with (
        DaemonProcess(folder / "demo", "--demo", f"--replay.speed={replay_speed}", alone) as demo,
        DaemonProcess(folder / "node", patience, listing, alone, variables=variables) as node,
    ):
        targets = {"demo": demo.url.removeprefix("http://"), "node": node.url.removeprefix("http://")}
        configuration = folder / "prometheus.yml"
        configuration.write_text(PROMETHEUS.format(interval=scrape_seconds, **targets))
        write_rules(folder / "rules", rule_seconds)
        node.until("readiness", node.ready)
        command = ["prometheus", f"--config.file={configuration}", f"--storage.tsdb.path={folder / 'tsdb'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage", "--log.level=warn"]
        url, log = f"http://127.0.0.1:{port}", folder / "prometheus.log"
        with Engines(node.url, epoch_ns, level_seconds), program(command, log) as server:
            wait_for(lambda: fetch(f"{url}/-/ready"), 30, server, log)
            yield url
        demo.assert_calm()
        node.assert_calm()
