"""Writes the generated pages of docs/, or checks that they are current (`--check`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # dashboards/ and tests/ are not installed

from alerts import reference_markdown as alerts
from config_pages import example_file, manual_page
from dashboards.reference import reference_markdown as dashboards
from sizing import sizing_markdown

from jouletrace.config import reference_markdown as configuration
from jouletrace.metrics.names import reference_markdown as metrics
from jouletrace.web.live.figures import reference_markdown as live
from jouletrace.web.openapi import openapi_document
from jouletrace.web.schema import records_schema

DOCS = Path(__file__).parent
PAGES = {
    "alerts.md": alerts,
    "configuration.md": configuration,
    "dashboards.md": dashboards,
    "live.md": live,
    "metrics.md": metrics,
    "sizing.md": sizing_markdown,
    "schema/records.schema.json": records_schema,
    "schema/openapi.json": openapi_document,
    "man/jouletrace.yml.5": manual_page,
    "../deploy/deb/jouletrace.yml": example_file,
}


def main() -> int:
    """Return 1 when `--check` finds a page that differs from what would be written."""
    check = "--check" in sys.argv[1:]
    stale = []
    for name, page in PAGES.items():
        file = DOCS / name
        content = page()
        if file.exists() and file.read_text() == content:
            continue
        if check:
            stale.append(name)
        else:
            file.write_text(content)
    for name in stale:
        print(f"docs/{name} is not current: run `make docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
