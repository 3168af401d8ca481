import re
from pathlib import Path

from jouletrace.metrics import names

CONSTANTS = [value for value in vars(names).values() if isinstance(value, names.Metric)]


def test_every_constant_is_in_the_list_once() -> None:
    assert len(set(names.ALL)) == len(names.ALL)
    assert set(CONSTANTS) == set(names.ALL)
    assert len({metric.name for metric in names.ALL}) == len(names.ALL)


def test_names_follow_the_naming_guide() -> None:
    for metric in names.ALL:
        assert re.fullmatch(r"jouletrace_[a-z][a-z0-9_]*", metric.name)
        assert metric.name.endswith("_total") == (metric.type == "counter"), metric.name
        for label in metric.labels:
            assert re.fullmatch(r"[a-z][a-z0-9_]*", label)
            assert label not in ("instance", "job", "host", "hostname", "le", "quantile", "pid", "request_id")


def test_gpu_metrics_carry_gpu_and_uuid() -> None:
    assert all(metric.labels[:2] == ("gpu", "uuid") for metric in names.DEVICE)


def test_help_is_sentences_without_characters_that_the_formats_escape() -> None:
    for metric in names.ALL:
        assert metric.help[0].isupper() or metric.help[0].isdigit(), metric.name
        assert metric.help.endswith("."), metric.name
        assert not set('"\\\n|') & set(metric.help), metric.name


def test_units_come_from_the_names() -> None:
    assert names.GPU_ENERGY_JOULES.unit == "joules"
    assert names.GPU_POWER_WATTS.unit == "watts"
    assert names.DRIVER_CALL_SECONDS.unit == "seconds"
    assert names.GPU_CLOCK_HERTZ.unit == "hertz"
    assert names.GPU_TEMPERATURE_CELSIUS.unit == "celsius"
    assert names.GPU_XID_ERRORS.unit == ""
    assert names.UP.unit == ""


def test_the_help_texts_say_what_misleads() -> None:
    assert "Misleading" in names.GPU_UTILIZATION_RATIO.help
    assert "pure copies" in names.GPU_UTILIZATION_RATIO.help
    assert "rate()" in names.GPU_ENERGY_JOULES.help
    assert "background" in names.SAMPLE_AGE_SECONDS.help


def test_reference_page_is_current_and_complete() -> None:
    page = names.reference_markdown()
    assert Path("docs/metrics.md").read_text(encoding="utf-8") == page
    for metric in names.ALL:
        assert f"| `{metric.name}` | {metric.type} |" in page
