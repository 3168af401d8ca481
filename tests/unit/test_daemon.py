"""The wiring's own decisions: which GPUs, which source, which exit code."""

from pathlib import Path

import pytest
from tests.conftest import NodeFactory
from tests.nvml_shim import Device

from jouletrace.config import Config
from jouletrace.daemon import (
    DeviceChoiceError,
    chooser,
    demo_recording,
    exit_code,
    explanation,
    intervals,
    make_source,
)
from jouletrace.gpu.nvml import NvmlSource
from jouletrace.gpu.readings import DriverGoneError, DriverMismatchError, NoDriverError
from jouletrace.gpu.replay import ReplaySource
from jouletrace.gpu.sampler import DriverLostError
from jouletrace.trace.recording import RecordingError

pytestmark = pytest.mark.timeout(30)

UUIDS = [f"GPU-{first}0000000-0000-4000-8000-000000000000" for first in "abc"]


def chosen(simulate: NodeFactory, *wanted: int | str) -> list[int]:
    """Return the indices of the GPUs that are chosen of three."""
    devices = simulate(*(Device(uuid=uuid) for uuid in UUIDS)).open()
    return [device.info.gpu for device in chooser(wanted)(devices)]


def test_gpus_are_chosen_by_index_or_uuid(simulate: NodeFactory) -> None:
    assert chosen(simulate) == [0, 1, 2]
    assert chosen(simulate, 2, 0) == [2, 0]
    assert chosen(simulate, UUIDS[1]) == [1]
    assert chosen(simulate, "GPU-c") == [2]
    assert chosen(simulate, 0, "GPU-a", UUIDS[0]) == [0]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (3, r"devices: 3 names no GPU of this machine; it has 0 \(GPU-a0000000-.*\), 1 \("),
        ("GPU-", "devices: GPU- names 3 GPUs of this machine"),
        ("GPU-f", "devices: GPU-f names no GPU"),
    ],
)
def test_a_gpu_that_is_not_there_or_not_unique(simulate: NodeFactory, wanted: int | str, words: str) -> None:
    with pytest.raises(DeviceChoiceError, match=words):
        chosen(simulate, wanted)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (DriverLostError("gone"), 4),
        (DriverMismatchError("nvmlInit", 18, "LIB_RM_VERSION_MISMATCH"), 4),
        (NoDriverError("none"), 3),
        (DriverGoneError("nvmlInit", 9, "DRIVER_NOT_LOADED"), 3),
        (DeviceChoiceError("devices: 7"), 2),
        (RecordingError("cut off"), 2),
        (ZeroDivisionError(), 1),
    ],
)
def test_exit_codes(failure: Exception, code: int) -> None:
    assert exit_code(failure) == code


def test_a_mismatch_says_what_to_do() -> None:
    told = explanation(DriverMismatchError("nvmlInit", 18, "LIB_RM_VERSION_MISMATCH"))
    assert told == (
        "the NVIDIA library and the kernel driver differ (nvmlInit: LIB_RM_VERSION_MISMATCH (code 18)):"
        " reboot, or reload the driver's modules"
    )
    assert explanation(NoDriverError("no driver here")) == "no driver here"


def test_the_source_is_the_driver_or_a_recording(tmp_path: Path) -> None:
    assert isinstance(make_source(Config()), NvmlSource)
    assert isinstance(make_source(Config(source=f"replay:{demo_recording()}")), ReplaySource)


def test_intervals_are_the_configured_ones() -> None:
    config = Config()
    found = intervals(config)
    assert found.ring == config.sampling.ring_interval
    assert found.counter == config.sampling.counter_interval
    assert found.polling == pytest.approx(1 / config.sampling.power_polling_hertz)


def test_the_demo_is_small() -> None:
    assert demo_recording().stat().st_size < 1_000_000
