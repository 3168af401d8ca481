"""The whole daemon on the simulated driver, while the driver misbehaves."""

import json
import signal
import socket
import time
from pathlib import Path

import pytest
from tests.daemon_process import DaemonProcess, run_command, simulated
from tests.nvml_shim import Constant, Device, Fault, Latency, Scenario, Square, Xid, write_control

pytestmark = pytest.mark.timeout(60)

ENERGY = "jouletrace_gpu_energy_joules_total"
AGE = "jouletrace_sample_age_seconds"
QUICK = ("--sampling.ring-interval", "200ms", "--readiness.stale-after", "1s")


def test_eight_gpus_are_read_within_two_seconds(library: Path, tmp_path: Path) -> None:
    scenario = Scenario([Device(power=Constant(200 + gpu)) for gpu in range(8)], latencies=[Latency.h200()])
    took = []
    # The best of three: the machine may be busy with something else.
    for _ in range(3):
        with DaemonProcess(tmp_path, variables=simulated(library, tmp_path, scenario)) as daemon:
            daemon.until("eight GPUs", lambda: len(daemon.metric(ENERGY)) == 8)
            took.append(time.monotonic() - daemon.started)
            assert daemon.get("/-/healthy")[0] == 200
            daemon.process.terminate()
            assert daemon.ends(3) == 0
        if took[-1] < 2:
            break
    assert min(took) < 2


def test_a_hang_leaves_the_pages_working(library: Path, tmp_path: Path) -> None:
    control = tmp_path / "control"
    scenario = Scenario([Device(power=Constant(300)), Device(power=Constant(200))], control=control)
    with DaemonProcess(tmp_path, *QUICK, variables=simulated(library, tmp_path, scenario)) as daemon:
        daemon.until("readiness", daemon.ready)
        write_control(control, [Fault.hang("nvmlDeviceGetSamples", gpu=1)])
        daemon.until("the call's name", lambda: "nvmlDeviceGetSamples on GPU 1 hangs" in daemon.get("/-/ready")[1])
        age, joules = daemon.metric(AGE), daemon.metric(ENERGY)
        assert daemon.get("/-/ready")[0] == 503
        time.sleep(0.5)
        assert daemon.get("/")[0] == 200
        assert daemon.get("/-/healthy")[0] == 200
        assert all(daemon.metric(AGE)[gpu] > age[gpu] + 0.4 for gpu in ("0", "1"))
        # The call returns: all goes on, and nothing is lost.
        write_control(control)
        daemon.until("recovery", daemon.ready)
        daemon.until("progress", lambda: all(daemon.metric(ENERGY)[gpu] > joules[gpu] + 300 for gpu in ("0", "1")))
        # A call that hangs does not keep the process from ending.
        write_control(control, [Fault.hang("nvmlDeviceGetSamples")])
        daemon.until("another hang", lambda: not daemon.ready())
        daemon.process.terminate()
        assert daemon.ends(5) == 0
        assert "leaving a driver call behind" in daemon.text()


