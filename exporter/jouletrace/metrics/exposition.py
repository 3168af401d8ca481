"""From a registry to the bytes that a scraper asked for."""

from collections.abc import Collection

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder


def render(registry: CollectorRegistry, accept_header: str, names_filter: Collection[str] = ()) -> tuple[bytes, str]:
    """Return the exposition and its Content-Type, in the format that the Accept header asks for.

    OpenMetrics 1.0.0 when it is accepted, else Prometheus text, which is also the answer to an odd or empty
    header. With `names_filter`, only the series of these names. About 2 ms (text) or 4 ms (OpenMetrics) for
    eight devices: not for the event loop.
    """
    encode, content_type = choose_encoder(_known_formats(accept_header))
    return encode(registry.restricted_registry(names_filter) if names_filter else registry), content_type


def _known_formats(accept_header: str) -> str:
    """Return the header without the formats that the client refuses (q=0) or that do not exist yet.

    prometheus_client repeats any later OpenMetrics version as if it were what it writes.
    """
    return ",".join(part for part in accept_header.split(",") if _is_known(part))


def _is_known(media_range: str) -> bool:
    media_type, *parameters = (part.strip().lower() for part in media_range.split(";"))
    given = dict(parameter.split("=", 1) for parameter in parameters if "=" in parameter)
    if not _quality(given.get("q", "1")):
        return False
    return media_type != "application/openmetrics-text" or given.get("version", "1.0.0") == "1.0.0"


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 1.0
