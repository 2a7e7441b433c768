"""One Ray Serve instance a session, over a random-weight checkpoint; and diffusers itself to compare with."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings

from serve_app.config.serve_file import ServeConfig, check_serve_config
from serve_app.demo.tiny import make_tiny
from serve_app.graph.environment import set_for_own_ray
from serve_app.graph.local import Running, running
from tests.reference import Reference

set_for_own_ray()  # before a module of tests imports Ray
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
# Properties bound no time: the machine may stand still for a second.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

CONFIGS = Path(__file__).parent.parent / "configs"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a Ray comes first: it takes longest. Each process of `pytest -n` starts its own, once.

    Every test has an id of its own: of tests with one id, pytest-xdist runs one and says nothing of the rest.
    """
    shared = [node_id for node_id, count in Counter(item.nodeid for item in items).items() if count > 1]
    if shared:
        raise pytest.UsageError(f"tests that share an id, so that only one of each would run: {', '.join(shared)}")
    items.sort(key=lambda item: not ("graph" in getattr(item, "fixturenames", ()) or item.get_closest_marker("ray")))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random-weight `base` and `refiner`, scaled so that every field shows in the pixels."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def reference(tiny: Path) -> Reference:
    """diffusers' own pipelines over the same checkpoint."""
    return Reference(tiny)


@pytest.fixture(scope="session")
def serve_config(tiny: Path) -> ServeConfig:
    """configs/demo.yaml over the random-weight checkpoint."""
    content: dict[str, Any] = yaml.safe_load((CONFIGS / "demo.yaml").read_text())
    args = content["applications"][0]["args"]
    args["base"], args["refiner"] = {"path": str(tiny / "base")}, {"path": str(tiny / "refiner")}
    args["http"] = {"body_timeout_s": 3.0, "cors_origins": ["https://app.example.com"]}
    return check_serve_config(content)


@pytest.fixture(scope="session")
def graph(serve_config: ServeConfig) -> Iterator[Running]:
    """The graph, up on a Ray instance and a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with running(serve_config, port=port) as up:
        yield up