def test_a_lost_gpu_and_a_pause(library: Path, tmp_path: Path) -> None:
    control = tmp_path / "control"
    scenario = Scenario([Device(power=Constant(300)), Device(power=Constant(200))], control=control)
    with DaemonProcess(
        tmp_path, *QUICK, "--sampling.counter-interval", "1s", variables=simulated(library, tmp_path, scenario)
    ) as daemon:
        daemon.until("readiness", daemon.ready)
        write_control(control, [Fault.lost(0), Xid(0, 79)])
        daemon.until("the loss", lambda: daemon.metric("jouletrace_up") == {"": 0.0})
        status, why = daemon.get("/-/ready")
        assert status == 503
        assert why.startswith("GPU 0 (GPU-00000000-0000-4000-8000-000000000000): lost (")
        assert "GPU 1" not in why
        before = daemon.metric(ENERGY)
        assert set(before) == {"0", "1"}, "what adds up stays"
        assert set(daemon.metric("jouletrace_gpu_power_watts")) == {"1"}
        daemon.until("the other's energy", lambda: daemon.metric(ENERGY)["1"] > before["1"] + 50)
        assert daemon.metric(ENERGY)["0"] == before["0"]
        write_control(control)
        daemon.until("the return", daemon.ready)
        # 300 W for the second or more that it was away, from the hardware counter.
        daemon.until("the energy in between", lambda: daemon.metric(ENERGY)["0"] > before["0"] + 300)
        # The process stands still for longer than the ring is deep.
        daemon.until("a little time", lambda: daemon.metric(ENERGY)["1"] > before["1"] + 600)
        seconds = [time.monotonic()]
        joules = [daemon.metric(ENERGY)]
        daemon.process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        daemon.process.send_signal(signal.SIGCONT)
        daemon.until("a fresh sample", lambda: daemon.metric(ENERGY)["1"] > joules[0]["1"] + 700 and daemon.ready())
        seconds.append(time.monotonic())
        joules.append(daemon.metric(ENERGY))
        assert daemon.metric("jouletrace_energy_gap_seconds_total")["1"] > 1
        for gpu, watts in (("0", 300), ("1", 200)):
            used = joules[1][gpu] - joules[0][gpu]
            # Each end is up to two ring intervals old.
            assert used == pytest.approx(watts * (seconds[1] - seconds[0]), abs=watts * 0.6)
        daemon.process.terminate()
        assert daemon.ends() == 0
        events = [event["event"] for event in daemon.events()]
        assert events.count("GPU lost") == events.count("GPU is back") == 1


def test_an_updated_driver_ends_the_process(library: Path, tmp_path: Path) -> None:
    control = tmp_path / "control"
    with DaemonProcess(
        tmp_path, variables=simulated(library, tmp_path, Scenario([Device()], control=control))
    ) as daemon:
        daemon.until("readiness", daemon.ready)
        write_control(control, [Fault.driver_mismatch()])
        assert daemon.ends() == 4
        last = daemon.events()[-1]["event"]
        assert "the NVIDIA driver was updated under this process" in last
        assert "restart jouletrace" in last


def test_a_driver_that_stays_away_ends_the_process(library: Path, tmp_path: Path) -> None:
    control = tmp_path / "control"
    with DaemonProcess(
        tmp_path,
        *QUICK,
        "--driver.give-up-after",
        "1s",
        variables=simulated(library, tmp_path, Scenario([Device(), Device()], control=control)),
    ) as daemon:
        daemon.until("readiness", daemon.ready)
        write_control(control, [Fault.lost(0), Fault.lost(1)])
        assert daemon.ends(15) == 4
        assert "no GPU has answered for 1 s" in daemon.events()[-1]["event"]


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (Fault.error("nvmlInitWithFlags", 4), 3, "no permission to open the NVIDIA devices"),
        (Fault.error("nvmlInitWithFlags", 9), 3, "kernel driver is not loaded"),
        (Fault.error("nvmlDeviceGetHandleByIndex_v2", 15), 3, "no GPU answered"),
        (Fault.driver_mismatch(), 4, "the NVIDIA library and the kernel driver differ"),
    ],
)
def test_a_driver_that_cannot_be_used_at_start(
    library: Path, tmp_path: Path, fault: Fault, code: int, words: str
) -> None:
    variables = simulated(library, tmp_path, Scenario([Device()], faults=[fault]))
    with DaemonProcess(tmp_path, variables=variables) as daemon:
        assert daemon.ends() == code
        assert words in daemon.events()[-1]["event"]


def test_a_driver_without_a_gpu(library: Path, tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, variables=simulated(library, tmp_path, Scenario(()))) as daemon:
        assert daemon.ends() == 3
        assert "the NVIDIA driver is there but shows no GPU" in daemon.events()[-1]["event"]


