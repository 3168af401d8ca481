"""The command line: flags, exit codes, and one line on standard error for every expected failure."""

import gzip
import json
import re
from pathlib import Path

import pytest
from tests.conftest import NodeFactory
from tests.nvml_shim import Constant, Device, Fault

import jouletrace
from jouletrace.cli import main
from jouletrace.daemon import demo_recording

pytestmark = pytest.mark.timeout(30)

Captured = pytest.CaptureFixture[str]


def one_line(capsys: Captured) -> str:
    """Return the only line on standard error; assert that there is nothing else."""
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("jouletrace: ")
    return line


def ends(*arguments: str) -> int:
    """Run a command that argparse may end; return the exit code."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_version(capsys: Captured) -> None:
    assert ends("--version") == 0
    assert capsys.readouterr().out == f"jouletrace {jouletrace.__version__}\n"


COMMON = {"--config.file", "--source", "--devices", "--log.level", "--sampling.ring-interval"}


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("run", {*COMMON, "--demo", "--print-config", "--web.listen-address", "--readiness.stale-after"}),
        ("doctor", {*COMMON, "--json"}),
        ("record", {*COMMON, "--output", "--seconds"}),
        ("measure", {*COMMON, "--json"}),
        ("check-config", {*COMMON, "--print-config"}),
        ("analyze", {"--json", "--html"}),
    ],
)
def test_help_names_the_flags(command: str, flags: set[str], capsys: Captured) -> None:
    assert ends(command, "--help") == 0
    text = capsys.readouterr().out
    assert flags <= set(re.findall(r"--[a-z][a-z.-]*", text))


def test_help_names_the_commands(capsys: Captured) -> None:
    assert ends("--help") == 0
    text = capsys.readouterr().out
    for command in ("run", "doctor", "record", "analyze", "measure", "check-config"):
        assert re.search(rf"^    {command}\s", text, re.MULTILINE), command


@pytest.mark.parametrize(
    "arguments",
    [[], ["dance"], ["run", "--no-such-flag"], ["run", "--dem"], ["record"], ["record", "-o", "x", "--seconds", "-1"]],
)
def test_wrong_usage(arguments: list[str], capsys: Captured) -> None:
    assert ends(*arguments) == 2
    assert "error:" in capsys.readouterr().err


def test_measure_without_a_command(capsys: Captured) -> None:
    assert main(["measure"]) == 2
    assert "measure -- CMD" in one_line(capsys)


# ---- configuration ----


def test_check_config(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("sampling: {ring_interval: 1500ms}\n")
    assert main(["check-config", "--config.file", str(file)]) == 0
    assert capsys.readouterr().out == "the configuration is fine\n"
    assert main(["check-config", "--config.file", str(file), "--print-config"]) == 0
    assert "ring_interval: 1s500ms" in capsys.readouterr().out


def test_what_is_printed_can_be_read_again(tmp_path: Path, capsys: Captured) -> None:
    assert main(["run", "--demo", "--web.listen-address", "127.0.0.1:0", "--print-config"]) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "config.yaml"
    file.write_text(printed)
    assert main(["check-config", "--config.file", str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("command", ["run", "check-config", "doctor", "measure"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- source: nvml\n", "list"),
        ("samplng: {}\n", "samplng"),
        ("sampling: {ring_interval: 5}\n", "sampling.ring_interval"),
        ("sampling: [\n", "config.yaml"),
    ],
)
def test_a_wrong_configuration(tmp_path: Path, capsys: Captured, command: str, content: str, words: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    more = ["--", "true"] if command == "measure" else []
    assert main([command, "--config.file", str(file), *more]) == 2
    assert words in one_line(capsys)


def test_a_configuration_that_is_not_there(tmp_path: Path, capsys: Captured) -> None:
    assert main(["run", "--config.file", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in one_line(capsys)


def test_demo_and_source_exclude_each_other(capsys: Captured) -> None:
    assert main(["run", "--demo", "--source", "nvml"]) == 2
    assert "exclude each other" in one_line(capsys)


# ---- recordings ----


def damaged(kind: str, folder: Path) -> Path:
    """Return a recording that is broken in some way."""
    file = folder / "broken.json.gz"
    content = demo_recording().read_bytes()
    match kind:
        case "truncated":
            file.write_bytes(content[: len(content) // 2])
        case "corrupt":
            middle = len(content) // 2
            file.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
        case "wrong version":
            recording = json.loads(gzip.decompress(content))
            recording["meta"]["format"] = 99
            file.write_bytes(gzip.compress(json.dumps(recording).encode(), 1))
        case "a list":
            file.write_bytes(gzip.compress(b"[1, 2]"))
        case "text":
            file.write_text("hello\n")
        case "empty":
            file.write_bytes(b"")
        case "a folder":
            file.mkdir()
    return file


@pytest.mark.parametrize(
    "kind", ["truncated", "corrupt", "wrong version", "a list", "text", "empty", "a folder", "missing"]
)
def test_recordings_that_cannot_be_used(tmp_path: Path, capsys: Captured, kind: str) -> None:
    file = damaged(kind, tmp_path)
    assert main(["analyze", str(file)]) == 2
    assert file.name in one_line(capsys)
    here = ["--web.listen-address", "127.0.0.1:0", "--state-dir", str(tmp_path)]
    assert main(["run", *here, "--source", f"replay:{file}"]) == 2
    # The daemon says it in its log.
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert last["level"] == "critical"
    assert last["event"].startswith("cannot go on: ")
    assert file.name in last["event"]
    assert "exception" not in last


def test_analyze_the_demo(capsys: Captured) -> None:
    assert main(["analyze", str(demo_recording()), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == 1
    assert found["energy_joules"] == pytest.approx(found["counter_joules"], rel=0.0005)
    assert main(["analyze", str(demo_recording())]) == 0
    assert found["phases"][0]["name"] in capsys.readouterr().out


def test_analyze_writes_a_page_beside_the_report(tmp_path: Path, capsys: Captured) -> None:
    page = tmp_path / "report.html"
    assert main(["analyze", str(demo_recording()), "--html", str(page)]) == 0
    assert "where the joules went" in capsys.readouterr().out
    html = page.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    # The box on the time axis with its title, and the table.
    assert html.count("idle_with_weights") == 3
    assert main(["analyze", str(demo_recording()), "--html", str(tmp_path / "missing" / "report.html")]) == 2
    assert "the report could not be written" in capsys.readouterr().err


def test_record_then_analyze(simulate: NodeFactory, tmp_path: Path, capsys: Captured) -> None:
    node = simulate(Device(power=Constant(321)))
    node.use_real_time()
    file = tmp_path / "trace.json.gz"
    quick = ["--sampling.ring-interval", "200ms", "--sampling.counter-interval", "1s"]
    assert main(["record", *quick, "--output", str(file), "--seconds", "2"]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert main(["analyze", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["energy_source"] == "power_ring"
    [phase] = found["phases"]
    assert phase["average_watts"] == pytest.approx(321, rel=0.001)
    assert phase["energy_joules"] == pytest.approx(321 * (phase["end_ns"] - phase["start_ns"]) / 1e9, rel=0.001)


# ---- GPUs ----


@pytest.mark.parametrize("command", [["doctor"], ["measure", "--", "true"], ["record", "-o", "x.json.gz"]])
@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (Fault.error("nvmlInitWithFlags", 9), 3, "kernel driver is not loaded"),
        (Fault.error("nvmlInitWithFlags", 4), 3, "no permission"),
        (Fault.driver_mismatch(), 4, "reboot, or reload the driver's modules"),
    ],
)
def test_no_gpu_to_read(
    simulate: NodeFactory, capsys: Captured, command: list[str], fault: Fault, code: int, words: str
) -> None:
    simulate(faults=[fault]).use_real_time()
    assert main(command) == code
    assert words in one_line(capsys)


def test_a_gpu_that_is_not_there(simulate: NodeFactory, capsys: Captured) -> None:
    simulate(Device(), Device()).use_real_time()
    assert main(["doctor", "--devices", "GPU-00000000"]) == 2
    assert "names 2 GPUs" in one_line(capsys)


def test_doctor(simulate: NodeFactory, capsys: Captured) -> None:
    simulate(Device("a100")).use_real_time()
    assert main(["doctor", "--json"]) == 0
    [device] = json.loads(capsys.readouterr().out)["devices"]
    assert device["energy_source"] == "energy_counter"
