import numpy as np
import pytest

from jouletrace.energy.sensors import AVERAGE, MS, SensorModel, instant_model


# Update period, window (ms): SC24 artefact of arXiv 2312.02741, Overall_Results.xlsx, POWER_INSTANT by product.
@pytest.mark.parametrize(
    ("architecture", "update_ms", "window_ms"),
    [
        ("hopper", 100, 25),
        ("ga100", 100, 25),
        ("ampere", 100, 100),
        ("ada", 100, 100),
        ("turing", 100, 100),
        ("volta", 20, 10),
        ("pascal", 20, 10),
    ],
)
def test_published_sensors(architecture: str, update_ms: int, window_ms: int) -> None:
    model = instant_model(architecture)
    assert (model.update_ns, model.window_ns) == (update_ms * MS, window_ms * MS)
    assert model.seen_part == window_ms / update_ms


def test_a_sensor_that_nobody_published_is_taken_as_the_worst_known() -> None:
    assert instant_model("blackwell").seen_part == 0.25
    assert instant_model("").seen_part == 0.25


def test_a_measured_period_keeps_the_part_that_is_seen() -> None:
    assert instant_model("hopper", 50 * MS) == SensorModel(50 * MS, round(12.5 * MS), instant_model("hopper").lag_ns)
    assert instant_model("ada", 90 * MS).seen_part == 1
    assert instant_model("ada", 100 * MS) is instant_model("ada")


def test_the_average_of_a_second_sees_everything() -> None:
    assert (AVERAGE.update_ns, AVERAGE.window_ns, AVERAGE.seen_part) == (100 * MS, 1_000 * MS, 1)


@pytest.mark.parametrize("model", [AVERAGE, *map(instant_model, ("hopper", "ada", "volta"))])
def test_delay_puts_a_step_where_it_was(model: SensorModel) -> None:
    # Power steps from 0 to 1 at t = 0 and the sensor is watched all the time, at any phase of its updates: held
    # values, moved back by the delay, turn on at 0 on average, and never further away than the time error.
    edges = []
    for phase_ns in np.arange(0, model.update_ns, MS / 4):
        appears = np.arange(-20, 60) * model.update_ns + phase_ns
        values = np.clip((appears - model.lag_ns) / model.window_ns, 0, 1)
        # The time by which as much is missing after the step as was there too early, as the integral tells.
        edges.append(float(np.sum(1 - values) * model.update_ns + appears[0] - model.delay_ns))
        turning = appears[(values > 0) & (values < 1)] - model.delay_ns
        assert np.all(np.abs(turning) <= model.time_error_ns)
    assert np.mean(edges) == pytest.approx(0, abs=MS)
    assert np.abs(edges).max() <= model.time_error_ns
