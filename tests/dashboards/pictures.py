"""Draws every dashboard with Grafana's front-end packages in headless Chromium, from live data of the small fleet.

`python -m tests.dashboards.pictures [--minutes N] [--prometheus URL]` writes docs/pictures/dashboards/. What Grafana
does not publish (state timelines, heatmaps, scatter plots, texts) is drawn by plain stand-ins.
"""

import argparse
import contextlib
import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from dashboards.boards import GENERATED, boards
from dashboards.queries import RULE_SECONDS

from tests.dashboards.small_fleet import small_fleet
from tests.integration.test_prometheus import free_port

ROOT = Path(__file__).parents[2]
DRAWING = Path(__file__).parent / "drawing"
PICTURES = ROOT / "docs" / "pictures" / "dashboards"
SCRAPE_SECONDS = 5
LEVEL_SECONDS = 40
RULE_WINDOW_SECONDS = 330
"""After this the five minutes of the recorded rates are full."""
ENGINE = "vllm-0"
COLORS = 128
"""Of the palette that pictures are reduced to: a third of the bytes, no difference to see."""


@contextlib.contextmanager
def page(prometheus: str, build: Path) -> Iterator[str]:
    """Build the page and serve it; yield its URL."""
    port = free_port()
    variables = {"PROMETHEUS_URL": prometheus, "PORT": str(port), "BOARDS": str(GENERATED), "BUILD": str(build)}
    vite = [str(DRAWING / "node_modules" / ".bin" / "vite")]
    environment = {**os.environ, **variables}
    subprocess.run([*vite, "build", "--logLevel", "error"], cwd=DRAWING, env=environment, check=True)
    server = subprocess.Popen([*vite, "preview", "--logLevel", "warn"], cwd=DRAWING, env=environment)
    try:
        url = f"http://127.0.0.1:{port}/"
        for _ in range(100):
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(url, timeout=5):
                break
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait(10)


def draw(prometheus: str, seconds: float, folder: Path) -> None:
    """Draw every board over the last `seconds`; raises CalledProcessError when a page had a fault."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    with page(prometheus, folder / "build") as url:
        parameters = f"&range={seconds:.0f}&scrape={SCRAPE_SECONDS}&engine={ENGINE}"
        urls = [f"{url}?board={board.uid}{parameters}" for board in boards()]
        subprocess.run(["node", "screenshot.mjs", str(folder), *urls], cwd=DRAWING, check=True)
    for board in boards():
        picture = f"{board.uid}.png"
        reduced = ["pngquant", "--force", "--strip", "--speed", "1", "--output", str(PICTURES / picture), str(COLORS)]
        subprocess.run([*reduced, str(folder / picture)], check=True)


def main() -> None:
    """Run the fleet for some minutes, or take a Prometheus that runs already, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=13.0, help="how much time the pictures show")
    parser.add_argument("--prometheus", help="a Prometheus that has the data already")
    options = parser.parse_args()
    seconds = 60 * options.minutes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.prometheus:
            draw(options.prometheus, seconds, folder)
            return
        with small_fleet(
            folder,
            level_seconds=LEVEL_SECONDS,
            replay_speed=1,
            scrape_seconds=SCRAPE_SECONDS,
            rule_seconds=RULE_SECONDS,
        ) as url:
            print(f"Collecting data for {(seconds + RULE_WINDOW_SECONDS) / 60:.0f} minutes at {url}", flush=True)
            time.sleep(seconds + RULE_WINDOW_SECONDS)
            draw(url, seconds, folder)


if __name__ == "__main__":
    main()
