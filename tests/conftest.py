"""What tests of several modules share: the simulated driver and a node on virtual time."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.nvml_shim import Device, Scenario, build
from tests.simulated_node import SimulatedNode, scenario_node

NodeFactory = Callable[..., SimulatedNode]


@pytest.fixture(autouse=True)
def plain_logs() -> Iterator[None]:
    """Undo what a command has configured: a level of one test must not hide the lines of the next."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def library() -> Path:
    """Return the simulated driver, built once."""
    if shutil.which("gcc") is None:
        pytest.skip("the simulated driver needs gcc")
    return build()


@pytest.fixture
def simulate(library: Path, tmp_path: Path) -> Iterator[NodeFactory]:
    """Return a function that makes a node of the given GPUs; its other arguments are the scenario's."""
    nodes: list[SimulatedNode] = []

    def make(*devices: Device, **scenario: Any) -> SimulatedNode:
        for node in nodes:
            node.close()
        nodes.append(scenario_node(library, Scenario(devices or (Device(),), **scenario), tmp_path))
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()
