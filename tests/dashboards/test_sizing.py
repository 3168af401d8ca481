"""How many series a node serves, by the real collectors."""

import re
from pathlib import Path

import pytest

from jouletrace.metrics import names
from tests.node_page import full_page

SIZING = Path(__file__).parents[2] / "docs" / "sizing.md"
MOST_SERIES = 12_000
PROCESS = 6


def counted(gpus: int, models: int, tenants: int) -> int:
    return PROCESS + sum(len(family.samples) for family in full_page(gpus, models, tenants))


def test_a_full_node_has_every_metric_in_few_enough_series() -> None:
    page = full_page(8, 20, 50)
    served = {name for family in page for name in (family.name, f"{family.name}_total")}
    # These models make tokens, and workloads are off by default.
    absent = {names.UNITS_MADE, *names.WORKLOADS}
    assert {metric.name for metric in names.ALL} - served == {metric.name for metric in absent}
    assert counted(8, 20, 50) < MOST_SERIES


def test_the_formula_of_the_docs_holds_for_other_nodes() -> None:
    text = SIZING.read_text()
    [found] = re.findall(r"(\d+) \+ (\d+) per GPU \+ (\d+) per model \+ (\d+) per model and tenant", text)
    rest, gpu, model, pair = map(int, found)
    for gpus, models, tenants in ((1, 1, 1), (4, 3, 7), (16, 5, 200)):
        assert counted(gpus, models, tenants) == rest + gpu * gpus + model * models + pair * models * tenants


def test_labels_are_those_of_the_list() -> None:
    labels = {metric.name.removesuffix("_total"): set(metric.labels) for metric in names.ALL}
    for family in full_page(1, 1, 1):
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == labels[family.name], sample


@pytest.mark.parametrize("tenants", [0, 1])
def test_a_node_without_traffic_is_small(tenants: int) -> None:
    assert counted(8, tenants, tenants) < 900
