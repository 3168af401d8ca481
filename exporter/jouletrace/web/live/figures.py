"""The numbers of the live monitor: what each is called and what it means, once for page, terminal and docs.

A number that Prometheus has as well is explained by its metric's own help text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from jouletrace.metrics import names
from jouletrace.metrics.names import Metric


@dataclass(frozen=True, slots=True)
class Figure:
    """One number, or one word, of the monitor."""

    key: str
    """Its name in the page's markup: what shows it carries `data-figure="KEY"`."""
    label: str
    """What people read beside it."""
    metric: Metric | None = None
    """The same number in Prometheus."""
    meaning: str = ""
    """One sentence; empty where the metric's help says it."""

    @property
    def sentence(self) -> str:
        """Return what it means, in one sentence."""
        return self.meaning or f"{_first_sentence(self.metric.help if self.metric else '')}."


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")


GPU: Final = (
    Figure("power", "Power", names.GPU_POWER_WATTS),
    Figure("power_max", "Highest", names.GPU_POWER_MAX_WATTS),
    Figure("limit", "Limit", names.GPU_POWER_LIMIT_WATTS),
    Figure(
        "trace",
        "Power trace",
        names.GPU_ENERGY_JOULES,
        "The last minute of power, in watts: each point is the mean over one sample of the sensor in use (20 ms on "
        "Hopper), so that the area under the line is the energy; it runs two to three seconds behind, and has a gap "
        "where nobody knows.",
    ),
    Figure(
        "source",
        "Source",
        names.GPU_INFO,
        "The sensor that the energy comes from: power_ring, energy_counter, power_polling or power_average, the best "
        "one that this GPU has.",
    ),
    Figure("temperature", "Temperature", names.GPU_TEMPERATURE_CELSIUS),
    Figure("verdict", "Verdict", names.DIAGNOSIS_VERDICT, "What limits the GPU now, and since when."),
    Figure("confidence", "Confidence", names.DIAGNOSIS_CONFIDENCE_RATIO),
    Figure(
        "flags",
        "Flags",
        names.DIAGNOSIS_FLAG_SECONDS,
        "What is worth knowing beside the verdict, such as a power cap; several can be up at once.",
    ),
    Figure(
        "evidence",
        "Evidence",
        None,
        "The numbers that the verdict rests on, as /v1/diagnosis has them; ratios are 0 to 1.",
    ),
    Figure(
        "drivers",
        "Drivers",
        names.DRIVER_ENERGY_JOULES,
        "What the power of the newest second went to, in watts, by the model of this GPU; the parts add up to the "
        "measured power.",
    ),
    Figure(
        "drivers_confidence",
        "Drivers' confidence",
        None,
        "How far to trust the division into drivers, 0 to 1: it falls with readings that are missing.",
    ),
    Figure("idle_level", "Idle level", names.GPU_IDLE_POWER_WATTS),
    Figure("idle", "Idle energy", names.IDLE_ENERGY_JOULES),
    Figure("waste", "Waste", names.WASTED_ENERGY_JOULES),
    Figure("age", "Sample age", names.SAMPLE_AGE_SECONDS),
)

ENGINES: Final = (
    Figure("in_flight", "In flight", names.REQUESTS_IN_FLIGHT),
    Figure("queue", "Running and waiting", names.ENGINE_QUEUE_REQUESTS),
    Figure("cause", "Cause", names.ENGINE_CAUSE, "Why the engine's joules per token are above their best."),
    Figure("cause_confidence", "Confidence", None, "How far to trust the cause, 0 to 1."),
    Figure(
        "advice", "Advice", None, "What would lower the engine's joules per token, with the figure that it rests on."
    ),
    Figure("joules_per_unit", "Joules per unit", names.ENGINE_UNIT_ENERGY_JOULES),
    Figure(
        "reachable",
        "Reachable",
        None,
        "Joules per unit that the advice would reach; absent where the numbers do not support a figure.",
    ),
    Figure("saved", "Saving", None, "Power that the advice would save at the present throughput, in watts."),
    Figure("batch", "Batch", names.ENGINE_BATCH_SEQUENCES),
    Figure(
        "half_fixed_batch",
        "B*",
        names.ENGINE_STEP_FIXED_JOULES,
        "The batch at which half of a step's energy is fixed, a / b of the step-energy law: under it, tokens are dear.",
    ),
    Figure("coverage", "Coverage", names.ATTRIBUTION_COVERAGE_RATIO),
    Figure(
        "reference",
        "Measured elsewhere",
        names.ENGINE_REFERENCE_UNIT_ENERGY_JOULES,
        "Joules per token that the ML.ENERGY benchmark measured for the same model at a like batch, and on which GPU.",
    ),
    Figure("gpus", "GPUs", None, "The GPUs that the engine holds, by index."),
)

REQUESTS: Final = (
    Figure(
        "request_joules",
        "Energy",
        names.REQUEST_ENERGY_JOULES,
        "Energy that the request has used, in joules, without idle energy: provisional while it is in flight, final "
        "once its end is settled.",
    ),
    Figure("bounds", "Bounds", None, "The least and the most that the request may have used, by sensor and method."),
    Figure("phases", "Prefill, decode", None, "The request's joules by phase: for its prompt, and for its output."),
    Figure("joules_per_token", "J per token", None, "The request's joules over its output tokens."),
    Figure(
        "method",
        "Method",
        None,
        "How the joules were found: by the engine's steps, by counts of steps, or by the request's boundaries alone.",
    ),
    Figure(
        "took", "Took, running for", None, "Time from the request's arrival to its end; to now, while it is in flight."
    ),
    Figure("ended_ago", "Ago", None, "Time since the request's end."),
)

