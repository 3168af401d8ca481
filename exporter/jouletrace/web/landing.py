"""The landing page: what this daemon is, what it watches, where the rest is."""

import base64
import hashlib
from html import escape

from jouletrace.snapshot import DeviceSnapshot, DeviceStatus, NodeSnapshot
from jouletrace.web.health import Readiness

_STYLE = """\
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: light-dark(#1b1b1b, #e6e6e6); background: light-dark(#fff, #161616); }
h1 { font-size: 1.5rem; margin-bottom: 0; }
a { color: light-dark(#0b57a4, #8ec7ff); }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 0.5rem 1.5rem; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; font-weight: 600; padding: 0.5rem 0; }
th, td { text-align: left; padding: 0.35rem 0.75rem 0.35rem 0;
  border-bottom: 1px solid light-dark(#d0d0d0, #404040); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.table { overflow-x: auto; }
.problem { border-left: 0.25rem solid light-dark(#b3261e, #ff8a80); padding: 0.25rem 1rem; }
"""

_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Allows this page's own style and nothing else: no script, no request to anywhere."""

_ABSENT = "–"


def landing_page(snapshot: NodeSnapshot, readiness: Readiness, *, version: str, telemetry_path: str) -> str:
    """Return the page as HTML."""
    links = (
        (telemetry_path, "Metrics", "for Prometheus"),
        ("/-/ready", "Readiness", "does every GPU have a fresh sample?"),
        ("/-/healthy", "Health", "does the process answer?"),
    )
    items = "\n".join(f'<li><a href="{escape(path)}">{name}</a> ({what})</li>' for path, name, what in links)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>jouletrace</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>jouletrace</h1>
<p>Where do the joules go? Version {escape(version)}, source {escape(snapshot.source)}.</p>
</header>
<nav aria-label="Pages"><ul>
{items}
</ul></nav>
<main>
{_problems(readiness)}{_devices(snapshot, readiness)}</main>
</body>
</html>
"""


def _problems(readiness: Readiness) -> str:
    if readiness.ready:
        return ""
    items = "\n".join(f"<li>{escape(reason)}</li>" for reason in readiness.reasons)
    return f"""<section class="problem" aria-label="Problems">
<h2>Not ready</h2>
<ul>
{items}
</ul>
</section>
"""


def _devices(snapshot: NodeSnapshot, readiness: Readiness) -> str:
    if not snapshot.devices:
        return "<p>No GPU is being watched.</p>\n"
    rows = "\n".join(_row(device, readiness) for device in snapshot.devices)
    return f"""<div class="table" role="region" aria-label="GPUs" tabindex="0">
<table>
<caption>GPUs</caption>
<thead><tr>
<th scope="col">GPU</th><th scope="col">Name</th><th scope="col" class="number">Power</th>
<th scope="col" class="number">Limit</th><th scope="col">Energy source</th><th scope="col">State</th>
</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
"""


def _row(device: DeviceSnapshot, readiness: Readiness) -> str:
    readable = device.status is DeviceStatus.OK and not readiness.stalled
    state = "stalled" if readiness.stalled else device.status.value
    return (
        f'<tr><th scope="row" title="{escape(device.info.uuid)}">{device.info.gpu}</th>'
        f"<td>{escape(device.info.name)}</td>"
        f'<td class="number">{_watts(device.power_watts if readable else None)}</td>'
        f'<td class="number">{_watts(device.power_limit_watts if readable else None)}</td>'
        f"<td>{escape((device.energy_source if readable else None) or _ABSENT)}</td>"
        f"<td>{escape(state)}</td></tr>"
    )


def _watts(watts: float | None) -> str:
    return _ABSENT if watts is None else f"{watts:.0f} W"
