"""The page at `/`: what the daemon sees now, without JavaScript; with it, live."""

from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from html import escape
from importlib import resources
from string import Template
from typing import Final

from aiohttp import web

import jouletrace
from jouletrace.snapshot import DeviceSnapshot, DeviceStatus, NodeSnapshot
from jouletrace.web.health import Readiness
from jouletrace.web.live.figures import SECTIONS, Figure

CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
"""Allows the page's own files and its own stream, nothing inline, nothing from elsewhere; texts never become markup."""

ASSETS: Final = {
    "live.css": "text/css",
    "live.js": "text/javascript",
    "stream.js": "text/javascript",
    "trace.js": "text/javascript",
    "view.js": "text/javascript",
}
"""The page's files beside this module."""
ASSETS_PATH: Final = "/-/live/"
"""Where they are served: not below a path that the metrics could be given."""

_ABSENT: Final = "–"


class LivePage:
    """The page and its files."""

    def __init__(
        self, snapshot: Callable[[], NodeSnapshot], readiness: Callable[[], Readiness], telemetry_path: str
    ) -> None:
        self._snapshot = snapshot
        self._readiness = readiness
        self._telemetry_path = telemetry_path

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes of the page and its files."""
        return [
            web.get("/", self._page),
            *(web.get(ASSETS_PATH + name, _asset(name, kind)) for name, kind in ASSETS.items()),
        ]

    async def _page(self, _: web.Request) -> web.Response:
        page = live_page(
            self._snapshot(),
            self._readiness(),
            version=jouletrace.__version__,
            telemetry_path=self._telemetry_path,
        )
        headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
        return web.Response(text=page, content_type="text/html", headers=headers)


def live_page(snapshot: NodeSnapshot, readiness: Readiness, *, version: str, telemetry_path: str) -> str:
    """Return the page as HTML. Its links are relative, so that it works behind a proxy below some path."""
    links = (
        (telemetry_path.lstrip("/"), "Metrics", "for Prometheus"),
        ("-/ready", "Readiness", "does every GPU have a fresh sample?"),
        ("-/healthy", "Health", "does the process answer?"),
        ("v1/diagnosis", "Diagnosis", "as JSON"),
        ("v1/ledger", "Account", "as JSON"),
        ("v1/requests", "Requests", "as JSON"),
        ("v1/schema", "Schema", "of records"),
    )
    return Template(_file("index.html")).substitute(
        version=escape(version),
        source=escape(snapshot.source),
        links="\n".join(f'<li><a href="{escape(path)}" title="{what}">{name}</a></li>' for path, name, what in links),
        problems="\n".join(f"<li>{escape(reason)}</li>" for reason in readiness.reasons),
        problems_hidden="" if readiness.reasons else " hidden",
        devices=_devices(snapshot, readiness),
        glossary="\n".join(_terms(title, figures) for title, figures in SECTIONS),
    )


@cache
def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _asset(name: str, kind: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def get(_: web.Request) -> web.StreamResponse:
        return web.Response(text=_file(name), content_type=kind, charset="utf-8")

    return get


def _terms(title: str, figures: Sequence[Figure]) -> str:
    rows = "\n".join(f"<dt>{escape(f.label)}</dt><dd>{escape(f.sentence)}</dd>" for f in figures)
    return f"<h3>{escape(title)}</h3>\n<dl>\n{rows}\n</dl>"


def _devices(snapshot: NodeSnapshot, readiness: Readiness) -> str:
    if not snapshot.devices:
        return "<p>No GPU is being watched.</p>"
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
</div>"""


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
