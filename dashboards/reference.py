"""docs/dashboards.md: how to install the boards, and what each panel says."""

from dashboards.boards import boards
from dashboards.panels import Panel

_PREAMBLE = """\
# Dashboards

<!-- Generated from dashboards/. Change it there. -->

Six boards for Grafana 10 and later, written in Python (`dashboards/`) and committed as JSON (`dashboards/generated/`).
**They need the recording rules** of `deploy/prometheus/recording/` ([alerts.md](alerts.md)): Fleet, Requests, Waste and
the GPUs' rows of Diagnosis read what these record, so that a day of a full node or of a fleet of 10,000 GPUs shows in
well under a second. The compose file brings the rules along; in the Helm chart `rules.enabled` goes with
`dashboards.enabled`. The rest reads the raw metrics of [metrics.md](metrics.md): GPU, the engines' rows of Diagnosis,
jouletrace itself and single panels need nothing but a Prometheus that scrapes jouletrace.

The pictures are drawn by Grafana's own front-end packages (12.4) from live data of the demo and of a simulated node
(`make dashboard-pictures`). Four kinds of panels are not in those packages and are drawn by plain stand-ins: state
timelines, the heatmap, scatter plots and texts. No Grafana server takes part in the tests: files are checked against
its schemas, and every query is asked of a real Prometheus.

## Install

**By hand:** Dashboards, New, Import, and one of the files of `dashboards/generated/`. Choose the data source at the top
of the board.

**By provisioning:** copy the files to a folder of the Grafana server and name it in a provider:

```yaml
# /etc/grafana/provisioning/dashboards/jouletrace.yml
apiVersion: 1
providers:
  - name: jouletrace
    folder: jouletrace
    type: file
    options: {path: /var/lib/grafana/dashboards/jouletrace}
```

**The data source** wants two settings: its scrape interval, which `$__rate_interval` is made from, and where the trace
of an exemplar is. Exemplars also need Prometheus' flag `--enable-feature=exemplar-storage`.

```yaml
# /etc/grafana/provisioning/datasources/prometheus.yml
apiVersion: 1
datasources:
  - name: Prometheus
    type: prometheus
    url: http://prometheus:9090
    jsonData:
      timeInterval: 15s
      exemplarTraceIdDestinations: [{name: trace_id, datasourceUid: tempo}]
```

## How to read them

- Power is the rate of joules: the mean of the whole step, at any zoom, and not a sample.
- Recorded rates are means of five minutes, one a minute: what happens shows up over the next five minutes. A point of
  a panel is the mean of those since the point before, and "in the time shown" is their sum. Until the rules have run
  for a while, totals are only of the time since then.
- Quotients per token and per request are taken over five minutes, or over the time shown where a panel is one
  number: joules flow while a request runs and its tokens count when it ends.
- Firing alerts of `deploy/prometheus/` are marked on every board. The links on top keep the time and the variables.
- A panel that has nothing to show says why that is fine. "No data" is never fine; most often the rules are missing.
- The variables are data source and, on Fleet and Requests, the cluster (a label of the target, if there is one), on the
  other boards job and node; besides GPU, model, tenant or engine where they narrow something. What Requests shows of
  all tenants, whatever is chosen, says so.
- With thousands of GPUs begin at Fleet, and choose a few nodes before GPU, Diagnosis, Waste or jouletrace itself.
"""


def reference_markdown() -> str:
    """Return the page."""
    parts = [_PREAMBLE]
    for board in boards():
        picture = f"![{board.title}](pictures/dashboards/{board.uid}.png)"
        parts.append(f"## {board.title}\n\n{board.description}\n\n{picture}\n")
        heads = (f"### {board.title}: {row.title}\n\n| panel | says |\n|---|---|" for row in board.rows)
        parts += [f"{head}\n{_table(row.panels)}" for head, row in zip(heads, board.rows, strict=True)]
    return "\n".join(parts)


def _table(panels: tuple[Panel, ...]) -> str:
    lines = []
    for panel in panels:
        nothing = f" Without data: “{panel.empty}”." if panel.empty else ""
        lines.append(f"| {panel.title} | {panel.description}{nothing} |")
    return "\n".join(lines).replace("$engine", "(the chosen one)") + "\n"
