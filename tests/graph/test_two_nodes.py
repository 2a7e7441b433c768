"""Base and refiner on two Ray nodes draw the same pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.cases import TRAFFIC
from tests.graph.test_parity import far_apart
from tests.reference import Reference


@pytest.mark.ray
def test_base_and_refiner_on_two_nodes(tiny: Path, reference: Reference, tmp_path: Path) -> None:
    output = tmp_path / "pictures.npz"
    # A process of its own: this one is connected to the session's Ray instance.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-m", "tests.graph.two_nodes", str(tiny), str(output)],
        cwd=Path(__file__).parent.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    with np.load(output) as drawn:
        base_node, refiner_node = drawn["nodes"]
        assert base_node != refiner_node
        for number, request in enumerate(TRAFFIC[:6]):
            assert far_apart(drawn[f"arr_{number}"], reference.draw(request).pixels) <= 1