def test_no_driver_at_all(library: Path, tmp_path: Path) -> None:
    variables = simulated(library, tmp_path, Scenario([Device()]))
    # The library refuses without its scenario, as a driver that is not there.
    variables["JOULETRACE_NVML_SHIM"] = ""
    with DaemonProcess(tmp_path, variables=variables) as daemon:
        assert daemon.ends() == 3
        assert "libnvidia-ml.so.1 was not found" in daemon.events()[-1]["event"]
        assert "run --demo" in daemon.events()[-1]["event"]


def test_a_gpu_that_is_not_there(library: Path, tmp_path: Path) -> None:
    variables = simulated(library, tmp_path, Scenario([Device(), Device()]))
    with DaemonProcess(tmp_path, "--devices", "5", variables=variables) as daemon:
        assert daemon.ends() == 2
        assert "devices: 5 names no GPU of this machine; it has 0 (GPU-" in daemon.events()[-1]["event"]


def test_a_port_in_use(library: Path, tmp_path: Path) -> None:
    variables = simulated(library, tmp_path, Scenario([Device()]))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run_command("run", "--web.listen-address", address, variables=variables)
    assert done.returncode == 2
    assert address in done.stderr
    assert len(done.stderr.splitlines()) == 1


LACKING = {
    "hardware counter": Device("a100"),
    "No GPM before Hopper": Device("a100"),
    "sees 50% of the time": Device("pascal"),
    "1 s power average": Device("average_only"),
    "No energy counter": Device(features={"counter": "off"}),
    "vGPU guest or an old driver": Device(features={"gpm": "off"}),
    "GPM is there but withheld": Device(features={"gpm": "no_permission"}),
    "MIG is on": Device(features={"mig": "on"}),
}


def test_what_is_missing_is_said_in_a_sentence(library: Path, tmp_path: Path) -> None:
    devices = list(LACKING.values())
    variables = simulated(library, tmp_path, Scenario(devices))
    with DaemonProcess(tmp_path, variables=variables) as daemon:
        daemon.until("readiness", daemon.ready)
        assert len(daemon.metric(ENERGY)) == len(devices)
        said = {event["event"]: event.get("gpus", []) for event in daemon.events()}
        for gpu, words in enumerate(LACKING):
            assert any(words in sentence and gpu in gpus for sentence, gpus in said.items()), words
        daemon.process.terminate()
        assert daemon.ends() == 0


def test_learnt_levels_survive_a_kill(library: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    uuid = "GPU-00000000-0000-4000-8000-000000000000"
    level = {"watts": 79.25, "windows": 30, "learnt_ns": 1_700_000_000_000_000_000}
    content = json.dumps({"format": 1, "devices": {uuid: {"bare": level}}})
    (state / "idle-levels.json").write_text(content)
    variables = simulated(library, tmp_path, Scenario([Device(power=Square(100, 600, 0.7), gpm={"sm_util": 90.0})]))
    for _ in range(2):
        with DaemonProcess(tmp_path, variables=variables) as daemon:
            daemon.until(
                "the level", lambda: daemon.metric("jouletrace_gpu_idle_power_watts", kind="bare") == {"0": 79.25}
            )
            daemon.process.kill()
            daemon.process.wait(5)


@pytest.mark.parametrize("content", [b"{not json", None])
def test_a_state_file_that_cannot_be_used(library: Path, tmp_path: Path, content: bytes | None) -> None:
    state = tmp_path / "state"
    state.mkdir()
    file = state / "idle-levels.json"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with DaemonProcess(tmp_path, variables=simulated(library, tmp_path, Scenario([Device()]))) as daemon:
        daemon.until("readiness", daemon.ready)
        warnings = [event for event in daemon.events() if event["level"] == "warning"]
        assert len(warnings) == 1
        assert warnings[0]["file"] == str(file)
        daemon.process.terminate()
        assert daemon.ends() == 0
    if content is not None:
        assert file.with_suffix(".unreadable").read_bytes() == content
