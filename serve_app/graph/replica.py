"""What the replicas of every tensor stage share: their GPU fraction, their checks, their end."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from serve_app.config.settings import AppConfig, ComputeConfig, check_max_ongoing_requests
from serve_app.request.errors import ConfigurationError, ServiceError, StageUnavailable

if TYPE_CHECKING:
    from serve_app.models.device import Compute

logger = logging.getLogger("ray.serve")

# A replica whose device is lost answers at once, so the router would send it everything: it ends itself
# after the answers are out, and Serve starts another.
_LAST_WORDS_S = 1.0


def prepare(config: AppConfig, compute: ComputeConfig) -> Compute:
    """Checks this replica's deployment options and sets up its device."""
    from serve_app.models.device import set_up

    check_options(config)
    gpus = ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)
    chosen = set_up(compute, gpu_fraction=gpus)
    logger.info("computing on %s in %s, %g GPU", chosen.device, chosen.dtype, gpus)
    return chosen


def check_options(config: AppConfig) -> None:
    """Refuses deployment options that would cap batches silently, as far as one replica knows them.

    `sdxl-serve check` knows the number of the ingress's replicas as well.
    """
    options = getattr(serve.get_replica_context(), "_deployment_config", None)
    if options is not None:
        try:
            check_max_ongoing_requests(config, options.max_ongoing_requests, "max_ongoing_requests")
        except ValueError as error:
            raise ConfigurationError(str(error)) from None


def identity() -> dict[str, Any]:
    """Which replica this is: its tag, process and node."""
    context = serve.get_replica_context()
    return {
        "replica": context.replica_tag,
        "pid": os.getpid(),
        "node": ray.get_runtime_context().get_node_id(),
    }


@contextmanager
def working() -> Iterator[None]:
    """A stage's own work: what it raises leaves as something that the ingress can read.

    Where the device is lost, this process ends, once the answers under way are out.
    """
    try:
        yield
    except StageUnavailable:
        logger.error("this replica can't work any more and ends")
        asyncio.get_running_loop().call_later(_LAST_WORDS_S, os._exit, 1)
        raise
    except ServiceError:
        raise
    except Exception as error:
        # A torch.OutOfMemoryError would bring torch into the ingress, which unpickles it.
        logger.exception("a task failed")
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
