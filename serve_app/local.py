"""A Ray instance of our own with the graph running on it: for the command line, and for tests."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from serve_app.checkpoint import check_sources
from serve_app.errors import ConfigurationError
from serve_app.serve_config import ServeConfig


@dataclass(frozen=True)
class Running:
    """A graph that is up: the application's handle and its HTTP address."""

    handle: Any  # ray.serve.handle.DeploymentHandle of the ingress
    url: str | None


@contextmanager
def running(
    config: ServeConfig,
    *,
    http: bool = True,
    host: str | None = None,
    port: int | None = None,
    address: str | None = None,
) -> Iterator[Running]:
    """Runs the graph until the block ends, with HTTP or for its handle alone.

    Starts a Ray instance on this machine, or joins the one at `address`. It never attaches to whatever
    cluster happens to run here, as a bare `ray.init()` would. Checks come before anything is started;
    a deployment that fails is one line in a `ConfigurationError`.
    """
    check_sources(config.app)
    options = dict(config.http_options)
    options["host"] = host or options.get("host", "127.0.0.1")
    options["port"] = options.get("port", 8000) if port is None else port
    if http and address is None:
        _check_port_free(options["host"], options["port"])
    # Ray turns token authentication on for local clusters, and then its own tools lack the token.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")

    import ray
    from ray import serve

    from serve_app.graph import APP_NAME, build_graph

    ray.init(
        address=address or "local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        namespace="serve",
    )
    try:
        if http:
            serve.start(proxy_location=config.proxy_location, http_options=options)
        else:
            serve.start(proxy_location="Disabled")
        try:
            handle = serve.run(
                build_graph(config.app, config.deployments),
                name=APP_NAME,
                route_prefix="/",
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
        except RuntimeError as error:
            raise ConfigurationError(_reason(str(error))) from None
        yield Running(handle, f"http://{options['host']}:{options['port']}" if http else None)
    finally:
        if address is not None:
            serve.delete(APP_NAME)  # the cluster and what else it serves are not ours
        ray.shutdown()  # a Ray of our own ends with it, replicas and all


def _check_port_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(f"port {port} on {host}: {error.strerror}") from None


def _reason(message: str) -> str:
    """The one line that matters of Ray's report of a failed deployment."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for line in reversed(lines):
        if match := re.match(r"(?:[\w.]+\.)?ConfigurationError: (.+)", line):
            return match.group(1)
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b.*", line)]
    return (errors or lines or ["the deployment failed"])[-1]