NODE: Final = (
    Figure("node_power", "Power now", names.GPU_POWER_WATTS, "Newest power of all GPUs that can be read, in watts."),
    Figure("node_limit", "of the limits", names.GPU_POWER_LIMIT_WATTS, "Sum of the power limits of those GPUs."),
    Figure("node_requests", "Requests in flight", names.REQUESTS_IN_FLIGHT),
    Figure("node_ended", "ended", names.REQUESTS, "Requests that have ended, finished or not."),
    Figure("attributed", "Used by requests", names.ATTRIBUTED_ENERGY_JOULES),
    Figure(
        "pending",
        "Pending",
        None,
        "Energy of engines' work, in joules, that has not been booked yet: to a model and tenant, or to nobody.",
    ),
    Figure("idle_bare", "Idle, bare", names.IDLE_ENERGY_JOULES, "Energy while no process held a context on the GPU."),
    Figure(
        "idle_parked",
        "Idle, parked",
        names.IDLE_ENERGY_JOULES,
        "Energy while an engine held a context on the GPU and waited for work.",
    ),
    Figure("share", "of all energy", None, "The energy above it as a part of the energy of all GPUs, in percent."),
    Figure("unattributed", "Unattributed", names.UNATTRIBUTED_ENERGY_JOULES),
    Figure("wasted", "Waste", names.WASTED_ENERGY_JOULES),
    Figure("account_age", "Account age", names.ACCOUNT_AGE_SECONDS),
)

SECTIONS: Final = (("The node", NODE), ("Each GPU", GPU), ("Each engine", ENGINES), ("Each request", REQUESTS))
"""All figures, by the place where they stand."""


def all_figures() -> Iterator[Figure]:
    """Return every figure."""
    for _, figures in SECTIONS:
        yield from figures


_PREAMBLE = """\
# Live monitor

<!-- Generated from exporter/jouletrace/web/live/figures.py. Change it there. -->

Two views of the running daemon, with the same content from the same stream:

- **In the browser**, at `/`. One page of the daemon itself: nothing to build, no request to anywhere else, and a
  content security policy that allows only its own files. Without JavaScript it is a table of the GPUs that a reload
  brings up to date.
- **In the terminal**: `jouletrace top [URL]`. `q` ends it, `p` holds it still. `--once` prints one screen, `--json` a
  JSON object per line and second, both together one object: for scripts.

![Eight GPUs, one of them lost](pictures/live-eight-gpus-1440-light.png)

More pictures: [one GPU, dark](pictures/live-one-gpu-1440-dark.png),
[on a telephone](pictures/live-two-gpus-360-light.png). Drivers are stacked behind the power trace. A page that is
opened shows the last minute of both at once.

## Where `top` looks

| | |
|---|---|
| `jouletrace top` | the socket `/run/jouletrace/web.sock` if a daemon listens there, else `http://127.0.0.1:9841` |
| `jouletrace top unix:/PATH` | a Unix socket, one of the daemon's `web.listen_address: [":9841", "unix:/PATH"]` |
| `jouletrace top https://HOST:PORT` | over TLS |

`--ca-file` names a private certificate authority, `--cert-file` and `--key-file` the client certificate to show.
`--token-file` sends the token of `ingest.token_file`, `--user` and `--password-file` those of the web configuration.
Secrets come from files alone: everybody on the machine can read a command line.

The socket has the mode of `ingest.socket_access` (0660 unless changed) and goes when the daemon ends. It serves what
the port serves, by the same rules: passwords, the rate limit and the token hold. Two things differ. It speaks HTTP
without TLS, so that its clients need no certificate: its mode says who may connect. And its clients count as clients
on this machine wherever they run: keep it out of folders that containers mount. If engines mount
`/run/jouletrace` for the sockets of records, choose another folder. Under systemd the socket unit says where to listen:
`systemctl edit jouletrace.socket`, with `ListenStream=/PATH`, `SocketMode=0660` and `SocketGroup=` below `[Socket]`.

## Who sees what

Power, drivers, verdicts, engines with their causes and all totals are for whoever may see `/metrics`: they are the
same numbers. **Requests, with their ids and tenants, are for the entitled**, as everywhere in the [API](api.md):
clients on this machine or, with `ingest.token_file`, those with the token. The page asks for the token, keeps it for
the tab and sends it with nothing but the stream.

## The stream

`GET /v1/live` is a stream of server-sent events, one round a second, made once for all viewers:

| event | data |
|---|---|
| `hello` | `version`, `interval_seconds`, `window_seconds`; `requests_refused`: why no requests are shown, or null |
| `trace` | by uuid: `start_ms`, `steps_ms` (of each segment), `watts` (mean or null); the window first, then news |
| `drivers` | by uuid: `starts_ms`, `ends_ms` (of spans of a second), `watts` by driver; the window first, then news |
| `node` | everything else: `devices`, `engines`, `account`, `problems` |
| `requests` | `in_flight` (those of the most joules) and `settled` (the newest), 20 each; for the entitled |

Times are wall-clock epoch milliseconds. At most 32 viewers are served, further ones get 503. One that does not keep
up is cut off and may come back; the page does so by itself, with waits of 1 to 15 s, and says when. A page in a
hidden tab lets its connection go after half a minute. Nothing is collected while nobody looks.

## The numbers

"""


def reference_markdown() -> str:
    """Return docs/live.md."""
    tables = []
    for title, figures in SECTIONS:
        rows = [f"### {title}", "", "| number | meaning | in Prometheus |", "|---|---|---|"]
        rows += [f"| {f.label} | {f.sentence} | {f'`{f.metric.name}`' if f.metric else ''} |" for f in figures]
        tables.append("\n".join(rows) + "\n")
    return _PREAMBLE + "\n".join(tables)
