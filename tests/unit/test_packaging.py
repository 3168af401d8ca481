"""What the packages hold beside the code agrees with it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from jouletrace import config
from jouletrace.config import Config, load

ROOT = Path(__file__).parents[2]


def normalized(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def test_every_package_that_is_needed_is_pinned_with_hashes() -> None:
    text = (ROOT / "deploy" / "deb" / "requirements.txt").read_text()
    blocks = re.findall(
        r"^([A-Za-z0-9._-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE
    )
    pins = {normalized(name): version for name, version, _ in blocks}
    assert len(pins) == sum("==" in line for line in text.splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["grpc"], *extras["zmq"]]
    for requirement in wanted:
        name = normalized(re.split("[<>=!~ ;[]", requirement)[0])
        assert name in pins, f"{name} is not pinned: run make lock"
        lowest = re.search(r">=([0-9.]+)", requirement)
        if lowest:
            assert version_of(pins[name]) >= version_of(lowest[1]), f"{name} {pins[name]} is too old: run make lock"
        highest = re.search(r"<([0-9.]+)", requirement)
        if highest:
            assert version_of(pins[name]) < version_of(highest[1]), f"{name} {pins[name]} is too new: run make lock"


def version_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def test_the_shipped_file_shows_the_defaults(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "deb" / "jouletrace.yml").read_text()
    assert load(ROOT / "deploy" / "deb" / "jouletrace.yml", {}, None) == load(None, {}, None), "all of it is comment"
    file = tmp_path / "all.yml"
    file.write_text(re.sub("^#(?!#)", "", text, flags=re.MULTILINE))
    assert load(file, {}, None) == load(None, {}, None)
    shown = re.findall(r"^# *([a-z_]+): .", text, re.MULTILINE)
    assert len(shown) == len(config.KEYS), "every key stands there"
    file.write_text(file.read_text().replace('level: "info"', "level: debug"))
    assert load(file, {}, None).log.level == "debug", "and is read"
    assert Config().log.level == "info"


def test_the_manual_page_names_every_command() -> None:
    page = (ROOT / "docs" / "man" / "jouletrace.1").read_text().replace("\\-", "-")
    text = subprocess.run(
        [sys.executable, "-m", "jouletrace", "--help"], capture_output=True, text=True, timeout=30, check=True
    ).stdout
    commands = re.findall(r"^    ([a-z-]+)(?: |$)", text, re.MULTILINE)
    assert {"run", "doctor", "analyze"} <= set(commands)
    for command in commands:
        assert re.search(rf"^\.BI? {command}\b", page, re.MULTILINE), f"{command} is not in jouletrace.1"
