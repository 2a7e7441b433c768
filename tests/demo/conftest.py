"""The embedded pipelines, loaded once for all tests of this folder."""

import pytest
from diffusers import DiffusionPipeline

from serve_app.demo.training.evaluate import HERE, load


@pytest.fixture(scope="session")
def base() -> DiffusionPipeline:
    return load(HERE / "base")


@pytest.fixture(scope="session")
def refiner() -> DiffusionPipeline:
    return load(HERE / "refiner")
